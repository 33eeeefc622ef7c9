"""DMC's partial sums against a loop over tokens, against frozen numbers, and cut into calls."""

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dmc_golden
from kvfold.ops.gating import open_entries, pooled, pooled_reference, real_first, reordered

WINDOWS = [1, 3, 12, None]
windows = st.sampled_from([*WINDOWS, 2, 40])


def draw(batch, tokens, kv_heads=2, width=4, hard=False, seed=0, dtype=torch.float64):
    """x, weight and alpha, ready for gradients."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, kv_heads, width, generator=g, dtype=dtype)
    weight = torch.rand(batch, tokens, kv_heads, generator=g, dtype=dtype) + 0.01
    alpha = torch.rand(batch, tokens, kv_heads, generator=g, dtype=dtype)
    alpha = (alpha < 0.8).to(dtype) if hard else alpha
    return [one.requires_grad_() for one in (x, weight, alpha)]


def draw_past(batch, held, empty, kv_heads=2, width=4, seed=1):
    """Weighted sums and weights, the oldest `empty` of them holding nothing."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(batch, held, kv_heads, generator=g, dtype=torch.float64) + 0.01
    weights[:, :empty] = 0
    x = torch.randn(batch, held, kv_heads, width, generator=g, dtype=torch.float64)
    return [(x * weights[..., None]).requires_grad_(), weights.requires_grad_()]


def compare_with_gradients(inputs, ours, theirs, **tolerance):
    torch.testing.assert_close(ours, theirs, **tolerance)
    weigh = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5), dtype=ours.dtype)
    found = torch.autograd.grad(ours, inputs, weigh, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(theirs, inputs, weigh, allow_unused=True, materialize_grads=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 45),
    window=windows,
    hard=st.booleans(),
    held=st.integers(0, 14),
    empty=st.integers(0, 14),
    seed=st.integers(0, 99),
)
def test_pooling_equals_the_loop(tokens, window, hard, held, empty, seed):
    inputs, past = draw(2, tokens, hard=hard, seed=seed), None
    if held:
        past = draw_past(2, held if window else 1, min(empty, held), seed=seed)
    ours, theirs = (form(*inputs, window, past) for form in (pooled, pooled_reference))
    compare_with_gradients([*inputs, *(past or [])], ours, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("window", WINDOWS)
def test_gradients_by_differences(window):
    inputs, past = draw(1, 6, kv_heads=1, width=2), draw_past(1, 3, 1, kv_heads=1, width=2)
    assert torch.autograd.gradcheck(lambda x, w, a, *p: pooled(x, w, a, window, p), (*inputs, *past))


@pytest.mark.parametrize("window", WINDOWS)
def test_a_token_that_appends_stands_alone_and_hides_what_was_before(window):
    x, weight, alpha = draw(1, 40, hard=True)
    found = pooled(x, weight, alpha, window)
    alone = alpha == 0
    torch.testing.assert_close(found[alone], x[alone], atol=1e-12, rtol=0)
    spoiled = x.detach().clone()
    spoiled[:, :20] = 1e6
    alpha = alpha.detach().clone()
    alpha[:, 20] = 0
    assert torch.equal(pooled(spoiled, weight, alpha, window)[:, 20:], pooled(x, weight, alpha, window)[:, 20:])


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(2, 40), cuts=st.sets(st.integers(1, 39)), window=windows, seed=st.integers(0, 99))
def test_cut_into_calls(tokens, cuts, window, seed):
    inputs = [one.detach() for one in draw(2, tokens, hard=True, seed=seed)]
    whole, parts, past = pooled(*inputs, window), [], None
    borders = [0, *sorted(cut for cut in cuts if cut < tokens), tokens]
    for start, stop in pairwise(borders):
        call = [one[:, start:stop] for one in inputs]
        parts.append(pooled(*call, window, past))
        past = open_entries(*call, window, past)
        assert past[0].dtype == past[1].dtype == torch.float32 and past[1].shape[1] == (window or 1)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 30), window=windows, held=st.booleans(), seed=st.integers(0, 99))
def test_padding_anywhere_when_it_is_put_behind(tokens, window, held, seed):
    inputs = [one.detach() for one in draw(2, tokens, hard=True, seed=seed)]
    past = [one.detach().float() for one in draw_past(2, window or 1, 0, seed=seed)] if held else None
    real = torch.rand(2, tokens, generator=torch.Generator().manual_seed(seed)) < 0.6
    order, back = real_first(real)
    moved, length = [reordered(one, order) for one in inputs], real.sum(dim=1)
    found, left = reordered(pooled(*moved, window, past), back), open_entries(*moved, window, past, length)
    assert found.isfinite().all()
    for row in range(2):
        alone = [one[row : row + 1, real[row]] for one in inputs]
        before = None if past is None else [one[row : row + 1] for one in past]
        if length[row]:
            torch.testing.assert_close(found[row : row + 1, real[row]], pooled(*alone, window, before))
        for one, other in zip(left, open_entries(*alone, window, before), strict=True):
            torch.testing.assert_close(one[row : row + 1], other)


@pytest.mark.parametrize("window", WINDOWS)
def test_left_padding_of_weight_0_may_stay(window):
    x, weight, alpha = (one.detach() for one in draw(1, 40))
    weight[:, :7] = 0
    x.requires_grad_(), weight.requires_grad_(), alpha.requires_grad_()
    found = pooled(x, weight, alpha, window)
    assert not found[:, :7].any()
    torch.testing.assert_close(found[:, 7:], pooled(x[:, 7:], weight[:, 7:], alpha[:, 7:], window))
    assert all(
        one.isfinite().all() for one in torch.autograd.grad(found.sum(), (x, weight, alpha), materialize_grads=True)
    )


@pytest.mark.parametrize("window", [3, None])
def test_half_precision_is_summed_in_fp32(window):
    x, weight, alpha = (one.detach().float() for one in draw(1, 70, hard=True))
    x = x.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pooled(x, weight, alpha, window)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found, pooled_reference(x.double(), weight, alpha, window).to(torch.bfloat16), atol=8e-3, rtol=8e-3
    )


def test_fp32_at_length():
    inputs = [one.detach().float() for one in draw(1, 200, hard=True)]
    for window in WINDOWS:
        theirs = pooled_reference(*(one.double() for one in inputs), window)
        torch.testing.assert_close(pooled(*inputs, window).double(), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", dmc_golden.WINDOWS)
def test_frozen_numbers(window):
    frozen = json.loads(dmc_golden.FILE.read_text(encoding="utf-8"))
    k, v, weight = (torch.tensor(frozen[name])[None] for name in ("k", "v", "importance"))
    alpha = (k[..., -1] > 5).float()
    alpha[:, 0] = 0
    assert alpha[0].bool().tolist() == frozen["merges"]
    found = pooled(torch.cat((k, v), dim=-1), weight, alpha, window)
    torch.testing.assert_close(found[0], torch.tensor(frozen["entries"][str(window)]), atol=1e-5, rtol=1e-5)


def test_the_recipe_gives_the_frozen_numbers():
    given_, frozen = dmc_golden.inputs(), json.loads(dmc_golden.FILE.read_text(encoding="utf-8"))
    assert {**given_, **dmc_golden.rounded(dmc_golden.formulas(**given_))} == frozen
