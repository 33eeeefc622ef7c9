"""Attention with a bias of each key: every form against the dense one, and that one against a loop."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kvfold.ops import key_bias
from kvfold.ops.gating import STAY_NEVER
from kvfold.ops.key_bias import key_bias_attention, key_bias_reference

shapes = {
    "tokens": st.integers(1, 70), "kv_heads": st.integers(1, 2), "group": st.integers(1, 3),
    "free": st.sampled_from([0, 0, 1, 2, 5, 31, 63, 64, 69, 200]), "hard": st.booleans(), "seed": st.integers(0, 99),
}  # fmt: skip


def draw(batch, tokens, kv_heads, group, hard=False, seed=0, dtype=torch.float32, width=8):
    """q, k, v and bias, ready for gradients. Hard: most keys are never seen from afar."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, tokens, kv_heads * group, width, generator=g, dtype=dtype)
    k, v = (torch.randn(batch, tokens, kv_heads, width, generator=g, dtype=dtype) for _ in "kv")
    logit = torch.randn(batch, tokens, kv_heads, generator=g, dtype=dtype) * 5
    bias = torch.where(logit > -2, STAY_NEVER, 0.0).to(dtype) if hard else F.logsigmoid(-logit)
    return [x.requires_grad_() for x in (q, k, v, bias)]


def by_loops(q, k, v, bias, *, free, scale, softcap=None, mask=None, real=None):
    """One query and one head at a time, in float64. Rows at padding stay 0."""
    batch, tokens, heads, _ = q.shape
    q, k, v, bias = (x.detach() for x in (q, k, v, bias))
    group, out = heads // k.shape[2], torch.zeros(q.shape, dtype=torch.float64)
    for b in range(batch):
        places = [t for t in range(tokens) if real is None or real[b, t]]
        for n, t in enumerate(places):
            for h in range(heads):
                scores, seen = [], []
                for m, i in enumerate(places):
                    if not (i <= t if mask is None else mask[b % mask.shape[0], 0, t, i]):
                        continue
                    score = scale * float(q[b, t, h].double() @ k[b, i, h // group].double())
                    score = score if softcap is None else softcap * math.tanh(score / softcap)
                    scores.append(score + (float(bias[b, i, h // group]) if n - m > free else 0.0))
                    seen.append(v[b, i, h // group].double())
                weights = torch.tensor(scores, dtype=torch.float64).softmax(dim=0)
                out[b, t, h] = weights @ torch.stack(seen)
    return out


def compare_with_gradients(inputs, ours, theirs, atol, real=None):
    """Output to `atol`, gradients to ten times that; where padding is, finite."""
    if real is not None:
        assert ours.isfinite().all()
        ours, theirs = (torch.where(real[..., None, None], one, 0.0) for one in (ours, theirs))
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=atol)
    weigh = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5), dtype=ours.dtype)
    found, expected = (torch.autograd.grad(one, inputs, weigh) for one in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=10 * atol, rtol=10 * atol)


def random_real(batch, tokens, seed, left=False):
    """Padding here and there, or only at the left; each row has a real token."""
    g = torch.Generator().manual_seed(seed)
    if left:
        return torch.arange(tokens) >= torch.randint(0, tokens, (batch, 1), generator=g)
    real = torch.rand(batch, tokens, generator=g) < 0.6
    real[:, tokens // 2] = True
    return real


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("free", [0, 3])
def test_the_reference_equals_a_loop(softcap, hard, padded, free):
    inputs, real = draw(2, 9, 2, 2, hard), random_real(2, 9, 3) if padded else None
    ours = key_bias_reference(*inputs, free=free, scale=0.3, softcap=softcap, real_BT=real)
    ours = ours if real is None else torch.where(real[..., None, None], ours, 0.0)
    theirs = by_loops(*inputs, free=free, scale=0.3, softcap=softcap, real=real)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(**shapes)
def test_fp32(tokens, kv_heads, group, free, hard, seed):
    inputs = draw(2, tokens, kv_heads, group, hard, seed)
    ours, theirs = (form(*inputs, free=free, scale=0.35) for form in (key_bias_attention, key_bias_reference))
    compare_with_gradients(inputs, ours, theirs, 1e-5)


@settings(max_examples=30, deadline=None)
@given(**shapes)
def test_fp64(tokens, kv_heads, group, free, hard, seed):
    inputs = draw(1, tokens, kv_heads, group, hard, seed, torch.float64)
    ours, theirs = (form(*inputs, free=free, scale=0.35) for form in (key_bias_attention, key_bias_reference))
    compare_with_gradients(inputs, ours, theirs, 1e-11)


@settings(max_examples=60, deadline=None)
@given(**shapes, left=st.booleans())
def test_padding(tokens, kv_heads, group, free, hard, seed, left):
    inputs, real = draw(2, tokens, kv_heads, group, hard, seed), random_real(2, tokens, seed, left)
    given_ = {"free": free, "scale": 0.35, "real_BT": real}
    ours, theirs = (form(*inputs, **given_) for form in (key_bias_attention, key_bias_reference))
    compare_with_gradients(inputs, ours, theirs, 1e-5, real)
    assert all(x.isfinite().all() for x in torch.autograd.grad(key_bias_attention(*inputs, **given_).sum(), inputs))


def test_padding_is_never_read():
    q, k, v, bias = (x.detach() for x in draw(2, 20, 1, 2, hard=True))
    real = random_real(2, 20, 4)
    spoiled = [torch.where(real.view(2, 20, *[1] * (x.ndim - 2)), x, 1e3) for x in (k, v, bias)]
    ours, theirs = (key_bias_attention(q, *x, free=2, scale=0.3, real_BT=real) for x in (spoiled, (k, v, bias)))
    assert torch.equal(ours[real], theirs[real])


@pytest.mark.parametrize("free", [600, 100])
def test_long_text(free):
    """Over more keys than the kernel takes at once, some queries of a chunk seeing none of the first block."""
    inputs = draw(1, 1300, 1, 2, width=4)
    ours, theirs = (form(*inputs, free=free, scale=0.5) for form in (key_bias_attention, key_bias_reference))
    compare_with_gradients(inputs, ours, theirs, 1e-5)


@pytest.mark.parametrize("free", [0, 4])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_mask_of_the_architecture(free, padded, softcap):
    inputs, index = draw(2, 20, 2, 2), torch.arange(20)
    real = random_real(2, 20, 3) if padded else None
    distance = index[:, None] - index
    mask = ((distance >= 0) & (distance < 7))[None, None]
    if padded:
        mask = (mask & real[:, None, None, :]) | torch.eye(20, dtype=torch.bool)
    given_ = {"free": free, "scale": 0.3, "softcap": softcap, "mask": mask, "real_BT": real}
    ours, theirs = (form(*inputs, **given_) for form in (key_bias_attention, key_bias_reference))
    compare_with_gradients(inputs, ours, theirs, 1e-5, real)
    looped = by_loops(*inputs, free=free, scale=0.3, softcap=softcap, mask=mask, real=real)
    ours = ours if real is None else torch.where(real[..., None, None], ours, 0.0)
    torch.testing.assert_close(ours.double(), looped, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_without_the_flash_kernel(padded, monkeypatch):
    monkeypatch.setattr(key_bias, "_FLASH", "no_such_kernel")
    monkeypatch.setattr(key_bias, "flash_key_bias", None)
    inputs, real = draw(2, 20, 2, 2), random_real(2, 20, 3) if padded else None
    given_ = {"free": 3, "scale": 0.3, "real_BT": real}
    ours, theirs = (form(*inputs, **given_) for form in (key_bias_attention, key_bias_reference))
    compare_with_gradients(inputs, ours, theirs, 1e-5, real)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("tokens", [1, 5, 130])
@pytest.mark.parametrize("free", [0, 3])
def test_flex_attention_forward(tokens, free):
    """The form for GPUs, uncompiled; on CPUs it has no backward."""
    inputs = [x.detach() for x in draw(2, tokens, 2, 3, seed=tokens)]
    ours = key_bias._by_flex(*inputs, free, 0.3, compiled=False)
    torch.testing.assert_close(ours, key_bias_reference(*inputs, free=free, scale=0.3), atol=1e-5, rtol=1e-5)


def test_blocks_made_in_inference_mode_serve_training():
    key_bias._causal_blocks.cache_clear()
    with torch.inference_mode():
        blocks = key_bias._causal_blocks(17, torch.device("cpu"))
    assert not blocks.kv_indices.is_inference()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("free", [0, 5])
def test_half_precision(dtype, free):
    """The bias may be far beyond what fp16 holds."""
    inputs = [x.detach() for x in draw(1, 40, 2, 2, hard=True)]
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs[:3])
    ours = key_bias_attention(q, k, v, inputs[3], free=free, scale=0.3)
    theirs = key_bias_reference(q.float(), k.float(), v.float(), inputs[3], free=free, scale=0.3)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), theirs, atol=1e-2, rtol=1e-2)
    assert all(x.isfinite().all() for x in torch.autograd.grad(ours.float().sum(), (q, k, v)))


def test_no_bias_is_causal_attention():
    q, k, v, bias = draw(1, 50, 2, 2)
    plain = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=0.3, enable_gqa=True
    )
    for free in (0, 7):
        ours = key_bias_attention(q, k, v, torch.zeros_like(bias), free=free, scale=0.3)
        torch.testing.assert_close(ours, plain.transpose(1, 2), atol=1e-5, rtol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple) else (found,):
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return found


@pytest.mark.parametrize("free", [0, 16])
@pytest.mark.parametrize("padded", [False, True])
def test_memory_is_linear_in_tokens(free, padded):
    inputs, real = draw(1, 1024, 1, 2, width=15), random_real(1, 1024, 1) if padded else None
    with LargestTensor() as seen:
        key_bias_attention(*inputs, free=free, scale=0.3, real_BT=real).sum().backward()
    assert seen.elements <= 1024 * 2 * 16  # q with the channel of the bias
    with LargestTensor() as seen:
        key_bias_reference(*inputs, free=free, scale=0.3, real_BT=real).sum().backward()
    assert seen.elements >= 1024 * 1024
