"""Causal attention whose keys carry a bias of their own, the training form of DMC and DMS. Forms: a dense reference, SDPA with
the bias spelled out, FlexAttention on a GPU, and on a CPU PyTorch's own flash kernel, used in parts. The last two take memory
linear in T.

The bias of key k counts for the queries more than `free` tokens behind it; nearer ones see the key as it is. On a CPU parts
are put together by the log of their sums; the kernel's backward, given the *whole's* output and log-sum, yields each part's
share of the gradients, so no part needs a gradient of its log-sum. There the bias rides as one more channel: q has 1 / scale
there and k the bias.
Letters: B rows, T tokens of this call (queries and keys), S keys of a part, H query heads, K kv heads, G = H // K, D head dim,
W wide: D and the channels beside it.
"""

from collections.abc import Callable
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from kvfold.ops.gating import real_first, reordered

_FLASH = "_scaled_dot_product_flash_attention_for_cpu"
_WIDTH_STEP = 16
"""Widths are rounded up to this: the kernel is slower at an odd one."""
_CHUNK = 64
"""Queries that look at their near keys together: fewer, and the calls' own cost shows; more, and most scores are masked."""
_UNSEEN = -1e30
"""Finite, so that a block of keys of which a query sees none gives it no NaN."""


def key_bias_attention(
    q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, bias_BTK: Tensor, *, free: int, scale: float,
    softcap: float | None = None, mask: Tensor | None = None, real_BT: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention output [B, T, H, D] in q's dtype, differentiable in q, k, v and the bias.

    `bias_BTK`: fp32, added to a key's scores (after any softcap) for queries further than `free` tokens away: log(1 - alpha)
    of the gate that governs the key; finite, -1e30 for never. `free`: 0 for DMC, the delay for DMS.
    `real_BT`: bool, False at padding, wherever it stands: no real query sees it and no distance counts it. The output at
    padding has no meaning, but is finite. `mask`: bool [B or 1, 1, T, T], True = the query sees the key. It then says alone
    who sees whom, causality and padding included, and `real_BT` only tells which tokens count in a distance. Each query
    must see a key.

    Memory: linear in T on a CPU and on CUDA. With `mask` or `softcap`, or without the kernel (`_has_kernel`), the bias is
    spelled out: [B, H, T, T], several times over in training.

    Source: arXiv 2403.09636, section 3 (free 0); arXiv 2506.05345, section 3 (free = delay).
    Differs: none in the result; the official code of both spells out the bias.
    """
    given = {"free": free, "scale": scale, "mask": mask, "real_BT": real_BT}
    if softcap is not None:
        return key_bias_reference(q_BTHD, k_BTKD, v_BTKD, bias_BTK, softcap=softcap, **given)
    if mask is not None or not _has_kernel(q_BTHD):
        return _by_sdpa(q_BTHD, k_BTKD, v_BTKD, bias_BTK, **given)
    fast = _by_flex if q_BTHD.is_cuda else flash_key_bias
    if real_BT is None:
        return fast(q_BTHD, k_BTKD, v_BTKD, bias_BTK, free, scale)
    # Behind the real tokens padding is out of sight of them, and the distances are right by themselves.
    order, back = real_first(real_BT)
    q, k, v, bias = (reordered(x, order) for x in (q_BTHD, k_BTKD, v_BTKD, bias_BTK))
    return reordered(fast(q, k, v, bias, free, scale), back)


def _has_kernel(q_BTHD: Tensor) -> bool:
    """Whether there is a form linear in T. FlexAttention's kernels know no head below 16 channels and no fp64; the kernel for
    CPUs and its backward are no public interface of PyTorch, but SDPA's own.
    """
    if q_BTHD.is_cuda:
        return q_BTHD.shape[-1] >= 16 and q_BTHD.dtype != torch.float64
    return q_BTHD.device.type == "cpu" and all(hasattr(torch.ops.aten, one) for one in (_FLASH, f"{_FLASH}_backward"))


def key_bias_reference(
    q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, bias_BTK: Tensor, *, free: int, scale: float,
    softcap: float | None = None, mask: Tensor | None = None, real_BT: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The judge, and the form for a softcap: every score written out, [B, H, T, T]. Arguments as in `key_bias_attention`."""
    group = q_BTHD.shape[2] // k_BTKD.shape[2]
    k, v, bias = (x.repeat_interleave(group, dim=2) for x in (k_BTKD, v_BTKD, bias_BTK))
    scores = torch.einsum("bthd,bihd->bhti", q_BTHD, k) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    far, seen = _far_and_seen(free, mask, real_BT, q_BTHD.shape[1], q_BTHD.device)
    scores = scores + torch.where(far, bias.transpose(1, 2).unsqueeze(2), 0.0)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return torch.einsum("bhti,bihd->bthd", weights.to(v.dtype), v)


def _by_sdpa(
    q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, bias_BTK: Tensor, *, free: int, scale: float,
    mask: Tensor | None, real_BT: Tensor | None,
) -> Tensor:  # fmt: skip
    """SDPA over a mask that holds the biases."""
    group = q_BTHD.shape[2] // k_BTKD.shape[2]
    far, seen = _far_and_seen(free, mask, real_BT, q_BTHD.shape[1], q_BTHD.device)
    bias = torch.where(far, bias_BTK.transpose(1, 2).unsqueeze(2), 0.0).masked_fill(~seen, -torch.inf)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
    spelled = bias.repeat_interleave(group, dim=1).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=spelled, scale=scale, enable_gqa=group > 1).transpose(1, 2)


def _far_and_seen(
    free: int, mask: Tensor | None, real_BT: Tensor | None, tokens: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which pairs of query and key are further apart than `free`, and which queries see which keys: bool, broadcasting to
    [B, H, T, T].
    """
    index = torch.arange(tokens, device=device)
    position = index[None] if real_BT is None else real_BT.long().cumsum(dim=1)
    far = (position[:, :, None] - position[:, None, :] > free)[:, None]
    if mask is not None:
        return far, mask
    seen = (index <= index[:, None])[None, None]
    if real_BT is not None:
        seen = (seen & real_BT[:, None, None, :]) | torch.eye(tokens, dtype=torch.bool, device=device)
    return far, seen


def _by_flex(
    q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, bias_BTK: Tensor, free: int, scale: float, compiled: bool = True
) -> Tensor:
    """FlexAttention: the bias is looked up inside the kernel. Uncompiled, it writes out [B, H, T, T]."""
    group, tokens = q_BTHD.shape[2] // k_BTKD.shape[2], q_BTHD.shape[1]
    bias = bias_BTK.transpose(1, 2).contiguous()

    def biased(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.where(query - key > free, score + bias[row, head // group, key], score)

    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
    attend = _compiled_flex() if compiled else flex_attention
    blocks = _causal_blocks(tokens, q_BTHD.device)
    out = attend(q, k, v, score_mod=biased, block_mask=blocks, scale=scale, enable_gqa=group > 1)
    return out.transpose(1, 2)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    """Compiled at the first call on a GPU, then for each new shape."""
    return torch.compile(flex_attention)


@lru_cache(maxsize=16)
def _causal_blocks(tokens: int, device: torch.device) -> BlockMask:
    with torch.inference_mode(False):  # it is kept, and a later call may train
        return create_block_mask(_causal, B=None, H=None, Q_LEN=tokens, KV_LEN=tokens, device=device)


def _causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def flash_key_bias(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, bias_BTK: Tensor, free: int, scale: float) -> Tensor:
    """Causal attention [B, T, H, D], key biases counting beyond `free` tokens. Half precision is worked out in fp32: a bias
    in a channel of bf16 would be too coarse.
    """
    wide = torch.promote_types(q_BTHD.dtype, torch.float32)
    q, k, v, bias = (x.to(wide).transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD, bias_BTK))
    return _FreeBand.apply(q, k, v, bias, free, scale).transpose(1, 2).to(q_BTHD.dtype)


class _FreeBand(torch.autograd.Function):
    """Far keys with their biases, in a causal square moved by free + 1, and near ones without (`_near`)."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, bias_BKT: Tensor, free: int, scale: float
    ) -> Tensor:
        out, total = (_near if free else _own)(q_BHTD, k_BKTD, v_BKTD, free, scale)
        queries, keys = _far(q_BHTD, free)
        if queries is not None:
            parts = (q_BHTD[:, :, queries], k_BKTD[:, :, keys], v_BKTD[:, :, keys], bias_BKT[:, :, keys])
            far, far_total = _forward(*_widened(*parts, scale), scale)
            near_total = total[:, :, queries]
            share = torch.sigmoid(far_total - near_total).unsqueeze(-1)
            out[:, :, queries].lerp_(far[..., : out.shape[-1]], share)
            total[:, :, queries] = torch.logaddexp(near_total, far_total)
        ctx.save_for_backward(q_BHTD, k_BKTD, v_BKTD, bias_BKT, out, total)
        ctx.free, ctx.scale = free, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_BHTD: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, total = ctx.saved_tensors
        width, scale = q.shape[-1], ctx.scale
        near = _near_backward if ctx.free else _own_backward
        grad_q, grad_k, grad_v = near(grad_BHTD, q, k, v, out, total, ctx.free, scale)
        grad_bias = torch.zeros_like(bias)
        queries, keys = _far(q, ctx.free)
        if queries is not None:
            wide = _widened(q[:, :, queries], k[:, :, keys], v[:, :, keys], bias[:, :, keys], scale)
            grad, part = _padded(grad_BHTD[:, :, queries]), _padded(out[:, :, queries])
            found = _backward(grad, *wide, part, total[:, :, queries], scale)
            grad_q[:, :, queries] += found[0][..., :width]
            grad_k[:, :, keys] += found[1][..., :width]
            grad_v[:, :, keys] += found[2][..., :width]
            grad_bias[:, :, keys] = found[1][..., width]
        return grad_q, grad_k, grad_v, grad_bias, None, None


def _near(q: Tensor, k: Tensor, v: Tensor, free: int, scale: float) -> tuple[Tensor, Tensor]:
    """What each query finds in its free + 1 newest keys, and the log of its sum: [B, H, T, D] and [B, H, T]."""
    out, total = torch.empty_like(q), q.new_empty(q.shape[:3])
    for queries, keys, mask in _near_chunks(q, free):
        found = _forward(q[:, :, queries], k[:, :, keys], v[:, :, keys], scale, mask)
        out[:, :, queries], total[:, :, queries] = found
    return out, total


def _near_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, free: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The near keys' share of the gradients."""
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
    for queries, keys, mask in _near_chunks(q, free):
        parts = (grad[:, :, queries], q[:, :, queries], k[:, :, keys], v[:, :, keys], out[:, :, queries])
        found = _backward(*parts, total[:, :, queries], scale, mask)
        grad_q[:, :, queries] = found[0]
        grad_k[:, :, keys] += found[1]
        grad_v[:, :, keys] += found[2]
    return grad_q, grad_k, grad_v


def _own(q: Tensor, k: Tensor, v: Tensor, free: int, scale: float) -> tuple[Tensor, Tensor]:
    """`_near` for free = 0, by hand: a twentieth of the whole time less."""
    out = torch.empty_like(q)
    out.unflatten(1, (k.shape[1], -1)).copy_(v.unsqueeze(2))
    return out, _own_scores(q, k, scale)


def _own_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return (q.unflatten(1, (k.shape[1], -1)) * k.unsqueeze(2)).sum(dim=-1).mul_(scale).flatten(1, 2)


def _own_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, free: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`_near_backward` for free = 0."""
    weight = (_own_scores(q, k, scale) - total).exp_()
    q, grad, out, weight = (x.unflatten(1, (k.shape[1], -1)) for x in (q, grad, out, weight))
    slope = (grad * (v.unsqueeze(2) - out)).sum(dim=-1).mul_(weight).mul_(scale).unsqueeze(-1)
    weight = weight.unsqueeze(-1)
    grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
    for member in range(q.shape[2]):
        grad_k.addcmul_(slope[:, :, member], q[:, :, member])
        grad_v.addcmul_(weight[:, :, member], grad[:, :, member])
    return (slope * k.unsqueeze(2)).flatten(1, 2), grad_k, grad_v


def _far(q_BHTD: Tensor, free: int) -> tuple[slice | None, slice]:
    """Queries that have far keys, and those keys: the first query with the first key, and so on."""
    tokens = q_BHTD.shape[2]
    reach = tokens - free - 1
    return (slice(free + 1, tokens) if reach > 0 else None), slice(0, max(0, reach))


def _near_chunks(q_BHTD: Tensor, free: int) -> list[tuple[slice, slice, Tensor | None]]:
    """Queries, the keys from `free` before the first of them to the last, and who of them sees whom; None = causal."""
    tokens = q_BHTD.shape[2]
    if tokens <= free + 1:
        return [(slice(0, tokens), slice(0, tokens), None)]
    chunks = []
    row = torch.arange(_CHUNK, device=q_BHTD.device)[:, None]
    distance = row + free - torch.arange(_CHUNK + free, device=q_BHTD.device)
    band = torch.where((distance >= 0) & (distance <= free), 0.0, _UNSEEN).to(q_BHTD.dtype)
    for start in range(0, tokens, _CHUNK):
        stop, first = min(start + _CHUNK, tokens), max(0, start - free)
        skipped = first - (start - free)
        mask = band[: stop - start, skipped : skipped + stop - first]
        chunks.append((slice(start, stop), slice(first, stop), mask))
    return chunks


def _widened(
    q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, bias_BKS: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with the channel of the bias and zeros beside them."""
    q, k, v = (_padded(x) for x in (q_BHTD, k_BKSD, v_BKSD))
    q[..., q_BHTD.shape[-1]] = 1 / scale
    k[..., k_BKSD.shape[-1]] = bias_BKS
    return q, k, v


def _padded(x_BHTD: Tensor) -> Tensor:
    """x with zero channels behind; laid out as [B, T, H, W], as the kernel reads it."""
    batch, heads, tokens, width = x_BHTD.shape
    full = -(-(width + 1) // _WIDTH_STEP) * _WIDTH_STEP
    wide = x_BHTD.new_empty(batch, tokens, heads, full).transpose(1, 2)
    wide[..., :width], wide[..., width:] = x_BHTD, 0
    return wide


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output and log-sum [B, H, T]; causal where no mask is given."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a part's q, k and v, when `out` and `total` are the whole's."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return kernel(grad, q, k, v, out, total, 0.0, mask is None, attn_mask=mask, scale=scale)
