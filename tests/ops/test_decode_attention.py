"""Decoding attention: compiled form, plain torch form and loops over single entries are one function."""

import dataclasses

import pytest
import torch

from kvfold.ops import native
from kvfold.ops.paged import decode_attention, decode_reference
from paged_pools import SOFTCAP, Streams

SIZES = [1, 63, 100, 257, 600]
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def compiled(*args, **kwargs):
    if native.library() is None:
        pytest.skip("no C compiler here, or KVFOLD_NATIVE=0: the compiled form can't be tested")
    return decode_attention(*args, **kwargs)


BOTH = pytest.mark.parametrize("attend", [compiled, decode_reference], ids=["compiled", "plain"])


@BOTH
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("group", "head_dim"), [(1, 8), (3, 64), (4, 80)])
@pytest.mark.parametrize("softcap", SOFTCAP)
def test_output_equals_loops_with_the_new_token_apart(attend, size, group, head_dim, softcap):
    pool = Streams([size, max(1, size // 3)], kv_heads=2, group=group, head_dim=head_dim, seed=size)
    out = attend(pool.decode_batch(), pool.q, pool.k_new, pool.v_new, scale=0.2, softcap=softcap)
    torch.testing.assert_close(out.double(), pool.by_loops(scale=0.2, softcap=softcap)[0], **CLOSE)


@BOTH
@pytest.mark.parametrize("size", SIZES)
def test_the_new_token_is_written_first_when_it_has_a_slot(attend, size):
    pool = Streams([size, [1, size]], kv_heads=2, group=3, head_dim=8, seed=size)
    slots = pool.new_slots()
    batch = pool.decode_batch(slots_BK=slots)
    out = attend(batch, pool.q, pool.k_new, pool.v_new, scale=0.2, softcap=None)
    pool.k.write(slots, pool.k_new), pool.v.write(slots, pool.v_new)
    torch.testing.assert_close(out.double(), pool.by_loops(scale=0.2, apart=False)[0], **CLOSE)
    assert torch.equal(batch.k_PND.view(torch.uint8), pool.k.codes.view(torch.uint8))
    assert torch.equal(batch.v_PND.view(torch.uint8), pool.v.codes.view(torch.uint8))


@BOTH
@pytest.mark.parametrize("softcap", SOFTCAP)
def test_a_reader_attends_without_bringing_anything(attend, softcap):
    pool = Streams([300, 5], kv_heads=3, group=2, head_dim=8)
    out = attend(pool.decode_batch(slots_BK=torch.zeros(2, 3).long()), pool.q, None, None, scale=0.2, softcap=softcap)
    torch.testing.assert_close(out.double(), pool.by_loops(scale=0.2, softcap=softcap, apart=False)[0], **CLOSE)
    out = attend(pool.decode_batch(), pool.q, None, None, scale=0.2, softcap=softcap)
    torch.testing.assert_close(out.double(), pool.by_loops(scale=0.2, softcap=softcap, apart=False)[0], **CLOSE)


@BOTH
@pytest.mark.parametrize("written", [True, False])
def test_dead_rows_give_zeros_and_write_nothing(attend, written):
    pool = Streams([40, 300, 1], kv_heads=2, group=2, head_dim=8)
    live, slots = torch.tensor([True, False, True]), None
    if written:
        slots = pool.new_slots()
        pool.length[1] -= 1
    batch = pool.decode_batch(slots_BK=slots, live_B=live, score_PN=pool.score.clone())
    out = attend(batch, pool.q, pool.k_new, pool.v_new, scale=0.2, softcap=None)
    if written:
        kept = slots[live]
        pool.k.write(kept, pool.k_new[live]), pool.v.write(kept, pool.v_new[live])
        assert torch.equal(batch.k_PND.isnan(), pool.k.codes.isnan())
    expected = pool.by_loops(scale=0.2, apart=not written, live=live)[0]
    assert not out[1].any()
    torch.testing.assert_close(out.double(), expected, **CLOSE)
    dead = [pool.slot_of[1, h, i] for h in range(2) for i in range(300)]
    assert torch.equal(batch.score_PN.view(-1)[dead], pool.score.view(-1)[dead])


@BOTH
def test_a_row_of_length_zero_alone_sees_its_new_token(attend):
    pool = Streams([0, [0, 70]], kv_heads=2, group=2, head_dim=8)
    out = attend(pool.decode_batch(), pool.q, pool.k_new, pool.v_new, scale=0.2, softcap=None)
    torch.testing.assert_close(out[0], pool.v_new[0].repeat_interleave(2, dim=0))
    torch.testing.assert_close(out.double(), pool.by_loops(scale=0.2)[0], **CLOSE)


@BOTH
@pytest.mark.parametrize("apart", [True, False])
def test_keys_older_than_the_window_are_not_seen(attend, apart):
    pool = Streams([[600, 300], [9, 260]], kv_heads=2, group=3, head_dim=8)
    oldest = torch.tensor([290, 4], dtype=torch.int32)
    batch = pool.decode_batch(oldest_B=oldest)
    new = (pool.k_new, pool.v_new) if apart else (None, None)
    out = attend(batch, pool.q, *new, scale=0.2, softcap=None)
    torch.testing.assert_close(out.double(), pool.by_loops(scale=0.2, apart=apart, oldest=oldest)[0], **CLOSE)


@BOTH
def test_hidden_keys_may_be_poisoned_whole_spans_long(attend):
    """600 slots, of which only the last few are seen: two spans of the compiled form hold nothing that counts."""
    pool = Streams([600], kv_heads=1, group=2, head_dim=8, slots=16)
    for i in range(600):
        pool.position.view(-1)[pool.slot_of[0, 0, i]] = i
    out = attend(
        pool.decode_batch(oldest_B=torch.tensor([595], dtype=torch.int32)), pool.q, None, None, scale=0.2, softcap=None
    )
    expected = pool.by_loops(scale=0.2, apart=False, oldest=[595])[0]
    torch.testing.assert_close(out.double(), expected, **CLOSE)
    nothing = attend(
        pool.decode_batch(oldest_B=torch.tensor([600], dtype=torch.int32)), pool.q, None, None, scale=0.2, softcap=None
    )
    assert not nothing.any(), "a query that sees nothing gives zeros"


@BOTH
@pytest.mark.parametrize("softcap", SOFTCAP)
@pytest.mark.parametrize("sizes", [[1, 63], [100, 257], [600, 16]])
def test_scores_grow_by_the_weight_received(attend, sizes, softcap):
    pool = Streams(sizes, kv_heads=2, group=3, head_dim=8)
    received = torch.full((2, 2, 1), 0.5)
    batch = pool.decode_batch(score_PN=pool.score.clone(), received_BKE=received)
    attend(batch, pool.q, pool.k_new, pool.v_new, scale=0.4, softcap=softcap)
    for (b, h), sums in pool.by_loops(scale=0.4, softcap=softcap)[1].items():
        slots = [pool.slot_of[b, h, i] for i in range(len(sums) - 1)]
        found = batch.score_PN.view(-1)[slots].double() - torch.arange(len(slots))
        torch.testing.assert_close(found, sums[:-1], atol=1e-4, rtol=1e-4)
        assert float(received[b, h, 0]) == pytest.approx(0.5 + float(sums[-1]), abs=1e-5)
    untouched = pool.score.isnan()
    assert torch.equal(batch.score_PN.isnan(), untouched), "a slot that is not stored was scored"


@BOTH
@pytest.mark.parametrize("softcap", SOFTCAP)
def test_received_has_a_column_a_slot_and_the_new_token_last(attend, softcap):
    pool = Streams([[3, 5], [600, 257]], kv_heads=2, group=3, head_dim=8)
    received = torch.full((2, 2, 610), 0.25)
    batch = pool.decode_batch(received_BKE=received, received_old=True)
    attend(batch, pool.q, pool.k_new, pool.v_new, scale=0.4, softcap=softcap)
    expected = torch.full((2, 2, 610), 0.25, dtype=torch.float64)
    for (b, h), sums in pool.by_loops(scale=0.4, softcap=softcap)[1].items():
        expected[b, h, : len(sums) - 1] += sums[:-1]
        expected[b, h, -1] += sums[-1]
    torch.testing.assert_close(received.double(), expected, atol=2e-5, rtol=1e-4)


@BOTH
def test_weights_of_one_query_sum_to_one_in_every_head(attend):
    pool = Streams([600, 1], kv_heads=2, group=4, head_dim=8)
    received = torch.zeros(2, 2, 601)
    attend(
        pool.decode_batch(received_BKE=received, received_old=True),
        pool.q,
        pool.k_new,
        pool.v_new,
        scale=1.0,
        softcap=None,
    )
    torch.testing.assert_close(received.sum(dim=-1), torch.full((2, 2), 4.0))


@BOTH
@pytest.mark.parametrize("head_dim", [8, 64])
@pytest.mark.parametrize("group", [2, 5])
def test_poison_in_a_stored_key_or_value_shows_in_the_output(attend, head_dim, group):
    """NaN must pass through: else the poison tests of the store would see nothing."""
    for size, place in ((5, 2), (600, 599), (600, 0), (257, 256)):
        for name in ("k", "v"):
            pool = Streams([size], kv_heads=1, group=group, head_dim=head_dim)
            getattr(pool, name).poison(pool.slot_of[0, 0, place])
            out = attend(pool.decode_batch(), pool.q, pool.k_new, pool.v_new, scale=0.02, softcap=None)
            assert out.isnan().all(), (size, place, name)


@pytest.mark.parametrize("head_dim", [8, 64])
def test_the_compiled_form_never_touches_values_that_are_too_old(head_dim):
    pool = Streams([600], kv_heads=1, group=3, head_dim=head_dim)
    expected = pool.by_loops(scale=0.1, oldest=[300])[0]
    for i in range(600):
        if pool.position.view(-1)[pool.slot_of[0, 0, i]] < 300:
            pool.v.poison(pool.slot_of[0, 0, i])
    oldest = torch.tensor([300], dtype=torch.int32)
    out = compiled(pool.decode_batch(oldest_B=oldest), pool.q, pool.k_new, pool.v_new, scale=0.1, softcap=None)
    torch.testing.assert_close(out.double(), expected, **CLOSE)


@BOTH
def test_logits_far_apart_do_not_overflow(attend):
    pool = Streams([300], kv_heads=1, group=2, head_dim=8)
    out = attend(pool.decode_batch(), pool.q * 1e4, pool.k_new, pool.v_new, scale=10.0, softcap=None)
    pool.q = pool.q * 1e4
    torch.testing.assert_close(out.double(), pool.by_loops(scale=10.0)[0], **CLOSE)


@pytest.mark.parametrize("slots", [1, 2, 4, 32])
def test_page_sizes(slots):
    pool = Streams([70, [257, 1]], kv_heads=2, group=2, head_dim=8, slots=slots)
    expected = pool.by_loops(scale=0.2)[0]
    for attend in (decode_attention, decode_reference):
        out = attend(pool.decode_batch(), pool.q, pool.k_new, pool.v_new, scale=0.2, softcap=None)
        torch.testing.assert_close(out.double(), expected, **CLOSE)


def test_queries_and_keys_that_lie_strided_are_read_right():
    pool = Streams([40, 3], kv_heads=2, group=2, head_dim=8)
    strided = [torch.cat((x, x), dim=-1)[..., :8].transpose(0, 1).contiguous().transpose(0, 1)
               for x in (pool.q, pool.k_new, pool.v_new)]  # fmt: skip
    out = decode_attention(pool.decode_batch(), *strided, scale=0.2, softcap=None)
    torch.testing.assert_close(out.double(), pool.by_loops(scale=0.2)[0], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_take_the_plain_form(dtype):
    pool = Streams([40, 3], kv_heads=2, group=2, head_dim=8)
    batch = pool.decode_batch()
    batch = dataclasses.replace(batch, k_PND=batch.k_PND.to(dtype), v_PND=batch.v_PND.to(dtype))
    out = decode_attention(batch, *(x.to(dtype) for x in (pool.q, pool.k_new, pool.v_new)), scale=0.2, softcap=None)
    assert out.dtype == dtype
    bound = {torch.float64: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(out.double(), pool.by_loops(scale=0.2)[0], atol=bound, rtol=bound)


@pytest.mark.parametrize("head_dim", [8, 32, 48, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7])
def test_compiled_and_plain_are_equal_with_everything_on(group, head_dim):
    """Dead rows, window, score and received at once, for every head dim and group that has code of its own, and others."""
    if native.library() is None:
        pytest.skip("no C compiler here, or KVFOLD_NATIVE=0: the compiled form can't be tested")
    for seed in range(2):
        lengths = [[seed * 190 + 75, 5], [17, 300], [0, 64]]
        pool = Streams(lengths, kv_heads=2, group=group, head_dim=head_dim, seed=seed, slots=(16, 4)[seed])
        pool.score.nan_to_num_(0.0)
        results = []
        for attend in (decode_attention, decode_reference):
            received = torch.zeros(3, 2, 302)
            batch = pool.decode_batch(
                score_PN=pool.score.clone(),
                received_BKE=received,
                received_old=True,
                live_B=torch.tensor([True, seed % 2 == 0, True]),
                oldest_B=torch.tensor([60 * seed, 3 * seed, 20], dtype=torch.int32),
            )
            scale = 1.0 / head_dim**0.5
            out = attend(batch, pool.q, pool.k_new, pool.v_new, scale=scale, softcap=SOFTCAP[seed % 2])
            results.append((out, batch.score_PN, received))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
        assert results[0][2].sum() > 0
