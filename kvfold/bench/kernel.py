"""The decode-attention op alone: kinds of calls, made up of random pages; and on the CPU, its time against what its bytes need.

There each repetition reads a stretch of a large buffer (the bandwidth) and makes one call over pages that are not in a cache (the
op), so both meet the same machine; pages are shuffled, the worst case.
Letters: B sequences, K kv heads, D head dim, P pages, N slots a page, S scale groups, T entries of the table.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor

from kvfold.bench.measuring import BUFFER_BYTES, Reader, seconds
from kvfold.methods.bits import storage_bytes
from kvfold.ops import native
from kvfold.ops.paged import DecodeBatch, decode_attention, stream_slots
from kvfold.ops.quantised import quantise, scale_groups

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A kind of call that gets machine code of its own: dtypes of queries and new tokens, of key and of value pages; query heads
    of a KV head, channels, slots of a page; whether the new token has a slot (or is attended to from where it lies), weights are
    handed out, to slots and by column, slots have a bias, and keys are hidden by age; and what logits are capped at.
    """

    q: torch.dtype = torch.bfloat16
    k_pages: torch.dtype = torch.bfloat16
    v_pages: torch.dtype = torch.bfloat16
    group: int = 1
    head_dim: int = 128
    page_slots: int = 16
    written: bool = True
    scored: bool = False
    biased: bool = False
    windowed: bool = False
    softcap: float | None = None

    def describe(self) -> dict[str, Any]:
        """What tells this variant from others, for a row of a table."""
        extras = [name for name in ("written", "scored", "biased", "windowed") if getattr(self, name)]
        return {
            **{name: str(getattr(self, name)).removeprefix("torch.") for name in ("q", "k_pages", "v_pages")},
            **{name: getattr(self, name) for name in ("group", "head_dim", "page_slots")},
            "extras": extras + (["softcap"] if self.softcap is not None else []),
        }

    def slot_bytes(self) -> int:
        """Bytes of one stored key and value, scales included."""
        pages = (self.k_pages, self.v_pages)
        kinds = ["int8" if dtype == torch.int8 else "model" for dtype in pages]
        return sum(storage_bytes(kind, self.head_dim, dtype.itemsize) for kind, dtype in zip(kinds, pages, strict=True))


_ALL = {"scored": True, "biased": True, "windowed": True}
_INT8 = {"k_pages": torch.int8, "v_pages": torch.int8}
_HALF = dict.fromkeys(("q", "k_pages", "v_pages"), torch.float16)
_SINGLE = dict.fromkeys(("q", "k_pages", "v_pages"), torch.float32)
VARIANTS = (
    *(Variant(group=group, head_dim=head_dim) for group in (1, 4, 8) for head_dim in (64, 128, 256)),
    *(Variant(group=3, head_dim=head_dim, **_HALF) for head_dim in (64, 80, 96)),
    *(Variant(group=group, **_INT8) for group in (1, 4, 16)),
    Variant(group=8, head_dim=256, page_slots=32, **_INT8),
    Variant(group=4, k_pages=torch.int8),
    Variant(group=4, **_SINGLE),
    Variant(group=1, q=torch.float32, **_INT8),
    Variant(group=4, page_slots=32),
    Variant(group=64),
    Variant(group=1, written=False, **_ALL),
    Variant(group=4, written=False, **_ALL),
    Variant(group=4, written=False, **_INT8, **_ALL),
    Variant(group=2, head_dim=256, softcap=50.0, windowed=True),
)
"""The main variants: every dtype, head dims that fill a tile and that don't, groups, page sizes and extras."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """The arguments of `decode_attention`."""

    batch: DecodeBatch
    q_BHD: Tensor
    k_BKD: Tensor
    v_BKD: Tensor
    scale: float
    softcap: float | None


def random_call(
    variant: Variant, stored_BK: Tensor, *, device: torch.device | str, seed: int = 0, poisoned: bool = True
) -> Call:
    """A call over shuffled pages of random numbers. `stored_BK`: entries of each stream before the new token, on the CPU.

    `poisoned`: NaN wherever nothing is stored. Every third sequence is dead where there are three or more.
    """
    draw = torch.Generator(device).manual_seed(seed)
    rows, kv_heads = stored_BK.shape
    slots, head_dim = variant.page_slots, variant.head_dim
    pages_BK = stored_BK // slots + 1
    pages = int(pages_BK.sum()) + 1  # one that nobody holds
    start_BK = (pages_BK.view(-1).cumsum(0) - pages_BK.view(-1)).view(rows, kv_heads).to(device)
    table_T = torch.randperm(pages, generator=draw, device=device).int()
    length_BK = (stored_BK + variant.written).int().to(device)
    flat_BKS, filled_BKS = stream_slots(table_T, start_BK, length_BK, int(length_BK.max()), slots)
    last_BK = (length_BK.long() - 1).clamp(min=0).unsqueeze(-1)
    slots_BK = flat_BKS.gather(2, last_BK).squeeze(-1) if variant.written else None
    live_B = torch.arange(rows, device=device) % 3 != 2

    def numbers(*shape: int, dtype: torch.dtype = variant.q) -> Tensor:
        return torch.randn(*shape, generator=draw, device=device, dtype=dtype)

    def pool(dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if dtype != torch.int8:
            return numbers(pages, slots, head_dim, dtype=dtype), None
        codes = torch.randint(-127, 128, (pages, slots, head_dim), generator=draw, device=device, dtype=torch.int8)
        # Vectors of the same spread as those above.
        return codes, numbers(pages, slots, scale_groups(head_dim), dtype=torch.float16).abs() / 73

    (k_PND, k_scale_PNS), (v_PND, v_scale_PNS) = pool(variant.k_pages), pool(variant.v_pages)
    if poisoned:
        free = torch.ones(pages * slots, dtype=torch.bool, device=device)
        free[flat_BKS[filled_BKS]] = False
        if slots_BK is not None:
            free[slots_BK] = True
        for codes, scales in ((k_PND, k_scale_PNS), (v_PND, v_scale_PNS)):
            (codes if scales is None else scales).flatten(0, 1)[free] = torch.nan
    position = torch.zeros(pages * slots, dtype=torch.int32, device=device)
    entries = torch.arange(flat_BKS.shape[-1], device=device, dtype=torch.int32).expand_as(flat_BKS)
    position[flat_BKS[filled_BKS]] = entries[filled_BKS]
    max_length = int(length_BK.max())
    batch = DecodeBatch(
        k_PND=k_PND, v_PND=v_PND, k_scale_PNS=k_scale_PNS, v_scale_PNS=v_scale_PNS,
        position_PN=position.view(pages, slots),
        score_PN=torch.zeros(pages, slots, device=device) if variant.scored else None,
        bias_PN=numbers(pages, slots, dtype=torch.float16) if variant.biased else None,
        table_T=table_T, start_BK=start_BK, length_BK=length_BK, max_length=max_length, head_dim=head_dim,
        slots_BK=slots_BK, live_B=live_B if rows > 2 else None,
        oldest_B=length_BK.amax(dim=1) // 3 if variant.windowed else None,
        received_BKE=torch.zeros(rows, kv_heads, max_length + 1, device=device) if variant.scored else None,
        received_old=variant.scored,
    )  # fmt: skip
    return Call(
        batch=batch, q_BHD=numbers(rows, kv_heads * variant.group, head_dim), k_BKD=numbers(rows, kv_heads, head_dim),
        v_BKD=numbers(rows, kv_heads, head_dim), scale=head_dim**-0.5, softcap=variant.softcap,
    )  # fmt: skip


_MODEL_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_COLD_BYTES = BUFFER_BYTES
"""Pages of all calls together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelShape:
    """The sizes of a call: sequences, KV heads of a layer, query heads of a KV head, channels, slots of a page."""

    batch: int = 8
    kv_heads: int = 3
    group: int = 3
    head_dim: int = 64
    page_slots: int = 16


def measure_kernel(
    shape: KernelShape, *, storages: Sequence[str], tokens: Sequence[int], spreads: Sequence[int] = (1, 100), repeats: int = 30
) -> Iterator[Row]:  # fmt: skip
    """A row for each storage, mean length and spread (longest stream over shortest).

    `ms` and `read_gb_per_s` are the best of the repetitions, and `share` is their ratio; `share_median` is the median of
    the ratios of neighbouring repetitions. Threads are torch's.
    """
    read = Reader()
    for storage, mean, spread in product(storages, tokens, spreads):
        yield _measure(shape, storage, mean, spread, repeats, read)


def _measure(shape: KernelShape, storage: str, mean: int, spread: int, repeats: int, read: Reader) -> Row:
    lengths = stream_lengths(shape.batch * shape.kv_heads, mean, spread)
    batches = cold_calls(shape, storage, lengths)
    queries = (shape.batch, shape.kv_heads * shape.group, shape.head_dim)
    q_BHD = torch.randn(queries).to(_MODEL_DTYPES.get(storage, torch.float32))
    num_bytes = int(lengths.sum()) * _slot_bytes(storage, shape.head_dim)
    scale = shape.head_dim**-0.5
    calls, reads = [], []
    nearly_nothing = dataclasses.replace(batches[0], length_BK=torch.ones_like(batches[0].length_BK))
    for turn in range(repeats + 1):
        batch = batches[turn % len(batches)]
        reads.append(read.rate())
        # The read has driven Python's own code out of the caches too; what its return takes is not the op's.
        decode_attention(nearly_nothing, q_BHD, None, None, scale=scale, softcap=None)
        taken = seconds(lambda b=batch: decode_attention(b, q_BHD, None, None, scale=scale, softcap=None))
        calls.append(num_bytes / taken)
    calls, reads = calls[1:], reads[1:]  # the first of each compiles, or touches memory for the first time
    library = native.library(storage, storage)
    return {
        "op": "decode attention", "isa": "plain torch" if library is None else library.isa,
        "threads": torch.get_num_threads(), **dataclasses.asdict(shape), "storage": storage, "tokens": mean,
        "spread": spread, "pages": "shuffled", "bytes": num_bytes,
        "ms": 1e3 * num_bytes / max(calls), "gb_per_s": max(calls) / 1e9, "read_gb_per_s": max(reads) / 1e9,
        "share": max(calls) / max(reads),
        "share_median": median(call / rate for call, rate in zip(calls, reads, strict=True)), "repeats": repeats,
    }  # fmt: skip


def stream_lengths(streams: int, mean: int, spread: int) -> Tensor:
    """Lengths [streams] in a shuffled order, the longest `spread` times the shortest, about evenly by their logarithm."""
    weights = torch.logspace(0, 1, streams, base=spread, dtype=torch.float64)
    order = torch.randperm(streams, generator=torch.Generator().manual_seed(0))
    return (weights / weights.mean() * mean).round().clamp(min=1).int()[order]


def _slot_bytes(storage: str, head_dim: int) -> int:
    """Of one stored key and value, scales included."""
    kind, dtype = _page_kind(storage)
    return 2 * storage_bytes(kind, head_dim, dtype.itemsize)


def _page_kind(storage: str) -> tuple[str, torch.dtype]:
    """Storage and model dtype by one of `native.KINDS`."""
    return ("model", _MODEL_DTYPES[storage]) if storage in _MODEL_DTYPES else (storage, torch.float32)


def cold_calls(shape: KernelShape, storage: str, lengths: Tensor) -> list[DecodeBatch]:
    """Calls over parts of one pool of shuffled pages, as many as make it larger than what a cache keeps."""
    pages_each = -(-lengths.long() // shape.page_slots)
    pages = int(pages_each.sum())
    page_bytes = shape.page_slots * _slot_bytes(storage, shape.head_dim)
    layers = max(2, min(32, _COLD_BYTES // (pages * page_bytes)))
    (k_PND, k_scale_PNS), (v_PND, v_scale_PNS) = (_pool(shape, storage, layers * pages, seed) for seed in (0, 1))
    draw = torch.Generator().manual_seed(2)
    table_T = torch.randperm(layers * pages, generator=draw).int()
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
