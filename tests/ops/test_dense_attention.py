"""Dense attention, with and without weights, against loops and against each other."""

import math

import pytest
import torch

from kvfold.ops import attention
from kvfold.ops.attention import attention_with_weights, dense_attention

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def draw(batch, queries, entries, kv_heads, group, head_dim, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, queries, kv_heads * group, head_dim, generator=g)
    k, v = (torch.randn(batch, entries, kv_heads, head_dim, generator=g) for _ in range(2))
    return q, k, v


def random_mask(batch, heads, queries, entries, seed=1):
    """Every query sees its own place at least."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, heads, queries, entries, generator=g) < 0.5
    mask[..., torch.arange(queries), torch.arange(entries - queries, entries)] = True
    return mask


def by_loops(q, k, v, *, scale, softcap=None, mask=None, weigh=None):
    """One query and one head at a time, in float64; mask None = causal."""
    batch, queries, heads, head_dim = q.shape
    entries, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    out = torch.zeros(batch, queries, heads, head_dim, dtype=torch.float64)
    received = torch.zeros(batch, kv_heads, entries, dtype=torch.float64)
    for b in range(batch):
        for t in range(queries):
            for h in range(heads):
                head = h // group
                if mask is None:
                    places = list(range(t + 1))
                else:
                    row = mask[b % mask.shape[0], head % mask.shape[1], t]
                    places = [e for e in range(entries) if row[e]]
                logits = (k[b, places, head].double() @ q[b, t, h].double()) * scale
                if softcap is not None:
                    logits = torch.tensor([softcap * math.tanh(float(x) / softcap) for x in logits]).double()
                weights = (logits - logits.max()).exp()
                weights = weights / weights.sum()
                out[b, t, h] = weights @ v[b, places, head].double()
                if weigh is None or weigh[b, t]:
                    received[b, head, places] += weights
    return out, received


@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(1, 1, 8), (2, 3, 64), (1, 4, 80)])
@pytest.mark.parametrize("size", [1, 7, 63])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_causal(kv_heads, group, head_dim, size, softcap):
    if size == 63 and head_dim == 80:
        size = 33
    q, k, v = draw(2, size, size, kv_heads, group, head_dim)
    expected, sums = by_loops(q, k, v, scale=0.3, softcap=softcap)
    out = dense_attention(q, k, v, scale=0.3, softcap=softcap)
    torch.testing.assert_close(out.double(), expected, **CLOSE)
    out, received = attention_with_weights(q, k, v, scale=0.3, softcap=softcap)
    torch.testing.assert_close(out.double(), expected, **CLOSE)
    torch.testing.assert_close(received.double(), sums, **CLOSE)


@pytest.mark.parametrize("form", ["C", "torch"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("size", "stored"), [(1, 6), (9, 0), (9, 5), (150, 3), (20, 260)])
def test_causal_behind_what_is_stored(size, stored, softcap, form, monkeypatch):
    if form == "torch":
        monkeypatch.setattr(attention, "serving", lambda *_: None)
    q, k, v = draw(2, size, stored + size, 2, 3, 64)
    mask = torch.ones(1, 1, size, stored + size, dtype=torch.bool).tril(stored)
    expected = attention_with_weights(q.double(), k.double(), v.double(), scale=0.3, softcap=softcap, mask=mask)
    out = dense_attention(q, k, v, scale=0.3, softcap=softcap)
    torch.testing.assert_close(out.double(), expected[0], **CLOSE)
    out, received = attention_with_weights(q, k, v, scale=0.3, softcap=softcap)
    torch.testing.assert_close(out.double(), expected[0], **CLOSE)
    torch.testing.assert_close(received, expected[1], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("rows", "heads"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_masks_of_every_shape(rows, heads, softcap):
    q, k, v = draw(2, 5, 12, 3, 2, 8)
    mask = random_mask(rows, heads, 5, 12)
    expected, sums = by_loops(q, k, v, scale=0.3, softcap=softcap, mask=mask)
    out = dense_attention(q, k, v, scale=0.3, softcap=softcap, mask=mask)
    torch.testing.assert_close(out.double(), expected, **CLOSE)
    out, received = attention_with_weights(q, k, v, scale=0.3, softcap=softcap, mask=mask)
    torch.testing.assert_close(out.double(), expected, **CLOSE)
    torch.testing.assert_close(received.double(), sums, **CLOSE)


@pytest.mark.parametrize("elements", [1, 40, 200, 10**9])
@pytest.mark.parametrize("masked", [False, True])
def test_weights_do_not_depend_on_how_queries_are_cut(elements, masked, monkeypatch):
    q, k, v = draw(2, 13, 13, 2, 2, 8)
    mask = random_mask(2, 1, 13, 13) if masked else None
    weigh = torch.rand(2, 13, generator=torch.Generator().manual_seed(3)) < 0.6
    expected, sums = by_loops(q, k, v, scale=0.3, mask=mask, weigh=weigh)
    monkeypatch.setattr(attention, "_WEIGHT_CHUNK_ELEMENTS", elements)
    out, received = attention_with_weights(q, k, v, scale=0.3, mask=mask, weigh_BT=weigh)
    assert received.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, **CLOSE)
    torch.testing.assert_close(received.double(), sums, **CLOSE)


def test_only_the_newest_query_is_weighed_when_asked():
    q, k, v = draw(2, 6, 6, 2, 2, 8)
    weigh = torch.zeros(2, 6, dtype=torch.bool)
    weigh[0, 5] = weigh[1, 3] = True
    received = attention_with_weights(q, k, v, scale=0.3, weigh_BT=weigh)[1]
    torch.testing.assert_close(received.sum(dim=-1), torch.full((2, 2), 2.0))
    assert not received[1, :, 4:].any()


def test_gradients_of_the_dense_form_equal_those_of_the_plain_one():
    q, k, v = (x.requires_grad_() for x in draw(2, 9, 9, 2, 2, 8))
    for mask in (None, random_mask(2, 1, 9, 9)):
        ours = torch.autograd.grad(dense_attention(q, k, v, scale=0.3, mask=mask).square().sum(), (q, k, v))
        theirs = torch.autograd.grad(attention_with_weights(q, k, v, scale=0.3, mask=mask)[0].square().sum(), (q, k, v))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_scores_in_fp32(dtype):
    q, k, v = draw(1, 9, 9, 2, 2, 8)
    expected, sums = by_loops(q, k, v, scale=0.3)
    out, received = attention_with_weights(q.to(dtype), k.to(dtype), v.to(dtype), scale=0.3)
    assert out.dtype == dtype and received.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=4e-2, rtol=4e-2)
    torch.testing.assert_close(received.double(), sums, atol=4e-2, rtol=4e-2)
