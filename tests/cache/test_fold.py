"""fold: the store however its calls are cut, the training form, and copies give what the slow reference gives: outputs, what is
kept, masses. With all weights zero it is eviction on the same grid, bit for bit.
"""

import random
from dataclasses import dataclass, replace

import pytest
import torch

from kvfold.cache.hf import FoldCache
from kvfold.cache.views import TrainingView
from kvfold.errors import UserError
from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import layout_bytes
from kvfold.methods.fold import BIAS, Fold
from kvfold.methods.registry import parse_time
from kvfold.ops.fold_reference import FoldRule, fold_attention_reference
from kvfold.ops.gating import STAY_NEVER, Gates
from store_driver import check_books

SCALE, CLOSE = 0.5, {"atol": 1e-4, "rtol": 1e-4}


@dataclass
class Text:
    """What a model would hand over for one owner's group: q of each layer, and k, v and gates of the owner."""

    q_LBTHD: torch.Tensor
    k_BTKD: torch.Tensor
    v_BTKD: torch.Tensor
    marked_BTK: torch.Tensor
    s_BTK: torch.Tensor
    heads_KP: torch.Tensor
    real_BT: torch.Tensor
    from_next: bool = False
    """Whether what is computed at a token marks the one before it."""

    def gates(self, part=slice(None)) -> Gates:
        alpha = self.marked_BTK[:, part].float()
        return Gates(
            alpha_BTK=alpha, log_stay_BTK=alpha * STAY_NEVER, outputs_BTKF=self.s_BTK[:, part].unsqueeze(-1),
            heads_KP=self.heads_KP, from_next=self.from_next,
        )  # fmt: skip


def draw(tokens, *, rows=1, layers=1, heads=2, group=2, dim=8, seed=0, share=0.6, pads=None) -> Text:
    """Keys and values lie around a few centres, so that many are alike."""
    source = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=source)

    k, v = (
        normal(rows, 4, heads, dim)[torch.arange(rows)[:, None], torch.randint(0, 4, (rows, tokens), generator=source)]
        + 0.5 * normal(rows, tokens, heads, dim)
        for _ in range(2)
    )
    pads = [0] * rows if pads is None else pads
    return Text(
        q_LBTHD=normal(layers, rows, tokens, heads * group, dim), k_BTKD=k, v_BTKD=v,
        marked_BTK=torch.rand((rows, tokens, heads), generator=source) < share, s_BTK=normal(rows, tokens, heads),
        heads_KP=normal(heads, 3) * torch.tensor([0.3, 1.0, 0.2]) + torch.tensor([0.0, 0.0, 1.0]),
        real_BT=torch.arange(tokens) >= torch.tensor(pads)[:, None],
    )  # fmt: skip


def layout_of(text: Text, time: str) -> KVLayout:
    layers, _, _, _, dim = text.q_LBTHD.shape
    return KVLayout.plain(layers, text.k_BTKD.shape[2], dim).with_owners([0] * layers).with_time(time)


def new_cache(text: Text, time: str, **options) -> FoldCache:
    given = {"rows": text.k_BTKD.shape[0], "dtype": torch.float32, "page_slots": 4, "poison": True}
    return FoldCache(layout_of(text, time), **(given | options))


def feed(cache, text: Text, start: int, stop: int):
    """Columns of the text as one call (several where the budget asks for it), [layers, B, T, H, D]."""
    outs, rows = [], text.k_BTKD.shape[0]
    for first, last in cache.pieces(None, num_rows=rows, num_tokens=stop - start):
        part = slice(start + first, start + last)
        real = None if bool(text.real_BT[:, part].all()) else text.real_BT[:, part]
        with cache.call(real, num_rows=rows, num_tokens=last - first, scale=SCALE) as view:
            outs.append(
                torch.stack([
                    view.attend(
                        layer, q[:, part], *((text.k_BTKD[:, part], text.v_BTKD[:, part]) if layer == 0 else (None, None)),
                        None, text.gates(part) if layer == 0 else None,
                    )
                    for layer, q in enumerate(text.q_LBTHD)
                ])
            )  # fmt: skip
        check_books(cache.store)
    return torch.cat(outs, dim=2)


def feed_cut(cache, text: Text, cuts):
    """The whole text; the last cut is repeated."""
    outs, start, cuts = [], 0, list(cuts)
    while start < text.k_BTKD.shape[1]:
        stop = min(start + (cuts.pop(0) if len(cuts) > 1 else cuts[0]), text.k_BTKD.shape[1])
        outs.append(feed(cache, text, start, stop))
        start = stop
    return torch.cat(outs, dim=2)


def reference(text: Text, method: Fold):
    """Outputs like those of `feed_cut`, and for each row what happened."""
    rule = FoldRule(
        delay=method.delay, grid=method.grid, threshold=method.threshold, reach=method.reach, as_stored=True
    )
    out, traces = torch.zeros_like(text.q_LBTHD), []
    for row, real in enumerate(text.real_BT):
        k, v, marked, s = (one[row, real][None] for one in (text.k_BTKD, text.v_BTKD, text.marked_BTK, text.s_BTK))
        if text.from_next:
            marked = torch.cat((marked[:, 1:], torch.zeros_like(marked[:, :1])), dim=1)
        own = k, v, marked, s
        for layer, q in enumerate(text.q_LBTHD):
            found, trace = fold_attention_reference(q[row, real][None], *own, rule, scale=SCALE, heads_KP=text.heads_KP)
            out[layer, row, real] = found[0]
        traces.append(trace)
    return out, traces


def held(cache, text):
    """Of each row and head: position -> mass, as the store has it."""
    group, place = cache.store.place_of[0]
    ids = group.ids(cache.store.index(cache.rows))[place]
    slot, filled = group.stored_slots(ids, int(group.length.max()))
    position, bias = (group.pool.arrays[name].view(-1)[slot] for name in ("position", BIAS))
    z = (bias.float() / text.heads_KP[:, 2, None]).exp()
    return [[dict(zip(p[f].tolist(), m[f].tolist(), strict=True)) for p, m, f in zip(*one, strict=True)]
            for one in zip(position, z, filled, strict=True)]  # fmt: skip


def expected(traces):
    """The same by the reference."""
    found = []
    for trace in traces:
        stays = trace.left_at[0] == trace.left_at.shape[-1]
        found.append([dict(zip(s.nonzero()[:, 0].tolist(), m[s].tolist(), strict=True))
                      for s, m in zip(stays, trace.mass[0], strict=True)])  # fmt: skip
    return found


def check_held(cache, text, traces):
    for ours, theirs in zip(
        *([one for row in rows for one in row] for rows in (held(cache, text), expected(traces))), strict=True
    ):
        assert ours.keys() == theirs.keys()
        assert all(abs(ours[one] - theirs[one]) <= 2e-3 * theirs[one] for one in theirs)


def drawn_case(seed):
    """Lengths, batches, groups, shared layers, cuts, pages, delays, grids."""
    rng = random.Random(seed)
    rows, tokens = rng.randint(1, 3), rng.randint(20, 75)
    pads = [rng.choice((0, 0, rng.randint(1, tokens - 2))) for _ in range(rows)]
    text = draw(
        tokens, rows=rows, layers=rng.randint(1, 3), heads=rng.randint(1, 3), group=rng.randint(1, 3), seed=seed,
        share=rng.choice((0.3, 0.6, 0.95)), pads=pads,
    )  # fmt: skip
    text.from_next = rng.random() < 0.3
    time = f"fold:{rng.randint(1, 20)}+{rng.randint(1, 17)}@{rng.choice((0.2, 0.4, 0.6))}"
    cuts = [rng.choice((1, 1, 3, 8, 30)) for _ in range(rng.randint(1, 12))] + [rng.choice((1, 7, tokens))]
    return text, time, cuts, rng.choice((1, 2, 4, 16))


@pytest.mark.parametrize("seed", range(16))
def test_the_store_is_the_reference_however_it_is_cut(seed, monkeypatch):
    text, time, cuts, slots = drawn_case(seed)
    if seed % 3 == 0:
        monkeypatch.setattr(Fold, "reach", 7)
    theirs, traces = reference(text, parse_time(time))
    cache = new_cache(text, time, page_slots=slots)
    ours = feed_cut(cache, text, cuts)
    real = text.real_BT.expand(ours.shape[:3])
    assert ours.isfinite().all()
    torch.testing.assert_close(ours[real], theirs[real], **CLOSE)
    check_held(cache, text, traces)


@pytest.mark.parametrize("seed", range(8))
def test_the_training_form_is_the_reference(seed):
    text, time, _, _ = drawn_case(seed)
    theirs, _ = reference(text, parse_time(time))
    view = TrainingView(layout_of(text, time), real_BT=None if text.real_BT.all() else text.real_BT, scale=SCALE)
    learned = [one.requires_grad_() for one in (text.s_BTK, text.heads_KP, text.k_BTKD, text.v_BTKD)]
    kv = (text.k_BTKD, text.v_BTKD)
    ours = torch.stack([
        view.attend(layer, q, *(kv if layer == 0 else (None, None)), None, text.gates() if layer == 0 else None)
        for layer, q in enumerate(text.q_LBTHD)
    ])  # fmt: skip
    real = text.real_BT.expand(ours.shape[:3])
    torch.testing.assert_close(ours[real], theirs[real].detach(), **CLOSE)
    for grad in torch.autograd.grad(ours[real].square().sum(), learned):
        assert grad.isfinite().all()


@pytest.mark.parametrize("c", [0.0, 1.5])
def test_gradients_are_those_of_the_reference(c):
    """The similarity in a weight counts as a constant."""
    text, method = draw(40, rows=2, seed=3), Fold(delay=6, grid=8, threshold=0.3)
    text.heads_KP[:, 1] = c
    grads = []
    for form in ("training", "reference"):
        learned = [text.s_BTK, text.heads_KP, text.k_BTKD, text.v_BTKD]
        text.s_BTK, text.heads_KP, text.k_BTKD, text.v_BTKD = (one.detach().clone().requires_grad_() for one in learned)
        if form == "training":
            view = TrainingView(layout_of(text, method.format()), real_BT=None, scale=SCALE)
            out = view.attend(0, text.q_LBTHD[0], text.k_BTKD, text.v_BTKD, None, text.gates())
        else:
            out = reference(text, method)[0][0]
        learned = [text.s_BTK, text.heads_KP, text.k_BTKD, text.v_BTKD]
        grads.append(torch.autograd.grad((out * text.q_LBTHD[0]).sum(), learned))
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.abs().max() > 0.01
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("bits", ["model", "int8,int4"])
def test_without_weight_it_is_eviction_on_the_grid_bit_for_bit(bits):
    text = draw(50, rows=2, pads=[0, 9], layers=2, seed=5)
    nothing = replace(text, heads_KP=text.heads_KP.clone())
    nothing.heads_KP[:, 0] = -torch.inf
    found = []
    for one, time in ((nothing, "fold:6+8@0.3"), (text, "fold:6+8@none"), (text, "fold:6+8@0.3")):
        cache = FoldCache(layout_of(one, time).with_bits(bits), rows=2, dtype=torch.float32, page_slots=4, poison=True)
        found.append((feed_cut(cache, one, [7, 1, 1, 1, 20, 1]), cache.kept_positions))
    (ours, kept), (theirs, also), (merged, same) = found
    assert torch.equal(ours, theirs)
    assert kept == also == same
    assert not torch.allclose(merged, theirs, atol=1e-3)


@pytest.mark.parametrize("bits", ["half", "fp8", "int8", "int8,int4"])
def test_what_is_stored_in_few_bits_depends_on_the_tokens_alone(bits):
    text, found = draw(60, seed=8), []
    for cuts in ([60], [1], [17, 1, 1, 1, 9]):
        layout, dtype = layout_of(text, "fold:6+8@0.3"), torch.bfloat16 if bits == "half" else torch.float32
        layout = layout if bits == "half" else layout.with_bits(bits)
        cache = FoldCache(layout, rows=1, dtype=dtype, page_slots=4, poison=True)
        found.append((feed_cut(cache, text, cuts), held(cache, text)))
    for out, masses in found[1:]:
        torch.testing.assert_close(out, found[0][0], **CLOSE)
        assert masses == found[0][1]


@pytest.mark.parametrize("from_next", [False, True])
def test_a_copy_goes_its_own_way(from_next):
    """Merging in one sequence never shows in the other, which shared its pages."""
    one, other, time = draw(60, seed=1), draw(60, seed=2), "fold:4+8@0.2"
    for name in ("k_BTKD", "v_BTKD", "marked_BTK", "s_BTK"):
        getattr(other, name)[:, :30] = getattr(one, name)[:, :30]
    one.from_next = other.from_next = from_next
    other.heads_KP, other.q_LBTHD[:, :, :30] = one.heads_KP, one.q_LBTHD[:, :, :30]
    cache = new_cache(one, time)
    feed(cache, one, 0, 30)
    twin = cache.copy()
    outs = {id(one): [], id(other): []}
    for start in range(30, 60, 3):
        for text, of in ((one, cache), (other, twin)):
            outs[id(text)].append(feed(of, text, start, start + (3 if start % 2 else 1)))
            if not start % 2:
                outs[id(text)].append(feed(of, text, start + 1, start + 3))
    for text, of in ((one, cache), (other, twin)):
        theirs, traces = reference(text, parse_time(time))
        torch.testing.assert_close(torch.cat(outs[id(text)], dim=2), theirs[:, :, 30:], **CLOSE)
        check_held(of, text, traces)


def test_what_is_planned_is_allocated():
    """Of gates that never mark at every length; of gates that do, what stays, pages rounded up for each head."""
    text, time = draw(70, rows=1, share=0.0), "fold:6+8"
    cache, layout = new_cache(text, time), layout_of(text, time)
    for start, stop in ((0, 1), (1, 2), (2, 40), (40, 41), (41, 70)):
        feed(cache, text, start, stop)
        assert cache.allocated_bytes == layout_bytes(layout, [stop], 4, 4)
    method = layout.time_of(0)
    for text in (draw(70, share=2.0), draw(70, share=0.5, seed=4)):
        cache = new_cache(text, time, page_slots=1)
        for stop in range(1, 71):
            feed(cache, text, stop - 1, stop)
            kept = cache.kept_tokens
            assert int(kept.min()) >= method.always_kept(stop)
            assert int(kept.min()) == method.always_kept(stop) or float(text.marked_BTK.float().mean()) < 1
            each = layout_bytes(layout, [0], 4, 1), layout_bytes(layout, [1], 4, 1)
            assert cache.allocated_bytes == each[0] + int(kept.sum()) * (each[1] - each[0]) // 2
    assert int(kept.sum()) < 120
    least = [method.always_kept(seen) for seen in range(1, 71)]
    assert max(least) == method.expected_kept(70, 70.0) == 6 + 8
    assert method.expected_kept(70, 2.0) == 35
    usage = cache.usage
    assert usage.total == cache.allocated_bytes
    position = torch.tensor([[one in held(cache, text)[0][head] for one in range(70)] for head in range(2)])
    waiting = int((position & text.marked_BTK[0].T).sum())
    assert waiting > 0
    assert usage.waiting == waiting * cache.store.pools[0].slot_bytes
    # k, v, position, and what fold adds: s, the bias and the mark.
    assert cache.store.pools[0].slot_bytes == 2 * 4 * 8 + 4 + 2 + 2 + 1


def test_within_a_budget():
    text, time = draw(120, share=0.9, seed=6), "fold:6+8@0.3"
    cache = new_cache(text, time, memory_bytes=layout_bytes(layout_of(text, time), [48], 4, 4))
    theirs, traces = reference(text, parse_time(time))
    torch.testing.assert_close(feed_cut(cache, text, [100, 1]), theirs, **CLOSE)
    check_held(cache, text, traces)


def test_text_forms_and_what_is_refused():
    assert parse_time("fold") == parse_time("fold:256") == Fold(delay=256)
    for text in ("fold:64", "fold:64+16@0.5", "fold:64+16@none"):
        assert parse_time(text).format() == text
        assert parse_time(parse_time(text).format()) == parse_time(text)
    for text in ("fold:0", "fold:8+0", "fold:x", "fold:8+8@2", "fold:8+8@y"):
        with pytest.raises(UserError, match="write e.g."):
            parse_time(text)
    layout = KVLayout.plain(2, 2, 8, [None, 16])
    assert layout.with_time("fold:8").time_text() == "fold:8"
    with pytest.raises(UserError, match="sliding window of 16"):
        layout.with_time("fold:8; 1=fold:8")
