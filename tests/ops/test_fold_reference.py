"""fold's reference against plain attention: where nothing is merged, where merging is exact, and one merge by hand."""

import pytest
import torch

from kvfold.ops.attention import attention_with_weights
from kvfold.ops.fold_reference import FoldRule, fold_attention_reference

SCALE = 0.25


def _text(tokens=37, rows=2, heads=4, kv_heads=2, dim=8, seed=0):
    torch.manual_seed(seed)
    q = torch.randn(rows, tokens, heads, dim, dtype=torch.float64)
    k, v = (torch.randn(rows, tokens, kv_heads, dim, dtype=torch.float64) for _ in range(2))
    flag = torch.rand(rows, tokens, kv_heads) < 0.6
    return q, k, v, flag, torch.randn(rows, tokens, kv_heads, dtype=torch.float64)


def _dense(q, k, v, mask, softcap=None):
    return attention_with_weights(q, k, v, scale=SCALE, mask=mask, softcap=softcap)[0]


def _seen(flag, delay, grid):
    """Which keys a query sees under eviction at the borders of a grid, [B, K, T, T]."""
    tokens = flag.shape[1]
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)
    left = key < (query // grid * grid) - delay
    return (key <= query) & ~(left & flag.transpose(1, 2)[:, :, None])


@pytest.mark.parametrize(("grid", "delay", "softcap"), [(1, 5, None), (4, 5, None), (16, 0, 3.0), (64, 1, None)])
def test_nothing_merged_is_eviction_on_the_grid(grid, delay, softcap):
    q, k, v, flag, s = _text()
    expected = _dense(q, k, v, _seen(flag, delay, grid), softcap)
    for threshold in (None, 1.1):
        rule = FoldRule(delay=delay, grid=grid, threshold=threshold)
        ours, trace = fold_attention_reference(q, k, v, flag, s, rule, scale=SCALE, softcap=softcap)
        torch.testing.assert_close(ours, expected)
        assert (trace.slot == -1).all()
        assert torch.equal(trace.kept_BKT, _seen(flag, delay, grid).sum(dim=-1))


@pytest.mark.parametrize("merges_keys", [False, True])
def test_merging_equals_is_exact(merges_keys):
    """Tokens that equal the entry they merge into, of equal importance: the output is that of plain attention."""
    q, k, v, _, s = _text(rows=1, tokens=24)
    k[:, 2::2], v[:, 2::2] = k[:, 1:2].clone(), v[:, 1:2].clone()
    flag = torch.zeros(1, 24, 2, dtype=torch.bool)
    flag[:, 2::2] = True
    rule = FoldRule(delay=3, grid=4, threshold=0.9, merges_keys=merges_keys)
    ours, trace = fold_attention_reference(q, k, v, flag, torch.zeros_like(s), rule, scale=SCALE)
    causal = torch.ones(24, 24, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(ours, _dense(q, k, v, causal))
    gone = trace.left_at < 24
    assert gone.sum() == 16
    assert (trace.slot[gone] == 1).all()
    assert (trace.mass[:, :, 1] == 9).all()
    assert not torch.allclose(ours, _dense(q, k, v, _seen(flag, 3, 4)))


def test_a_merge_by_hand():
    """One leaver: the entry's value and logit are those of the formula; c and mass count."""
    q, k, v, _, s = _text(rows=1, heads=1, kv_heads=1, tokens=6)
    k[:, 2], v[:, 2] = 1.5 * k[:, 1] + 0.1, v[:, 1] + 0.1
    flag = torch.tensor([False, False, True, False, False, False])[None, :, None]
    rule = FoldRule(delay=1, grid=5, threshold=0.5, b=0.3, c=2.0, mass=0.7)
    ours, trace = fold_attention_reference(q, k, v, flag, s, rule, scale=SCALE)
    cosine = sum(torch.cosine_similarity(x[0, 1, 0], x[0, 2, 0], dim=0) for x in (k, v)) / 2
    u = (s[0, 2, 0] - s[0, 1, 0] + 0.3 + 2.0 * (cosine - 1)).exp()
    value = (v[0, 1, 0] + u * v[0, 2, 0]) / (1 + u)
    keys = [0, 1, 3, 4, 5]
    logits = k[0, keys, 0] @ q[0, 5, 0] * SCALE + torch.tensor([0, 0.7 * (1 + u).log(), 0, 0, 0], dtype=torch.float64)
    values = torch.stack([v[0, 0, 0], value, v[0, 3, 0], v[0, 4, 0], v[0, 5, 0]])
    torch.testing.assert_close(ours[0, 5, 0], logits.softmax(dim=0) @ values)
    torch.testing.assert_close(trace.mass[0, 0, 1], 1 + u)


def test_who_may_take():
    """Never the first token, a flagged one, a younger one, or one out of reach; the oldest of equals."""
    q, k, v, _, s = _text(rows=1, heads=1, kv_heads=1, tokens=40)
    k[:], v[:] = k[:, :1].clone(), v[:, :1].clone()
    flag = torch.zeros(1, 40, 1, dtype=torch.bool)
    flag[0, [2, 3, 4, 20, 21]] = True
    rule = FoldRule(delay=4, grid=8, threshold=0.5, reach=15)
    _, trace = fold_attention_reference(q, k, v, flag, s, rule, scale=SCALE)
    slot = trace.slot[0, 0]
    assert slot[[2, 3, 4]].tolist() == [1, 1, 1]
    assert slot[[20, 21]].tolist() == [5, 6]
    flag[0, 1] = True
    _, trace = fold_attention_reference(q, k, v, flag, s, rule, scale=SCALE)
    assert trace.slot[0, 0, [1, 2, 3, 4]].tolist() == [-1, -1, -1, -1]


def test_refused():
    with pytest.raises(ValueError, match="grid 0: at least 1"):
        FoldRule(delay=1, grid=0, threshold=None)
