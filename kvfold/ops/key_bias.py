"""Causal attention whose keys carry a bias of their own, the training form of DMC and DMS. Forms: a dense reference, SDPA with
the bias spelled out, FlexAttention on a GPU; the fast one for CPUs lives in key_bias_cpu.py.

The bias of key k counts for the queries more than `free` tokens behind it; nearer ones see the key as it is.
Letters: B rows, T tokens of this call (queries and keys), H query heads, K kv heads, G = H // K, D head dim.
"""

from collections.abc import Callable
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from kvfold.ops.gating import real_first, reordered
from kvfold.ops.key_bias_cpu import flash_key_bias, has_flash_kernel


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
    """Whether there is a form linear in T. FlexAttention's kernels know no head below 16 channels and no fp64."""
    if q_BTHD.is_cuda:
        return q_BTHD.shape[-1] >= 16 and q_BTHD.dtype != torch.float64
    return q_BTHD.device.type == "cpu" and has_flash_kernel()


def key_bias_reference(
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    bias_BTK: Tensor,
    *,
    free: int,
    scale: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
    real_BT: Tensor | None = None,
) -> Tensor:
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
