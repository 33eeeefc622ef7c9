"""Decode attention on CUDA, in Triton: the fast twin of `decode_reference` in paged.py for pages in fp32, fp16, bf16 and int8.

Three small kernels run one after the other, and none of them waits for the host. `_attend_span`: a program takes one span of
one KV stream, writes the new token where it falls into that span, and leaves a partial softmax; the grid is streams x spans of
the host's upper bound, and a program past its stream's end exits at once, so that streams may differ in length as they like.
`_join_spans`: a program a query head joins the partial softmaxes by log-sum-exp, together with a new token that is not stored.
`_hand_out`: only where weights are wanted (H2O, TOVA), it turns kept logits into weights and adds them to their slots.

Letters: B sequences, H query heads, K kv heads, G = H // K, D head dim, P pages of the pool, N slots a page, S entries of one
tile, T entries of the table, E columns of `received`. A stream is one (sequence, KV head), number b * K + k.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.ops.paged import DecodeBatch

_GROUP_CHANNELS = tl.constexpr(32)
"""Channels that share one scale."""
_CODE_MAX = tl.constexpr(127.0)
_SCALE_MAX = tl.constexpr(65504.0)
"""The largest fp16 number."""
_ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and subtracting it rounds a small fp32 number to the nearest integer, ties to even."""

_SMALL = ["table", "starts", "lengths", "slots", "live", "oldest", "received"]
"""Parameters that may be cut out of a larger tensor at any place: no machine code of its own for those that lie aligned."""
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_OPTIONS = {"enable_fp_fusion": True}
"""Said because Triton's default changes in 3.10."""
_MAX_GROUP = 64
_MAX_HEAD_DIM = 256
_MAX_PROGRAMS = 1 << 16
"""Programs of `_attend_span` at most: bounds the scratch memory of a long upper bound, 34 MB for one head of 128 channels."""
_MAX_SPANS = 65535
"""CUDA's limit of the second axis of a grid."""


@triton.jit
def _load_vectors(
    pool, scales, flat_S, seen_S, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, D_TILE: tl.constexpr
):  # fmt: skip
    """Vectors [TILE, D_TILE] of flat slots, dequantised to fp32 where there are scales; zeros where nothing is seen."""
    channel = tl.arange(0, D_TILE)
    mask = seen_S[:, None] & (channel < HEAD_DIM)[None, :]
    x = tl.load(pool + flat_S[:, None] * HEAD_DIM + channel[None, :], mask=mask, other=0)
    if scales is not None:
        GROUPS: tl.constexpr = (HEAD_DIM + _GROUP_CHANNELS - 1) // _GROUP_CHANNELS
        group = tl.arange(0, D_TILE // _GROUP_CHANNELS)
        mask = seen_S[:, None] & (group < GROUPS)[None, :]
        scale = tl.load(scales + flat_S[:, None] * GROUPS + group[None, :], mask=mask, other=0.0)
        x = tl.reshape(x.to(tl.float32), (TILE, D_TILE // _GROUP_CHANNELS, _GROUP_CHANNELS))
        x = tl.reshape(x * scale.to(tl.float32)[:, :, None], (TILE, D_TILE))
    return x


@triton.jit
def _write_vector(new, pool, scales, slot, writes, HEAD_DIM: tl.constexpr, D_TILE: tl.constexpr):
    """Write one new vector to its slot, quantised as ops/quantised.py does where there are scales."""
    channel = tl.arange(0, D_TILE)
    mask = channel < tl.where(writes, HEAD_DIM, 0)
    x = tl.load(new + channel, mask=mask, other=0.0).to(tl.float32)
    if scales is not None:
        GROUPS: tl.constexpr = (HEAD_DIM + _GROUP_CHANNELS - 1) // _GROUP_CHANNELS
        group = tl.arange(0, D_TILE // _GROUP_CHANNELS)
        x = tl.reshape(x, (D_TILE // _GROUP_CHANNELS, _GROUP_CHANNELS))
        scale = tl.minimum(tl.div_rn(tl.max(tl.abs(x), axis=1), _CODE_MAX), _SCALE_MAX).to(tl.float16)
        # The maximum of numbers and NaN is a number on a GPU, and a NaN must not become an ordinary code.
        scale = tl.where(tl.max((x != x).to(tl.int32), axis=1) > 0, float("nan"), scale).to(tl.float16)
        tl.store(scales + slot * GROUPS + group, scale, mask=group < tl.where(writes, GROUPS, 0))
        step = scale.to(tl.float32)
        codes = tl.div_rn(x, tl.where(step > 0, step, 1.0)[:, None])
        codes = tl.where((step > 0)[:, None], codes, 0.0)
        codes = tl.minimum(tl.maximum(codes, -_CODE_MAX), _CODE_MAX)
        x = tl.reshape((codes + _ROUNDER) - _ROUNDER, (D_TILE,))
    tl.store(pool + slot * HEAD_DIM + channel, x.to(pool.dtype.element_ty), mask=mask)


@triton.jit
def _capped(logits, softcap):
    """softcap * tanh(logits / softcap), by exp: the interpreter knows no tanh."""
    if softcap is not None:
        logits = softcap * (1.0 - 2.0 / (tl.exp(logits * (2.0 / softcap)) + 1.0))
    return logits


@triton.jit(do_not_specialize=["span_tiles", "num_spans", "logit_width"], do_not_specialize_on_alignment=_SMALL)
def _attend_span(
    q, k_pool, v_pool, k_scales, v_scales, positions, biases, table, starts, lengths, slots, live, oldest, k_new, v_new,
    sums, stats, logits, span_tiles, num_spans, logit_width, scale, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    G_TILE: tl.constexpr, D_TILE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One span of one stream: sums [G, D] of exp(logit - top) * value, and (top, sum of exp(logit - top)) of each head."""
    stream, span = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + stream)
    if live is not None:
        length = tl.where(tl.load(live + stream // KV_HEADS) != 0, length, 0)
    first = span * span_tiles * TILE
    if first >= length:
        return
    last = tl.minimum(first + span_tiles * TILE, length)
    table += tl.load(starts + stream)
    if k_new is not None:
        # Only the program whose span holds the slot's page writes, and it alone reads that slot afterwards.
        slot = tl.load(slots + stream)
        holds = 0
        for index in tl.range(first // PAGE, tl.cdiv(last, PAGE), 16):
            place = index + tl.arange(0, 16)
            page = tl.load(table + place, mask=place * PAGE < last, other=-1)
            holds = tl.maximum(holds, tl.max((page == slot // PAGE).to(tl.int32), axis=0))
        writes = (holds > 0) & (slot >= 0)
        _write_vector(k_new + stream * HEAD_DIM, k_pool, k_scales, slot, writes, HEAD_DIM, D_TILE)
        _write_vector(v_new + stream * HEAD_DIM, v_pool, v_scales, slot, writes, HEAD_DIM, D_TILE)
        tl.debug_barrier()

    group, channel = tl.arange(0, G_TILE), tl.arange(0, D_TILE)
    head = stream.to(tl.int64) * GROUP  # the first of the stream
    q_mask = (group < GROUP)[:, None] & (channel < HEAD_DIM)[None, :]
    q += head * HEAD_DIM
    q_GD = tl.load(q + group[:, None] * HEAD_DIM + channel[None, :], mask=q_mask, other=0.0)
    top_G = tl.full((G_TILE,), float("-inf"), tl.float32)
    total_G = tl.zeros((G_TILE,), tl.float32)
    sum_GD = tl.zeros((G_TILE, D_TILE), tl.float32)
    for begin in tl.range(first, last, TILE, num_stages=STAGES):
        entry_S = begin + tl.arange(0, TILE)
        seen_S = entry_S < last
        page_S = tl.load(table + entry_S // PAGE, mask=seen_S, other=0)
        flat_S = page_S.to(tl.int64) * PAGE + entry_S % PAGE
        if oldest is not None:
            position_S = tl.load(positions + flat_S, mask=seen_S, other=0)
            seen_S = seen_S & (position_S >= tl.load(oldest + stream // KV_HEADS))
        k_SD = _load_vectors(k_pool, k_scales, flat_S, seen_S, HEAD_DIM, TILE, D_TILE)
        logit_GS = tl.dot(q_GD, tl.trans(k_SD.to(q_GD.dtype)), input_precision="ieee")
        logit_GS = _capped(logit_GS * scale, softcap)
        if biases is not None:
            logit_GS += tl.load(biases + flat_S, mask=seen_S, other=0.0).to(tl.float32)[None, :]
        logit_GS = tl.where(seen_S[None, :], logit_GS, float("-inf"))
        if logits is not None:
            mask = (group < GROUP)[:, None] & (entry_S < last)[None, :]
            place_GS = logits + head * logit_width + (group[:, None] * logit_width + entry_S[None, :])
            tl.store(place_GS, logit_GS, mask=mask)
        # Subtracting -inf from -inf would be NaN: where nothing is seen yet, 0 is subtracted. A NaN logit stays NaN.
        new_top_G = tl.maximum(top_G, tl.max(logit_GS, axis=1))
        shift_G = tl.where(new_top_G == float("-inf"), 0.0, new_top_G)
        weight_GS = tl.exp(logit_GS - shift_G[:, None])
        keep_G = tl.exp(top_G - shift_G)
        total_G = total_G * keep_G + tl.sum(weight_GS, axis=1)
        v_SD = _load_vectors(v_pool, v_scales, flat_S, seen_S, HEAD_DIM, TILE, D_TILE)
        sum_GD *= keep_G[:, None]
        sum_GD += tl.dot(weight_GS.to(q_GD.dtype), v_SD.to(q_GD.dtype), input_precision="ieee")
        top_G = new_top_G

    part = head * num_spans + span
    tl.store(sums + part * HEAD_DIM + group[:, None] * (num_spans * HEAD_DIM) + channel[None, :], sum_GD, mask=q_mask)
    tl.store(stats + part * 2 + group * (num_spans * 2), top_G, mask=group < GROUP)
    tl.store(stats + part * 2 + group * (num_spans * 2) + 1, total_G, mask=group < GROUP)


@triton.jit(do_not_specialize=["span_slots", "num_spans"], do_not_specialize_on_alignment=_SMALL)
def _join_spans(
    out, q, lengths, live, k_new, v_new, sums, stats, ends, span_slots, num_spans, scale, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D_TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Output of one query head. `ends` [B*H, 2]: log-sum-exp of its logits, and the logit of the new token apart."""
    head = tl.program_id(0)
    stream = head // GROUP
    length = tl.load(lengths + stream)
    lives = 1
    if live is not None:
        lives = (tl.load(live + stream // KV_HEADS) != 0).to(tl.int32)
        length *= lives
    channel = tl.arange(0, D_TILE)
    inside = channel < HEAD_DIM
    top, total = float("-inf"), 0.0
    sum_D = tl.zeros((D_TILE,), tl.float32)
    new_logit = float("-inf")
    if k_new is not None:
        q_D = tl.load(q + head.to(tl.int64) * HEAD_DIM + channel, mask=inside, other=0.0).to(tl.float32)
        k_D = tl.load(k_new + stream * HEAD_DIM + channel, mask=inside, other=0.0).to(tl.float32)
        v_D = tl.load(v_new + stream * HEAD_DIM + channel, mask=inside, other=0.0).to(tl.float32)
        logit = _capped(tl.sum(q_D * k_D) * scale, softcap)
        new_logit = tl.where(lives > 0, logit, float("-inf"))
        top = new_logit
        total = tl.where(lives > 0, tl.exp(logit - logit), 0.0)  # 1, or NaN for a NaN logit
        sum_D = tl.where(lives > 0, v_D, 0.0)
    first = head.to(tl.int64) * num_spans
    for begin in tl.range(0, tl.cdiv(length, span_slots), PARTS):
        part_P = begin + tl.arange(0, PARTS)
        used_P = part_P * span_slots < length
        top_P = tl.load(stats + (first + part_P) * 2, mask=used_P, other=float("-inf"))
        total_P = tl.load(stats + (first + part_P) * 2 + 1, mask=used_P, other=0.0)
        mask = used_P[:, None] & inside[None, :]
        sum_PD = tl.load(sums + (first + part_P)[:, None] * HEAD_DIM + channel[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(top_P, axis=0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        share_P, keep = tl.exp(top_P - shift), tl.exp(top - shift)
        total = total * keep + tl.sum(total_P * share_P, axis=0)
        sum_D = sum_D * keep + tl.sum(sum_PD * share_P[:, None], axis=0)
        top = new_top
    nothing = total == 0.0
    out_D = tl.where(nothing, 0.0, sum_D / tl.where(nothing, 1.0, total))
    tl.store(out + head.to(tl.int64) * HEAD_DIM + channel, out_D.to(out.dtype.element_ty), mask=inside)
    if ends is not None:
        shift = tl.where(top == float("-inf"), 0.0, top)
        tl.store(ends + head * 2, shift + tl.log(tl.where(nothing, 1.0, total)))
        tl.store(ends + head * 2 + 1, new_logit)


@triton.jit(do_not_specialize=["logit_width", "received_width"], do_not_specialize_on_alignment=_SMALL)
def _hand_out(
    logits, ends, scores, received, table, starts, lengths, live, logit_width, received_width,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, OLD: tl.constexpr,
    NEW: tl.constexpr,
):  # fmt: skip
    """Weights of one tile of a stream, summed over its heads, added to `scores` [P, N] and `received` [B, K, E]."""
    stream, tile = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + stream)
    if live is not None:
        length = tl.where(tl.load(live + stream // KV_HEADS) != 0, length, 0)
    if received is not None:
        received += stream.to(tl.int64) * received_width
    if NEW and tile == 0:
        weight = 0.0
        for g in tl.static_range(GROUP):
            weight += tl.exp(tl.load(ends + (stream * GROUP + g) * 2 + 1) - tl.load(ends + (stream * GROUP + g) * 2))
        last = received + received_width - 1
        tl.store(last, tl.load(last) + weight)
    if logits is not None:
        entry_S = tile * TILE + tl.arange(0, TILE)
        stored_S = entry_S < length
        weight_S = tl.zeros((TILE,), tl.float32)
        for g in tl.static_range(GROUP):
            head = stream * GROUP + g
            logit_S = tl.load(logits + head.to(tl.int64) * logit_width + entry_S, mask=stored_S, other=float("-inf"))
            weight_S += tl.exp(logit_S - tl.load(ends + head * 2))
        if scores is not None:
            page_S = tl.load(table + tl.load(starts + stream) + entry_S // PAGE, mask=stored_S, other=0)
            place_S = scores + page_S.to(tl.int64) * PAGE + entry_S % PAGE
            tl.store(place_S, tl.load(place_S, mask=stored_S, other=0.0) + weight_S, mask=stored_S)
        if OLD:
            place_S = received + entry_S
            tl.store(place_S, tl.load(place_S, mask=stored_S, other=0.0) + weight_S, mask=stored_S)


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One kernel of a call, ready to be launched or compiled."""

    kernel: Any
    """What `triton.jit` gave."""
    grid: tuple[int, ...]
    """Programs along each axis."""
    arguments: dict[str, Any]
    """Tensors, numbers and None by parameter."""
    constants: dict[str, Any]
    """What is compiled in."""
    options: dict[str, int]
    """Warps."""

    def run(self) -> None:
        """Put it on the current stream."""
        self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """How `_attend_span` cuts its work; `kvfold.bench.gpu` tries others."""

    tile: int
    """Entries taken at once, a power of two."""
    warps: int
    """Warps of a program."""
    stages: int
    """Tiles whose loads are under way at once."""
    span_slots: int
    """Entries of a program, a multiple of `tile`."""


def tiling(head_dim: int, itemsize: int, streams: int, max_length: int, processors: int) -> Tiling:
    """The default tiling. `itemsize`: bytes of a number of q; `processors`: the device's multiprocessors."""
    # More would not fit into registers: `studies/cubins.py` shows it.
    tile = 16 if itemsize > 2 else (64 if head_dim <= 128 else 32)
    # Spans of 256 entries, of 128 where the machine would not be filled, and longer ones where there are very many.
    span = 256 if streams * -(-max_length // 256) >= 4 * processors else 128
    while streams * -(-max_length // span) > _MAX_PROGRAMS or -(-max_length // span) > _MAX_SPANS:
        span *= 2
    return Tiling(tile=tile, warps=4, stages=3, span_slots=span)


def fits(batch: DecodeBatch, q_BHD: Tensor) -> bool:
    """Whether the kernels know the call's dtypes and sizes; where not, `decode_reference` takes it."""
    page_slots = batch.k_PND.shape[1]
    return (
        q_BHD.dtype in _FLOATS
        and all(pool.dtype in (*_FLOATS, torch.int8) for pool in (batch.k_PND, batch.v_PND))
        and batch.head_dim <= _MAX_HEAD_DIM
        and q_BHD.shape[1] // batch.length_BK.shape[1] <= _MAX_GROUP
        and page_slots & (page_slots - 1) == 0
    )


def decode_triton(
    batch: DecodeBatch, q_BHD: Tensor, k_BKD: Tensor | None, v_BKD: Tensor | None, *, scale: float, softcap: float | None,
    tiled: Tiling | None = None,
) -> Tensor:  # fmt: skip
    """Attention output [B, H, D] of each sequence's one query, in q's dtype; writes and scores as `DecodeBatch` says.

    Asks the host nothing, so that a CUDA graph can hold it. The call must be one that `fits`. Keys and values are read in
    their storage, multiplied in q's dtype and summed in fp32. Pages that are written or scored belong to one stream each.
    """
    out_BHD, launches = plan_launches(batch, q_BHD, k_BKD, v_BKD, scale=scale, softcap=softcap, tiled=tiled)
    with torch.cuda.device_of(q_BHD):  # Triton launches on the current device
        for launch in launches:
            launch.run()
    return out_BHD


def plan_launches(
    batch: DecodeBatch, q_BHD: Tensor, k_BKD: Tensor | None, v_BKD: Tensor | None, *, scale: float, softcap: float | None,
    tiled: Tiling | None = None,
) -> tuple[Tensor, list[Launch]]:  # fmt: skip
    """The output, still empty, and the kernels that fill it, in order."""
    rows, num_heads, head_dim = q_BHD.shape
    kv_heads, page_slots = batch.length_BK.shape[1], batch.k_PND.shape[1]
    streams, group = rows * kv_heads, num_heads // kv_heads
    # Kernels check nothing: a wrong shape would be read out of bounds.
    assert num_heads == group * kv_heads and batch.k_PND.shape[2] == batch.v_PND.shape[2] == head_dim == batch.head_dim
    assert all(x is None or x.is_contiguous() for x in (
        batch.k_PND, batch.v_PND, batch.k_scale_PNS, batch.v_scale_PNS, batch.position_PN, batch.score_PN, batch.bias_PN,
        batch.table_T, batch.start_BK, batch.length_BK, batch.slots_BK, batch.oldest_B, batch.received_BKE,
    ))  # fmt: skip
    assert (batch.k_PND.dtype == torch.int8) == (batch.k_scale_PNS is not None)
    assert (batch.v_PND.dtype == torch.int8) == (batch.v_scale_PNS is not None)
    q, k, v = (None if x is None else x.contiguous() for x in (q_BHD, k_BKD, v_BKD))
    out = torch.empty_like(q)
    if not streams:
        return out, []
    tiled = tiled or tiling(head_dim, q.itemsize, streams, batch.max_length, _processors(q.device.index))
    assert tiled.span_slots % tiled.tile == 0
    spans = -(-batch.max_length // tiled.span_slots)
    written = k is not None and batch.slots_BK is not None
    apart = k is not None and batch.slots_BK is None
    received = batch.received_BKE
    columns = received is not None and batch.received_old
    old = batch.score_PN is not None or columns
    new = received is not None and apart
    live = None if batch.live_B is None else batch.live_B.view(torch.uint8)
    fp32 = {"dtype": torch.float32, "device": q.device}
    sums = torch.empty(streams * group * spans * head_dim, **fp32)
    stats = torch.empty(streams * group * spans * 2, **fp32)
    width = spans * tiled.span_slots
    logits = torch.empty(streams * group * width, **fp32) if old and width else None
    ends = torch.empty(streams * group * 2, **fp32) if old or new else None
    same = {"KV_HEADS": kv_heads, "GROUP": group}
    d_tile = max(32, triton.next_power_of_2(head_dim))
    numbers = {"scale": float(scale), "softcap": None if softcap is None else float(softcap)}
    launches = []
    if spans:
        launches.append(Launch(
            kernel=_attend_span, grid=(streams, spans), options={"num_warps": tiled.warps, **_OPTIONS},
            arguments={
                "q": q, "k_pool": batch.k_PND, "v_pool": batch.v_PND, "k_scales": batch.k_scale_PNS,
                "v_scales": batch.v_scale_PNS, "positions": None if batch.oldest_B is None else batch.position_PN,
                "biases": batch.bias_PN, "table": batch.table_T, "starts": batch.start_BK, "lengths": batch.length_BK,
                "slots": batch.slots_BK if written else None, "live": live, "oldest": batch.oldest_B,
                "k_new": k if written else None, "v_new": v if written else None, "sums": sums, "stats": stats,
                "logits": logits, "span_tiles": tiled.span_slots // tiled.tile, "num_spans": spans, "logit_width": width,
                **numbers,
            },
            constants={
                **same, "HEAD_DIM": head_dim, "PAGE": page_slots, "D_TILE": d_tile, "TILE": tiled.tile,
                "G_TILE": max(16, triton.next_power_of_2(group)), "STAGES": tiled.stages,
            },
        ))  # fmt: skip
    launches.append(Launch(
        kernel=_join_spans, grid=(streams * group,), options={"num_warps": 4, **_OPTIONS},
        arguments={
            "out": out, "q": q, "lengths": batch.length_BK, "live": live, "k_new": k if apart else None,
            "v_new": v if apart else None, "sums": sums, "stats": stats, "ends": ends, "span_slots": tiled.span_slots,
            "num_spans": spans, **numbers,
        },
        constants={**same, "HEAD_DIM": head_dim, "D_TILE": d_tile, "PARTS": 16},
    ))  # fmt: skip
    if ends is not None:
        tile, tiles = 512, max(1, -(-batch.max_length // 512)) if old else 1
        launches.append(Launch(
            kernel=_hand_out, grid=(streams, tiles), options={"num_warps": 4, **_OPTIONS},
            arguments={
                "logits": logits, "ends": ends, "scores": batch.score_PN, "received": received, "table": batch.table_T,
                "starts": batch.start_BK, "lengths": batch.length_BK, "live": live, "logit_width": width,
                "received_width": 0 if received is None else received.shape[-1],
            },
            constants={**same, "PAGE": page_slots, "TILE": tile, "OLD": columns, "NEW": new},
        ))  # fmt: skip
    return out, launches


@functools.cache
def _processors(device: int | None) -> int:
    """Multiprocessors of a CUDA device; without one (Triton's interpreter) those of an H200."""
    return 132 if device is None else torch.cuda.get_device_properties(device).multi_processor_count
