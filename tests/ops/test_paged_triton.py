"""The Triton kernels of decode attention against loops over single entries and against the plain form.

Where a GPU is at hand they run on it; else Triton's interpreter runs them on the CPU: slowly, hence few entries in tiny
tiles, but from the same source.
"""

import dataclasses
import importlib.util
import os

import numpy as np
import pytest
import torch

from kvfold.ops.paged import decode_reference
from paged_pools import Streams

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: its kernels can't be tested", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined, so before the import below

from kvfold.ops.paged_triton import Tiling, decode_triton, fits, plan_launches, tiling  # noqa: E402

CLOSE = {
    torch.float32: {"atol": 2e-5, "rtol": 1e-5},
    # Weights, and what int8 stands for, are rounded to q's dtype before they are multiplied; so is the output.
    torch.float16: {"atol": 3e-3, "rtol": 2e-3},
    torch.bfloat16: {"atol": 2e-2, "rtol": 1e-2},
}
MODEL, INT8 = ("model", "model"), ("int8", "int8")
SMALL = Tiling(tile=16, warps=4, stages=2, span_slots=32)
"""Many tiles and spans out of few entries."""


@pytest.fixture
def bf16_products(monkeypatch):
    """Triton's interpreter multiplies the bits of bf16 numbers: here it multiplies the numbers."""
    if DEVICE == "cuda":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    interpreted = InterpreterBuilder.create_dot

    def numbers(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: interpreted(self, numbers(a), numbers(b), *rest)
    )


def on_triton(batch, *qkv, tiled=SMALL, **kwargs):
    """`decode_triton` on the device at hand; what it wrote is copied back into `batch`."""
    names = [field.name for field in dataclasses.fields(batch)]
    tensors = {name: getattr(batch, name) for name in names if isinstance(getattr(batch, name), torch.Tensor)}
    moved = dataclasses.replace(batch, **{name: x.to(DEVICE, copy=True) for name, x in tensors.items()})
    assert fits(moved, qkv[0])
    kwargs = {"scale": 0.3, "softcap": None, "tiled": tiled} | kwargs
    out = decode_triton(moved, *(None if x is None else x.to(DEVICE) for x in qkv), **kwargs)
    for name, x in tensors.items():
        x.copy_(getattr(moved, name))
    return out.cpu()


@pytest.mark.parametrize(
    ("lengths", "group", "head_dim", "slots", "dtype", "storage", "softcap"),
    [
        ([[1, 63], [100, 17]], 1, 64, 16, torch.float32, MODEL, None),
        ([[33, 0], [32, 70]], 3, 80, 32, torch.float16, MODEL, 3.0),
        ([[100, 2]], 16, 96, 16, torch.float32, INT8, 3.0),
        ([[63, 1]], 4, 128, 16, torch.float16, INT8, None),
        ([[31, 64]], 8, 256, 32, torch.float16, ("model", "int8"), None),
        ([[65, 16]], 2, 40, 4, torch.float32, ("int8", "model"), 3.0),
        ([[40]], 33, 32, 1, torch.float32, MODEL, None),
        ([[70, 5]], 4, 64, 16, torch.bfloat16, MODEL, None),
        ([[33, 16]], 1, 128, 16, torch.bfloat16, INT8, 3.0),
    ],
)
@pytest.mark.usefixtures("bf16_products")
def test_output_and_weights_equal_loops(lengths, group, head_dim, slots, dtype, storage, softcap):
    """A biased cache whose stored keys are scored, with the new token apart."""
    pool = Streams(
        lengths, kv_heads=len(lengths[0]), group=group, head_dim=head_dim, slots=slots, dtype=dtype, storage=storage
    )
    received = torch.full((*pool.length.shape, 110), 0.25)
    batch = pool.decode_batch(score_PN=pool.score.clone(), bias_PN=pool.bias, received_BKE=received, received_old=True)
    out = on_triton(batch, pool.q, pool.k_new, pool.v_new, softcap=softcap)
    expected, weights = pool.by_loops(scale=0.3, softcap=softcap, biased=True)
    torch.testing.assert_close(out.double(), expected, **CLOSE[dtype])
    # Products of 16-bit numbers are exact; what int8 stands for is rounded.
    exact = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2 if storage == INT8 else 1e-4}
    columns = torch.full(received.shape, 0.25, dtype=torch.float64)
    for (b, h), sums in weights.items():
        columns[b, h, : len(sums) - 1] += sums[:-1]
        columns[b, h, -1] += sums[-1]
        places = [pool.slot_of[b, h, i] for i in range(len(sums) - 1)]
        scored = batch.score_PN.view(-1)[places].double() - torch.arange(len(places))
        torch.testing.assert_close(scored, sums[:-1], atol=1e-4, rtol=exact[dtype])
    torch.testing.assert_close(received.double(), columns, atol=1e-4, rtol=exact[dtype])
    assert torch.equal(batch.score_PN.isnan(), pool.score.isnan()), "a slot that is not stored was scored"


@pytest.mark.parametrize("storage", [MODEL, INT8, ("model", "int8")])
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 80), (torch.float16, 64)])
def test_the_new_token_is_written_first_and_exactly_as_the_plain_form_writes_it(storage, dtype, head_dim):
    pool = Streams([[16, 40], [31, 64], [3, 3]], kv_heads=2, group=2, head_dim=head_dim, dtype=dtype, storage=storage)
    pool.k_new[0, 0, :32] = 0  # its scale is zero
    pool.v_new[1, 1, 3] = torch.nan
    slots = pool.new_slots()
    slots[2, 0] = -1
    pool.length[2, 0] -= 1
    ours, theirs = (
        pool.decode_batch(slots_BK=slots, received_BKE=torch.zeros(3, 2, 70), received_old=True) for _ in "ab"
    )
    out = on_triton(ours, pool.q, pool.k_new, pool.v_new)
    expected = decode_reference(theirs, pool.q, pool.k_new, pool.v_new, scale=0.3, softcap=None)
    torch.testing.assert_close(out, expected, equal_nan=True, **CLOSE[dtype])
    torch.testing.assert_close(ours.received_BKE, theirs.received_BKE, atol=1e-3, rtol=1e-3)
    for name in ("k_PND", "v_PND", "k_scale_PNS", "v_scale_PNS"):
        if getattr(theirs, name) is not None:
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=0, rtol=0, equal_nan=True)


def test_the_new_token_may_take_any_slot_of_its_stream():
    pool = Streams([[70, 40]], kv_heads=2, group=2, head_dim=32)
    slots = torch.tensor([[pool.slot_of[0, 0, 5], pool.slot_of[0, 1, 33]]])
    batch = pool.decode_batch(slots_BK=slots)
    out = on_triton(batch, pool.q, pool.k_new, pool.v_new)
    pool.k.write(slots, pool.k_new)
    pool.v.write(slots, pool.v_new)
    torch.testing.assert_close(out.double(), pool.by_loops(scale=0.3, apart=False)[0], **CLOSE[torch.float32])


@pytest.mark.parametrize("given_slots", [True, False])
def test_a_reader_attends_without_bringing_anything(given_slots):
    pool = Streams([[40, 5]], kv_heads=2, group=2, head_dim=32)
    slots = torch.zeros(1, 2, dtype=torch.int64) if given_slots else None
    batch = pool.decode_batch(slots_BK=slots, received_BKE=torch.zeros(1, 2, 1))
    out = on_triton(batch, pool.q, None, None)
    torch.testing.assert_close(out.double(), pool.by_loops(scale=0.3, apart=False)[0], **CLOSE[torch.float32])
    assert not batch.received_BKE.any(), "there is no new token"


@pytest.mark.parametrize("written", [True, False])
def test_dead_sequences_give_zeros_and_write_nothing(written):
    pool = Streams([9, 40, 1], kv_heads=2, group=2, head_dim=32)
    live, slots, room = torch.tensor([True, False, True]), None, pool.length.clone()
    if written:
        slots = pool.new_slots()  # even where a slot is named for the dead sequence
        pool.length[1] = room[1]
    received = torch.zeros(3, 2, 60)
    batch = pool.decode_batch(
        slots_BK=slots, live_B=live, score_PN=pool.score.nan_to_num(), received_BKE=received, received_old=True
    )
    out = on_triton(batch, pool.q, pool.k_new, pool.v_new)
    if written:
        for pages, new in ((pool.k, pool.k_new), (pool.v, pool.v_new)):
            pages.write(slots[live], new[live])
        torch.testing.assert_close(batch.k_PND, pool.k.codes, atol=0, rtol=0, equal_nan=True)
    expected = pool.by_loops(scale=0.3, apart=not written, live=live)[0]
    assert not out[1].any() and not received[1].any()
    torch.testing.assert_close(out.double(), expected, **CLOSE[torch.float32])
    dead = [pool.slot_of[1, h, i] for h in range(2) for i in range(40)]
    assert torch.equal(batch.score_PN.view(-1)[dead], pool.score.view(-1)[dead])


def test_streams_without_entries_see_their_new_token_or_nothing():
    pool = Streams([[0, 0], [0, 20]], kv_heads=2, group=2, head_dim=32)
    received = torch.zeros(2, 2, 1)
    out = on_triton(pool.decode_batch(received_BKE=received), pool.q, pool.k_new, pool.v_new)
    torch.testing.assert_close(out[0], pool.v_new[0].repeat_interleave(2, dim=0))
    torch.testing.assert_close(received[0, :, 0], torch.full((2,), 2.0))
    out = on_triton(pool.decode_batch(score_PN=pool.score.clone()), pool.q, None, None)
    assert not out[0].any(), "a query that sees nothing gives zeros"
    empty = Streams([0], kv_heads=2, group=2, head_dim=32)
    out = on_triton(empty.decode_batch(), empty.q, empty.k_new, empty.v_new)
    torch.testing.assert_close(out, empty.v_new.repeat_interleave(2, dim=1))
    assert not on_triton(empty.decode_batch(), empty.q, None, None).any()


@pytest.mark.parametrize("apart", [True, False])
def test_keys_older_than_the_window_are_not_seen_and_their_poison_does_not_spread(apart):
    pool = Streams([[100, 40], [9, 36]], kv_heads=2, group=3, head_dim=32)
    oldest = torch.tensor([90, 4], dtype=torch.int32)
    # The first spans of the longest stream hold nothing that is seen.
    pool.position.view(-1)[[pool.slot_of[0, 0, i] for i in range(100)]] = torch.arange(100, dtype=torch.int32)
    new = (pool.k_new, pool.v_new) if apart else (None, None)
    expected = pool.by_loops(scale=0.3, apart=apart, oldest=oldest)[0]
    for (b, _, _), slot in pool.slot_of.items():
        if pool.position.view(-1)[slot] < oldest[b]:
            pool.k.poison([slot])
            pool.v.poison([slot])
    batch = pool.decode_batch(oldest_B=oldest, score_PN=pool.score.clone())
    out = on_triton(batch, pool.q, *new)
    torch.testing.assert_close(out.double(), expected, **CLOSE[torch.float32])
    hidden = pool.slot_of[0, 0, 3]
    assert batch.score_PN.view(-1)[hidden] == 3


@pytest.mark.parametrize("storage", [MODEL, INT8])
@pytest.mark.parametrize(("size", "place"), [(5, 2), (70, 69), (70, 0)])
def test_poison_in_a_stored_key_or_value_shows_in_the_output(size, place, storage):
    """NaN must pass through: else the poison tests of the store would see nothing."""
    for name in ("k", "v"):
        pool = Streams([size], kv_heads=1, group=2, head_dim=32, storage=storage)
        getattr(pool, name).poison([pool.slot_of[0, 0, place]])
        out = on_triton(pool.decode_batch(), pool.q, pool.k_new, pool.v_new, scale=0.02)
        assert out.isnan().all(), name


def test_logits_far_apart_do_not_overflow():
    pool = Streams([70], kv_heads=1, group=2, head_dim=32)
    pool.q = pool.q * 1e4
    out = on_triton(pool.decode_batch(), pool.q, pool.k_new, pool.v_new, scale=10.0)
    torch.testing.assert_close(out.double(), pool.by_loops(scale=10.0)[0], **CLOSE[torch.float32])


def test_the_default_tiling_and_an_upper_bound_too_high():
    pool = Streams([[1, 300]], kv_heads=2, group=2, head_dim=64)
    batch = pool.decode_batch(max_length=700, score_PN=pool.score.clone())
    out = on_triton(batch, pool.q, pool.k_new, pool.v_new, tiled=None)
    torch.testing.assert_close(out.double(), pool.by_loops(scale=0.3)[0], **CLOSE[torch.float32])


def test_pages_of_another_dtype_than_the_query_and_strided_queries():
    pool = Streams([[20, 33]], kv_heads=2, group=2, head_dim=32, dtype=torch.bfloat16)
    expected = pool.by_loops(scale=0.3)[0]
    strided = [torch.cat((x, x), dim=-1)[..., :32].float() for x in (pool.q, pool.k_new, pool.v_new)]
    out = on_triton(pool.decode_batch(), *(x.mT.contiguous().mT for x in strided))
    torch.testing.assert_close(out.double(), expected, **CLOSE[torch.float32])


def test_no_sequences():
    pool = Streams([], kv_heads=2, group=2, head_dim=32)
    assert on_triton(pool.decode_batch(), pool.q, pool.k_new, pool.v_new).shape == (0, 4, 32)


def test_the_host_is_asked_nothing():
    """Tensors of the meta device have no values: whoever asks for one fails."""
    pool = Streams([[20, 33]], kv_heads=2, group=2, head_dim=32)
    batch = pool.decode_batch(
        slots_BK=pool.new_slots(), live_B=torch.ones(1, dtype=torch.bool), score_PN=pool.score,
        oldest_B=torch.zeros(1, dtype=torch.int32), received_BKE=torch.zeros(1, 2, 40), received_old=True,
    )  # fmt: skip
    names = [field.name for field in dataclasses.fields(batch)]
    tensors = {name: getattr(batch, name) for name in names if isinstance(getattr(batch, name), torch.Tensor)}
    batch = dataclasses.replace(batch, **{name: x.to("meta") for name, x in tensors.items()})
    out, launches = plan_launches(
        batch, *(x.to("meta") for x in (pool.q, pool.k_new, pool.v_new)), scale=1, softcap=None
    )
    assert out.shape == pool.q.shape
    assert [launch.grid for launch in launches] == [(2, 1), (4,), (2, 1)]


def test_calls_that_the_kernels_do_not_know_are_left_to_the_plain_form():
    for storage in ("fp8", "int4"):
        pool = Streams([3], kv_heads=1, group=2, head_dim=32, storage=(storage, "model"))
        assert not fits(pool.decode_batch(), pool.q)
    pool = Streams([3], kv_heads=1, group=2, head_dim=32, slots=12)
    assert not fits(pool.decode_batch(), pool.q)
    pool = Streams([3], kv_heads=1, group=2, head_dim=288)
    assert not fits(pool.decode_batch(), pool.q)


@pytest.mark.parametrize("streams", [1, 32, 4096])
@pytest.mark.parametrize("length", [1, 100, 4096, 1 << 17, 1 << 24])
@pytest.mark.parametrize(("head_dim", "itemsize"), [(64, 1), (128, 2), (256, 2), (128, 4)])
def test_tilings_bound_the_scratch_memory(streams, length, head_dim, itemsize):
    given = tiling(head_dim, itemsize, streams, length, 132)
    spans = -(-length // given.span_slots)
    assert given.span_slots % given.tile == 0
    assert spans <= 65535 and (spans == 1 or streams * spans <= 1 << 16)
