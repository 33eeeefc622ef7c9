"""Decode attention over a paged, ragged cache: one query token a sequence, pages read where they lie.

`decode_attention` picks the compiled form (CPU) or the plain one, `decode_reference`, which gathers the pages and judges
the other. A KV stream is one (sequence, KV head) of one owner layer; its pages are a stretch of a flat table, so streams
of one call may differ in length as they like.
Letters: B sequences, H query heads, K kv heads, G = H // K, D head dim, P pages of the pool, N slots a page, S scale
groups or entries of a stream, T entries of the table, E columns of `received`.
"""

import importlib.util
import os
import struct
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from kvfold.ops import native
from kvfold.ops.quantised import GROUP_CHANNELS, dequantise, indexable, quantise, storage_of, turned


@dataclass(kw_only=True, slots=True)
class DecodeBatch:
    """Where the streams of one owner lie, and what this step does with the new token."""

    k_PND: Tensor
    """Pool of key pages [P, N, width]; ops/quantised.py tells width and storage by dtype."""
    v_PND: Tensor
    k_scale_PNS: Tensor | None = None
    """fp16; given for int8 and int4 keys."""
    v_scale_PNS: Tensor | None = None
    position_PN: Tensor
    """int32."""
    score_PN: Tensor | None = None
    """fp32. When given, the weight that each stored key receives (summed over the G query heads) is added to it."""
    bias_PN: Tensor | None = None
    """fp16 or fp32, added to the logit of a stored key after scale and softcap."""
    table_T: Tensor
    """int32 page ids of all streams; stream (b, h) owns those from `start_BK[b, h]` on."""
    start_BK: Tensor
    """int64."""
    length_BK: Tensor
    """int32, stored entries. Where `slots_BK` is given the new token is counted already."""
    max_length: int
    """No stream of the call is longer than this."""
    head_dim: int
    slots_BK: Tensor | None
    """int64 flat slot (page * N + slot) that takes the new k and v before attention, -1 = nothing is written for this
    stream. None: the new token is attended to from where it lies, last, and not stored, or (with k None) nothing is new."""
    live_B: Tensor | None = None
    """False: nothing is written for the sequence and its output is zero. None = all live."""
    oldest_B: Tensor | None = None
    """int32; stored keys at earlier positions are not seen (the architecture's sliding window)."""
    received_BKE: Tensor | None = None
    """fp32; weights summed over the G heads are added: column E - 1 is the new token's, column i entry i's."""
    received_old: bool = False
    """Whether the columns of stored entries are wanted too."""


def decode_attention(
    batch: DecodeBatch, q_BHD: Tensor, k_BKD: Tensor | None, v_BKD: Tensor | None, *, scale: float, softcap: float | None
) -> Tensor:  # fmt: skip
    """Attention output [B, H, D] of each sequence's one query, in q's dtype; writes and scores as `DecodeBatch` says."""
    if q_BHD.device.type == "cpu":
        kinds = [_KIND.get(pages.dtype) for pages in (batch.k_PND, batch.v_PND)]
        known = None not in kinds and q_BHD.dtype in _FLOATS
        library = native.library(*(native.KINDS[kind] for kind in kinds)) if known else None
        if library is not None:
            return _decode_native(library, batch, q_BHD, k_BKD, v_BKD, scale, softcap)
    elif q_BHD.is_cuda and (kernels := _triton()) is not None and kernels.fits(batch, q_BHD):
        return kernels.decode_triton(batch, q_BHD, k_BKD, v_BKD, scale=scale, softcap=softcap)
    return decode_reference(batch, q_BHD, k_BKD, v_BKD, scale=scale, softcap=softcap)


@cache
def _triton() -> ModuleType | None:
    """The kernels for CUDA; None where Triton is not installed."""
    return importlib.import_module("kvfold.ops.paged_triton") if importlib.util.find_spec("triton") else None


def decode_reference(
    batch: DecodeBatch,
    q_BHD: Tensor,
    k_BKD: Tensor | None,
    v_BKD: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """The same by gathering the pages of every stream side by side: simple, any device and dtype."""
    q_BHD, k_BKD = _as_keys_lie(batch, q_BHD, k_BKD)
    if batch.slots_BK is not None and k_BKD is not None:
        _write_new(batch, k_BKD, v_BKD)
    apart = k_BKD is not None and batch.slots_BK is None
    stored = int(batch.length_BK.max()) if batch.length_BK.numel() else 0
    flat_BKS, filled_BKS = stream_slots(batch.table_T, batch.start_BK, batch.length_BK, stored, batch.k_PND.shape[1])
    seen_BKE = filled_BKS
    if batch.oldest_B is not None:
        seen_BKE = seen_BKE & (batch.position_PN.reshape(-1)[flat_BKS] >= batch.oldest_B[:, None, None])
    wide = torch.promote_types(q_BHD.dtype, torch.float32)
    k_BKED, v_BKED = (
        _gathered(pool, scales, flat_BKS, batch.head_dim, wide)
        for pool, scales in ((batch.k_PND, batch.k_scale_PNS), (batch.v_PND, batch.v_scale_PNS))
    )
    bias_BKE = None if batch.bias_PN is None else batch.bias_PN.reshape(-1)[flat_BKS].to(wide)
    if apart:
        k_BKED = torch.cat((k_BKED, k_BKD.unsqueeze(2).to(wide)), dim=2)
        v_BKED = torch.cat((v_BKED, v_BKD.unsqueeze(2).to(wide)), dim=2)
        seen_BKE = torch.cat((seen_BKE, seen_BKE.new_ones((*seen_BKE.shape[:2], 1))), dim=2)
        bias_BKE = None if bias_BKE is None else torch.nn.functional.pad(bias_BKE, (0, 1))
    if batch.live_B is not None:
        seen_BKE = seen_BKE & batch.live_B[:, None, None]
    out, weights_BKE = _attend(q_BHD.to(wide), k_BKED, v_BKED, bias_BKE, seen_BKE, scale, softcap)
    if batch.score_PN is not None:
        batch.score_PN.view(-1).index_add_(0, flat_BKS.reshape(-1), weights_BKE[..., :stored].reshape(-1))
    if batch.received_BKE is not None:
        if batch.received_old:
            batch.received_BKE[..., :stored] += weights_BKE[..., :stored]
        if apart:
            batch.received_BKE[..., -1] += weights_BKE[..., stored]
    return out.to(q_BHD.dtype)


def _attend(
    q_BHD: Tensor, k_BKED: Tensor, v_BKED: Tensor, bias_BKE: Tensor | None, seen_BKE: Tensor, scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, H, D] and the weights [B, K, E] in fp32, summed over the group. What is not seen may be NaN."""
    unseen_BKE = ~seen_BKE
    q_BKGD = q_BHD.unflatten(1, (k_BKED.shape[1], -1))
    logits_BKGE = (q_BKGD @ k_BKED.masked_fill(unseen_BKE.unsqueeze(-1), 0).transpose(2, 3)) * scale
    if softcap is not None:
        logits_BKGE = torch.tanh(logits_BKGE / softcap) * softcap
    if bias_BKE is not None:
        logits_BKGE = logits_BKGE + bias_BKE.unsqueeze(2)
    hidden = unseen_BKE.unsqueeze(2)
    # A softmax over nothing but -inf is NaN: the second fill turns a query that sees nothing into zeros.
    weights_BKGE = logits_BKGE.masked_fill(hidden, -torch.inf).softmax(dim=-1).masked_fill(hidden, 0)
    out = weights_BKGE @ v_BKED.masked_fill(unseen_BKE.unsqueeze(-1), 0)
    return out.flatten(1, 2), weights_BKGE.sum(dim=2).float()


def _write_new(batch: DecodeBatch, k_BKD: Tensor, v_BKD: Tensor) -> None:
    """Write the new k and v, quantised, to their slots."""
    chosen = batch.slots_BK >= 0
    if batch.live_B is not None:
        chosen = chosen & batch.live_B[:, None]
    slots = batch.slots_BK[chosen]
    for pool, pool_scales, new in ((batch.k_PND, batch.k_scale_PNS, k_BKD), (batch.v_PND, batch.v_scale_PNS, v_BKD)):
        codes, scales = quantise(new[chosen], storage_of(pool.dtype))
        indexable(pool).view(-1, pool.shape[-1])[slots] = indexable(codes.to(pool.dtype))
        if scales is not None:
            pool_scales.view(-1, pool_scales.shape[-1])[slots] = scales


def _gathered(pool: Tensor, scales: Tensor | None, flat: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Vectors [*flat, D] of the pool's slots, dequantised."""
    codes = indexable(pool).reshape(-1, pool.shape[-1])[flat].view(pool.dtype)
    if scales is not None:
        scales = scales.reshape(-1, scales.shape[-1])[flat]
    return dequantise(codes, scales, storage_of(pool.dtype), head_dim, dtype)


def stream_slots(table_T: Tensor, start: Tensor, length: Tensor, stored: int, page_slots: int) -> tuple[Tensor, Tensor]:
    """Flat slots [..., stored] of the first `stored` entries of each stream, and which of them are filled.

    `start` and `length` have any one shape. What is not filled points at slot 0 of the pool, so that it can be gathered
    (and must be masked).
    """
    index = torch.arange(stored, device=table_T.device)
    filled = index < length.unsqueeze(-1)
    place = (start.unsqueeze(-1) + index // page_slots).masked_fill_(~filled, 0)
    if not table_T.numel():
        return place, filled
    flat = table_T[place].long() * page_slots + index % page_slots
    return flat.masked_fill_(~filled, 0), filled


_KIND = {
    torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3, torch.int8: 4, torch.uint8: 5,
}  # fmt: skip
"""C's number of a dtype: the place of its name in `native.KINDS`."""
CHECKS = os.environ.get("KVFOLD_CHECKS") == "1"
"""Whether each call's shapes and dtypes are looked at (tests): C itself checks nothing, and the store never errs in them."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_JOB = struct.Struct("21P 8q 5q 2d")
"""`decode_job` of paged_cpu.c, field for field."""


def _decode_native(
    library: native.Library, batch: DecodeBatch, q_BHD: Tensor, k_BKD: Tensor | None, v_BKD: Tensor | None,
    scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    rows, num_heads, head_dim = q_BHD.shape
    kv_heads = batch.length_BK.shape[1]
    pages, page_slots = batch.position_PN.shape
    received = batch.received_BKE
    if CHECKS:
        _check(batch, rows, kv_heads, num_heads, head_dim)
    if batch.k_PND.dtype == torch.uint8:  # int4
        q_BHD, k_BKD = _as_keys_lie(batch, q_BHD, k_BKD)
    # These tensors are held until C has returned: it gets bare addresses.
    q = q_BHD.contiguous()
    k, v = (None, None) if k_BKD is None else (x.to(q.dtype).contiguous() for x in (k_BKD, v_BKD))
    assert k is None or k.numel() == v.numel() == rows * kv_heads * head_dim
    books = batch.table_T, batch.start_BK, batch.length_BK, batch.slots_BK, batch.live_B, batch.oldest_B
    read = [None if x is None else x.contiguous() for x in books]
    out = torch.empty_like(q)
    job = _JOB.pack(
        *map(_pointer, (batch.k_PND, batch.v_PND, batch.k_scale_PNS, batch.v_scale_PNS, batch.score_PN, batch.bias_PN,
                        batch.position_PN, *read, q, k, v, out, received)),
        library.products, library.sums, library.parallel,
        rows, kv_heads, num_heads // kv_heads, head_dim, pages, page_slots,
        0 if received is None else received.shape[-1], torch.get_num_threads(),
        _KIND[batch.k_PND.dtype], _KIND[batch.v_PND.dtype], _KIND[q.dtype],
        0 if batch.bias_PN is None else _KIND[batch.bias_PN.dtype], batch.received_old, scale, softcap or 0.0,
    )  # fmt: skip
    if library.decode(job):
        raise MemoryError("no memory for the partial sums of decode attention")
    return out


def _as_keys_lie(batch: DecodeBatch, q_BHD: Tensor, k_BKD: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Queries and new keys in the channels in which the pool keeps its keys."""
    storage = storage_of(batch.k_PND.dtype)
    if storage != "int4":
        return q_BHD, k_BKD
    dtype = q_BHD.dtype
    return turned(q_BHD, storage).to(dtype), None if k_BKD is None else turned(k_BKD, storage).to(dtype)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check(batch: DecodeBatch, rows: int, kv_heads: int, num_heads: int, head_dim: int) -> None:
    """C checks nothing: a wrong size or dtype would be read out of bounds. Sizes, not shapes: this runs once a layer."""
    streams, slots = rows * kv_heads, batch.position_PN.numel()
    assert num_heads % kv_heads == 0 and head_dim == batch.head_dim
    for pages, scales in ((batch.k_PND, batch.k_scale_PNS), (batch.v_PND, batch.v_scale_PNS)):
        kind = _KIND[pages.dtype]
        assert pages.numel() == slots * (-(-head_dim // 2) if kind == 5 else head_dim) and pages.is_contiguous()
        if kind >= 4:
            assert scales.numel() == slots * -(-head_dim // GROUP_CHANNELS) and scales.is_contiguous()
            assert scales.dtype is torch.float16
    for tensor, dtype, size in (
        (batch.position_PN, torch.int32, slots), (batch.score_PN, torch.float32, slots),
        (batch.bias_PN, None, slots), (batch.received_BKE, torch.float32, None),
    ):  # fmt: skip
        if tensor is not None:
            assert tensor.dtype is dtype or (dtype is None and tensor.dtype in (torch.float16, torch.float32))
            assert tensor.numel() == (streams * tensor.shape[-1] if size is None else size) and tensor.is_contiguous()
    assert batch.table_T.dtype is batch.length_BK.dtype is torch.int32 and batch.start_BK.dtype is torch.int64
    assert batch.length_BK.numel() == batch.start_BK.numel() == streams
    assert batch.slots_BK is None or (batch.slots_BK.dtype is torch.int64 and batch.slots_BK.numel() == streams)
    assert batch.live_B is None or (batch.live_B.dtype is torch.bool and batch.live_B.numel() == rows)
    assert batch.oldest_B is None or (batch.oldest_B.dtype is torch.int32 and batch.oldest_B.numel() == rows)
