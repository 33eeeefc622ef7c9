"""What drops nothing, or decides by the tokens alone, gives the same however the text is cut: dense form, store and
transformers' own cache agree.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from kvfold.cache.views import TrainingView
from kvfold.layout.kvlayout import KVLayout
from kvfold.ops.rotation import Rotation
from store_driver import SCALE, Draw, assert_real_close, draw, face_of, feed, feed_cut, new_cache, shared, with_sizes

CUTS = [[40], [1], [13, 1, 1, 20, 5], [30, 1]]
PREFIX = ["full", "window:6+2", "window:1+0", "window:25%+3", "window:100+4"]


def dense(layout, text: Draw, softcap=None):
    view = TrainingView(layout, real_BT=text.real, scale=SCALE, softcap=softcap)
    return [
        view.attend(layer, text.q[layer], *((text.k[layer], text.v[layer]) if layout.is_owner(layer) else (None, None)),
                    text.rotation)
        for layer in range(layout.num_layers)
    ]  # fmt: skip


@pytest.mark.parametrize("time", PREFIX)
@pytest.mark.parametrize(("pads", "softcap"), [(None, None), ([0, 7, 33], None), ([0, 7, 33], 2.0)], ids=str)
def test_cuts_change_nothing(time, pads, softcap):
    layout = shared([0, 0]).with_time(time)
    text = draw(layout, 40, rows=3, pads=pads)
    expected = dense(layout, text, softcap)
    kept = set()
    for cuts in CUTS:
        cache = new_cache(layout, 3)
        assert_real_close(feed_cut(cache, text, cuts, softcap=softcap), expected, text.real)
        kept.add(str(cache.kept_positions))
    assert len(kept) == 1


@pytest.mark.parametrize("window", [1, 5, 39, 40, 64])
def test_an_architecture_window(window):
    layout = KVLayout.plain(3, 2, 8, windows=(window, None, window))
    text = draw(layout, 40, rows=2, pads=[0, 7])
    for cuts in CUTS:
        cache = new_cache(layout, 2)
        assert_real_close(feed_cut(cache, text, cuts), dense(layout, text), text.real)
        assert cache.kept_tokens[0, :, 0].tolist() == [min(40, window), min(33, window)]


@pytest.mark.parametrize("time", ["window:9+2", "window:25%+1", "window:4+0"])
def test_a_window_on_top_of_an_architecture_window(time):
    """A query sees the intersection; the policy's window says what is stored."""
    layout = KVLayout.plain(2, 2, 8, windows=(6, None)).with_time(f"full; 0={time}")
    text = draw(layout, 40, rows=2, pads=[0, 7])
    for cuts in CUTS:
        assert_real_close(feed_cut(new_cache(layout, 2), text, cuts), dense(layout, text), text.real)


@pytest.mark.parametrize(
    "time", ["h2o:32+32", "tova:64", "window:64+0", "window:38+2", "h2o:39+1", "tova:40", "h2o:100%+1"]
)
def test_a_budget_as_long_as_the_text_equals_full(time):
    layout = shared([0, 0])
    text = draw(layout, 40, rows=2, pads=[0, 7])
    expected = dense(layout, text)
    for cuts in CUTS:
        cache = new_cache(layout.with_time(time), 2)
        assert_real_close(feed_cut(cache, text, cuts), expected, text.real)
        assert cache.kept_tokens.tolist() == [[[40] * 2, [33] * 2]]


def with_dynamic_cache(layout, text: Draw, cuts):
    """Attention over what transformers' cache hands back, masked by columns."""
    cache, outs, start = DynamicCache(), [[] for _ in text.q], 0
    real = torch.ones(text.rows, text.columns, dtype=torch.bool) if text.real is None else text.real
    for size in cuts:
        stop = start + size
        seen = (torch.arange(stop) <= torch.arange(start, stop)[:, None]) & real[:, None, :stop]
        seen = seen | torch.eye(stop, dtype=torch.bool)[start:stop]
        for layer in range(layout.num_layers):
            new = (x[layer][:, start:stop].transpose(1, 2) for x in (text.k, text.v))
            k, v = cache.update(*new, layer)
            q = text.q[layer][:, start:stop].transpose(1, 2)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=SCALE, enable_gqa=True)
            outs[layer].append(out.transpose(1, 2))
        start = stop
    return [torch.cat(out, dim=1) for out in outs]


@pytest.mark.parametrize("pads", [None, [0, 5, 11]], ids=str)
@pytest.mark.parametrize("group", [1, 3])
def test_full_equals_transformers_own_cache(pads, group):
    layout = KVLayout.plain(3, 2, 8)
    text = draw(layout, 26, rows=3, pads=pads, group=group)
    cuts = [12, 1, 1, 1, 6, 1, 4]
    for page_slots in (1, 4, 16):
        cache = new_cache(layout, 3, page_slots=page_slots)
        assert_real_close(feed_cut(cache, text, cuts), with_dynamic_cache(layout, text, cuts), text.real)
        assert cache.get_seq_length() == 26 and cache.get_mask_sizes(3) == (29, 0)


def test_a_ragged_batch_equals_each_row_alone():
    layout = shared([0, 0, 2]).with_time("full; 2=window:5+1")
    text = draw(layout, 30, rows=3, pads=[0, 4, 21])
    together = feed_cut(new_cache(layout, 3), text, [9, 1, 12, 1])
    for row, pad in enumerate([0, 4, 21]):
        one = text.part(slice(pad, None), slice(row, row + 1))
        one.real = None
        alone = feed_cut(new_cache(layout, 1), one, [7, 1])
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[row, pad:], theirs[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("time", ["h2o:4+4", "tova:6", "h2o:25%+25%", "tova:25%"])
def test_a_ragged_batch_under_a_steps_method_equals_each_row_alone_in_the_same_calls(time):
    layout = shared([0, 0, 2]).with_time(time)
    text, cuts = draw(layout, 30, rows=3, pads=[0, 4, 21]), [9, 1, 12, 1]
    batch = new_cache(layout, 3)
    together = feed_cut(batch, text, cuts)
    for row in range(3):
        single = new_cache(layout, 1)
        alone = feed_cut(single, text.part(rows=slice(row, row + 1)), cuts)
        assert [owner[row] for owner in batch.kept_positions] == [owner[0] for owner in single.kept_positions]
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[row][text.real[row]], theirs[0][text.real[row]], atol=2e-5, rtol=1e-4)


def test_rows_batched_anew_in_every_call_equal_each_alone():
    """Continuous batching: who stands beside whom, and in which order, does not matter."""
    layout = shared([0, 0, 2]).with_time("h2o:4+4; 2=full")
    text = draw(layout, 24, rows=4)
    alone = [feed_cut(new_cache(layout), text.part(rows=slice(row, row + 1)), [1]) for row in range(4)]
    cache, fed = new_cache(layout, 4), [0] * 4
    for rows in ([2], [0, 2], [3, 1], [1, 2, 0, 3], [3, 0]) * 4:
        q, k, v = ([torch.stack([x[row, fed[row]] for row in rows])[:, None] for x in group]
                   for group in (text.q, text.k, text.v))  # fmt: skip
        for layer, out in enumerate(feed(face_of(cache, rows), Draw(q, k, v))):
            for number, row in enumerate(rows):
                torch.testing.assert_close(out[number, 0], alone[row][layer][0, fed[row]], atol=2e-5, rtol=1e-4)
        for row in rows:
            fed[row] += 1
    assert cache.seen_tokens.tolist() == fed


def test_position_ids_rule_the_rotation_alone():
    layout = shared([0, 0]).with_time("window:6+2")
    text = draw(layout, 20)
    turn = (torch.arange(20).flip(0) * 3.0)[None, :, None] * torch.tensor([1.0, 0.1, 0.02, 0.003] * 2)
    text.rotation = Rotation(cos_BTR=turn.cos(), sin_BTR=turn.sin())
    for cuts in CUTS:
        cache = new_cache(layout)
        assert_real_close(feed_cut(cache, text, cuts), dense(layout, text), None)
        assert cache.kept_positions[0][0][0] == [0, 1, *range(14, 20)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    layout = with_sizes(KVLayout.plain(2, 2, 8), [(2, 8), (1, 16)]).with_time("window:6+2; 1=full")
    text = draw(layout, 20, rows=2, pads=[0, 5])
    expected = dense(layout, text)
    cast = Draw(*([x.to(dtype) for x in group] for group in (text.q, text.k, text.v)), text.real)
    bound = {torch.float64: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    for cuts in ([20], [1], [7, 1]):
        ours = feed_cut(new_cache(layout, 2, dtype=dtype), cast, cuts)
        assert {x.dtype for x in ours} == {dtype}
        assert_real_close(ours, expected, text.real, atol=bound, rtol=bound)


@given(
    time=st.sampled_from(PREFIX), columns=st.integers(1, 24), pads=st.none() | st.tuples(*[st.integers(0, 24)] * 2),
    cuts=st.lists(st.integers(1, 12), min_size=1, max_size=6), page_slots=st.sampled_from([1, 2, 4, 16]),
    window=st.none() | st.integers(1, 9), seed=st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=20)
def test_cut_anywhere(time, columns, pads, cuts, page_slots, window, seed):
    layout = KVLayout.plain(2, 2, 4, windows=(window, None)).with_time(f"{time}; 0={time}")
    text = draw(layout, columns, rows=2, pads=pads and [min(pad, columns) for pad in pads], seed=seed)
    cache = new_cache(layout, 2, page_slots=page_slots)
    assert_real_close(feed_cut(cache, text, cuts), dense(layout, text), text.real)


def test_gradients_flow_through_the_dense_view_to_owner_and_readers():
    """A group's k and v receive the sum of what owner and readers send back."""
    layout = shared([0, 0])
    text = draw(layout, 9)
    k = text.k[0].requires_grad_()
    (whole,) = torch.autograd.grad(sum(out.square().sum() for out in dense(layout, text)), k)
    (first,) = torch.autograd.grad(dense(layout, text)[0].square().sum(), k)
    (second,) = torch.autograd.grad(dense(layout, text)[1].square().sum(), k)
    torch.testing.assert_close(whole, first + second)
    assert first.abs().sum() > 0 and second.abs().sum() > 0
