"""Calls of the decode-attention op made up for benchmarks: which kinds there are, and random pages to run them on.

Letters: B sequences, K kv heads, D head dim, P pages, N slots a page, S scale groups, T entries of the table.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvfold.ops.paged import DecodeBatch, stream_slots
from kvfold.ops.quantised import scale_groups

SCALE_BYTES = 2
"""A scale is fp16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A kind of call that gets machine code of its own."""

    q: torch.dtype = torch.bfloat16
    """The dtype of queries and new tokens."""
    k_pages: torch.dtype = torch.bfloat16
    """The dtype of key pages."""
    v_pages: torch.dtype = torch.bfloat16
    """The dtype of value pages."""
    group: int = 1
    """Query heads of a KV head."""
    head_dim: int = 128
    """Channels."""
    page_slots: int = 16
    """Slots of a page."""
    written: bool = True
    """The new token has a slot; False: it is attended to from where it lies."""
    scored: bool = False
    """Weights are handed out, to slots and by column."""
    biased: bool = False
    """Slots have a bias."""
    windowed: bool = False
    """Keys are hidden by age."""
    softcap: float | None = None
    """Logits are capped."""

    def describe(self) -> dict[str, Any]:
        """What tells this variant from others, for a row of a table."""
        extras = [name for name in ("written", "scored", "biased", "windowed") if getattr(self, name)]
        return {
            **{name: dtype_name(getattr(self, name)) for name in ("q", "k_pages", "v_pages")},
            **{name: getattr(self, name) for name in ("group", "head_dim", "page_slots")},
            "extras": extras + (["softcap"] if self.softcap is not None else []),
        }

    def slot_bytes(self) -> int:
        """Bytes of one stored key and value, scales included."""
        scales = SCALE_BYTES * scale_groups(self.head_dim)
        return sum(
            self.head_dim * dtype.itemsize + (scales if dtype == torch.int8 else 0)
            for dtype in (self.k_pages, self.v_pages)
        )


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
    """Where everything lies."""
    q_BHD: Tensor
    """Queries."""
    k_BKD: Tensor
    """New keys."""
    v_BKD: Tensor
    """New values."""
    scale: float
    """Of the logits."""
    softcap: float | None
    """Of the logits."""


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


def dtype_name(dtype: torch.dtype) -> str:
    """As people write it: bfloat16."""
    return str(dtype).removeprefix("torch.")
