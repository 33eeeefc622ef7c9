"""Attention over entries that live for a while equals one query of one head at a time, whatever a block sees."""

import pytest
import torch

from kvfold.ops import attention, native
from kvfold.ops.attention import FOREVER, lifespan_attention, lifespan_reference

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def drawn(seed, *, tokens, stored, heads, kv_heads, dim):
    """Two sequences, the second padded at the left; entries that stay, that leave, that never were."""
    source = torch.Generator().manual_seed(seed)
    q = torch.randn(2, tokens, heads, dim, generator=source)
    entries = stored + tokens
    k, v = (torch.randn(2, entries, kv_heads, dim, generator=source) for _ in range(2))
    pad = torch.tensor([0, min(3, tokens - 1)])
    query = stored + torch.arange(tokens)[None] - pad[:, None]
    query = query.masked_fill(torch.arange(tokens)[None] < pad[:, None], -1)
    old = torch.arange(stored).expand(2, kv_heads, stored)
    position = torch.cat((old, query[:, None].expand(2, kv_heads, tokens)), dim=-1).contiguous()
    position[:, :, :stored].masked_fill_(torch.rand(2, kv_heads, stored, generator=source) < 0.2, -1)
    lives = torch.randint(0, 9, (2, kv_heads, entries), generator=source)
    last = torch.where(torch.rand(2, kv_heads, entries, generator=source) < 0.4, FOREVER, position + lives)
    bias = torch.randn(2, kv_heads, entries, generator=source)
    return q, k, v, {"query_BT": query, "position_BKE": position, "last_BKE": last, "bias_BKE": bias}


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("sizes", [(1, 5, 4, 2, 8), (23, 0, 4, 4, 8), (23, 17, 6, 2, 16), (40, 30, 3, 1, 46)], ids=str)
def test_it_equals_its_slow_twin(sizes, biased, softcap, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 8)
    tokens, stored, heads, kv_heads, dim = sizes
    q, k, v, lives = drawn(3, tokens=tokens, stored=stored, heads=heads, kv_heads=kv_heads, dim=dim)
    lives |= {} if biased else {"bias_BKE": None}
    ours = lifespan_attention(q, k, v, **lives, scale=0.4, softcap=softcap)
    theirs = lifespan_reference(q, k, v, **lives, scale=0.4, softcap=softcap)
    assert not ours.isnan().any()
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_what_no_query_sees_is_not_read(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 8)
    q, k, v, lives = drawn(5, tokens=24, stored=12, heads=4, kv_heads=2, dim=8)
    query = lives["query_BT"][:, None, :, None]
    seen = (lives["position_BKE"].unsqueeze(2) <= query) & (lives["last_BKE"].unsqueeze(2) >= query) & (query >= 0)
    unseen = ~(seen & (lives["position_BKE"] >= 0).unsqueeze(2)).any(dim=2)
    unseen[..., 0] = False  # where heads see fewer than others, the gap is filled with the first entry and masked
    poison = unseen.transpose(1, 2).unsqueeze(-1)
    assert unseen.any()
    spoiled = lifespan_attention(
        q, k.masked_fill(poison, torch.nan), v.masked_fill(poison, torch.nan), **lives, scale=0.4
    )
    torch.testing.assert_close(spoiled, lifespan_attention(q, k, v, **lives, scale=0.4))


@pytest.fixture(params=[isa for isa in native.instruction_sets() if isa != "generic"])
def in_c(request, monkeypatch):
    """Each instruction set, and how often C was asked."""
    monkeypatch.setenv("KVFOLD_ISA", request.param)
    native.lifespan_library.cache_clear()
    if native.lifespan_library() is None:
        pytest.skip("no C compiler on this machine")
    calls, lifespans = [], attention.lifespans
    monkeypatch.setattr(attention, "lifespans", lambda *args, **kwargs: calls.append(1) or lifespans(*args, **kwargs))
    yield calls
    native.lifespan_library.cache_clear()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [(8, 0, 2, 2, 64), (23, 300, 5, 1, 64), (131, 17, 6, 2, 64), (140, 129, 3, 3, 128), (9, 3, 97, 1, 64)],
    ids=str,
)
def test_c_equals_the_slow_twin(sizes, biased, softcap, in_c):
    tokens, stored, heads, kv_heads, dim = sizes
    q, k, v, lives = drawn(7, tokens=tokens, stored=stored, heads=heads, kv_heads=kv_heads, dim=dim)
    lives |= {} if biased else {"bias_BKE": None}
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # heads need not lie side by side
    ours = lifespan_attention(q, k, v, **lives, scale=0.3, softcap=softcap)
    theirs = lifespan_reference(q.double(), k.double(), v.double(), **lives, scale=0.3, softcap=softcap).float()
    assert in_c
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_c_reads_nothing_that_no_query_sees(in_c):
    q, k, v, lives = drawn(11, tokens=40, stored=90, heads=4, kv_heads=2, dim=64)
    gone = lives["last_BKE"] < 90  # behind the first query
    assert gone.any()
    poison = gone.transpose(1, 2).unsqueeze(-1)
    spoiled = lifespan_attention(
        q, k.masked_fill(poison, torch.nan), v.masked_fill(poison, torch.nan), **lives, scale=0.4
    )
    assert in_c and not spoiled.isnan().any()
    torch.testing.assert_close(spoiled, lifespan_attention(q, k, v, **lives, scale=0.4))


def test_c_hands_on_what_is_no_number(in_c):
    q, k, v, lives = drawn(13, tokens=20, stored=0, heads=2, kv_heads=2, dim=64)
    lives["last_BKE"] = torch.full_like(lives["last_BKE"], FOREVER)
    k[0, 12] = torch.nan
    out = lifespan_attention(q, k, v, **lives, scale=0.4)
    assert out[0, 12:].isnan().all() and not out[0, :12].isnan().any()
    assert not out[1].isnan().any() and not out[1, :3].any()  # padding


def test_gradients_are_not_left_to_c(in_c):
    q, k, v, lives = drawn(17, tokens=12, stored=0, heads=2, kv_heads=1, dim=64)
    lifespan_attention(q.requires_grad_(), k, v, **lives, scale=0.4).sum().backward()
    assert not in_c and q.grad.any()
