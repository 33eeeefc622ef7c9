"""Decode attention on the CPU against what its bytes need: time, bytes read, and the share of the memory's bandwidth.

Each repetition reads a stretch of a large buffer (the bandwidth) and makes one call over pages that are not in a cache (the
op), so both meet the same machine. Pages are shuffled, the worst case, unless asked otherwise. Letters: B sequences,
K kv heads, D head dim, P pages, N slots a page.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from kvfold.bench.roofline import BUFFER_BYTES, Reader
from kvfold.ops import native
from kvfold.ops.paged import DecodeBatch, decode_attention
from kvfold.ops.quantised import page_width, quantise, scale_groups, storage_dtype

Row = dict[str, Any]
_MODEL_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_COLD_BYTES = BUFFER_BYTES
"""Pages of all calls together: more than a cache keeps between two visits."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KernelShape:
    """The sizes of a call."""

    batch: int = 8
    """Sequences."""
    kv_heads: int = 3
    """KV heads of a layer."""
    group: int = 3
    """Query heads of a KV head."""
    head_dim: int = 64
    """Channels."""
    page_slots: int = 16
    """Slots of a page."""

    def streams(self) -> int:
        """KV streams of a call."""
        return self.batch * self.kv_heads


def measure_kernel(
    *,
    shape: KernelShape | None = None,
    storages: Sequence[str] = native.KINDS,
    tokens: Sequence[int] = (1024, 4096),
    spreads: Sequence[int] = (1, 100),
    repeats: int = 30,
    shuffled: bool = True,
) -> Iterator[Row]:
    """A row for each storage, mean length and spread (longest stream over shortest).

    `ms` and `read_gb_per_s` are the best of the repetitions, and `share` is their ratio; `share_median` is the median of
    the ratios of neighbouring repetitions. Threads are torch's.
    """
    shape = shape or KernelShape()
    read = Reader()
    for storage in storages:
        for mean in tokens:
            for spread in spreads:
                yield _measure(shape, storage, mean, spread, repeats, shuffled, read)


def _measure(
    shape: KernelShape, storage: str, mean: int, spread: int, repeats: int, shuffled: bool, read: Reader
) -> Row:
    lengths = stream_lengths(shape.streams(), mean, spread)
    batches = _layers(shape, storage, lengths, shuffled)
    queries = (shape.batch, shape.kv_heads * shape.group, shape.head_dim)
    q_BHD = torch.randn(queries).to(_MODEL_DTYPES.get(storage, torch.float32))
    num_bytes = int(lengths.sum()) * slot_bytes(storage, shape.head_dim)
    scale = shape.head_dim**-0.5
    calls, reads = [], []
    nearly_nothing = dataclasses.replace(batches[0], length_BK=torch.ones_like(batches[0].length_BK))
    for turn in range(repeats + 1):
        batch = batches[turn % len(batches)]
        reads.append(read.rate())
        # The read has driven Python's own code out of the caches too; what its return takes is not the op's.
        decode_attention(nearly_nothing, q_BHD, None, None, scale=scale, softcap=None)
        calls.append(
            num_bytes / _seconds(lambda b=batch: decode_attention(b, q_BHD, None, None, scale=scale, softcap=None))
        )
    calls, reads = calls[1:], reads[1:]  # the first of each compiles, or touches memory for the first time
    library = native.library(storage, storage)
    return {
        "op": "decode attention", "isa": "plain torch" if library is None else library.isa,
        "threads": torch.get_num_threads(), **dataclasses.asdict(shape), "storage": storage, "tokens": mean,
        "spread": spread, "pages": "shuffled" if shuffled else "in order", "bytes": num_bytes,
        "ms": 1e3 * num_bytes / max(calls), "gb_per_s": max(calls) / 1e9, "read_gb_per_s": max(reads) / 1e9,
        "share": max(calls) / max(reads),
        "share_median": median(call / rate for call, rate in zip(calls, reads, strict=True)), "repeats": repeats,
    }  # fmt: skip


def stream_lengths(streams: int, mean: int, spread: int) -> Tensor:
    """Lengths [streams] in a shuffled order, the longest `spread` times the shortest, about evenly by their logarithm."""
    weights = torch.logspace(0, 1, streams, base=spread, dtype=torch.float64)
    order = torch.randperm(streams, generator=torch.Generator().manual_seed(0))
    return (weights / weights.mean() * mean).round().clamp(min=1).int()[order]


def slot_bytes(storage: str, head_dim: int) -> int:
    """Bytes of one stored key and value, scales included."""
    kind, dtype = _page_kind(storage)
    scales = 2 * scale_groups(head_dim) if storage in ("int8", "int4") else 0
    return 2 * (page_width(kind, head_dim) * storage_dtype(kind, dtype).itemsize + scales)


def _page_kind(storage: str) -> tuple[str, torch.dtype]:
    """Storage and model dtype by one of `native.KINDS`."""
    return ("model", _MODEL_DTYPES[storage]) if storage in _MODEL_DTYPES else (storage, torch.float32)


def _layers(shape: KernelShape, storage: str, lengths: Tensor, shuffled: bool) -> list[DecodeBatch]:
    """Calls over parts of one pool, as many as make it large."""
    pages_each = -(-lengths.long() // shape.page_slots)
    pages = int(pages_each.sum())
    page_bytes = shape.page_slots * slot_bytes(storage, shape.head_dim)
    layers = max(2, min(32, _COLD_BYTES // (pages * page_bytes)))
    (k_PND, k_scale_PNS), (v_PND, v_scale_PNS) = (_pool(shape, storage, layers * pages, seed) for seed in (0, 1))
    draw = torch.Generator().manual_seed(2)
    table_T = (torch.randperm(layers * pages, generator=draw) if shuffled else torch.arange(layers * pages)).int()
    start_BK = (pages_each.cumsum(0) - pages_each).view(shape.batch, shape.kv_heads)
    return [
        DecodeBatch(
            k_PND=k_PND, v_PND=v_PND, k_scale_PNS=k_scale_PNS, v_scale_PNS=v_scale_PNS,
            position_PN=torch.zeros(k_PND.shape[:2], dtype=torch.int32), table_T=table_T,
            start_BK=start_BK + layer * pages, length_BK=lengths.view(shape.batch, shape.kv_heads),
            max_length=int(lengths.max()), head_dim=shape.head_dim, slots_BK=None,
        )
        for layer in range(layers)
    ]  # fmt: skip


def _pool(shape: KernelShape, storage: str, pages: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """Pages and scales: a few random pages, over and over."""
    kind, dtype = _page_kind(storage)
    draw = torch.Generator().manual_seed(seed)
    few = torch.randn(64, shape.page_slots, shape.head_dim, generator=draw).to(dtype)
    codes, scales = quantise(few, kind)
    return _repeated(codes, pages), None if scales is None else _repeated(scales, pages)


def _repeated(few: Tensor, pages: int) -> Tensor:
    large = native.huge_pages(torch.empty((pages, *few.shape[1:]), dtype=few.dtype))
    for first in range(0, pages, few.shape[0]):
        part = large[first : first + few.shape[0]]
        part.copy_(few[: part.shape[0]])
    return large


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
