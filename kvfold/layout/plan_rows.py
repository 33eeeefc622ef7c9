"""The rows of a plan's table: the model as it is, each axis alone, and all of them together."""

from dataclasses import dataclass
from typing import Any

from kvfold.errors import UserError
from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import PAGE_SLOTS, plan


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRow:
    """One layout of a model and what it costs."""

    name: str
    """`as it is`, `heads 4`, `layers cla2`, `time h2o:64+64`, `bits int8`, `together`."""
    layout: KVLayout
    """The layout."""
    bytes_per_token: int
    """K and V of one more token while nothing is evicted."""
    context_bytes: int
    """All rows at the context asked for; for DMC and DMS the most it may be, or what their compression makes it."""
    max_rows: int | None
    """Rows of that context that fit the memory; None where no memory was given."""
    max_context_tokens: int | None
    """Longest context of that many rows in the memory; None without a memory, or where nothing bounds it."""
    compression: float
    """Times smaller than the first row."""


def plan_rows(
    source: Any,
    *,
    context_tokens: int,
    rows: int = 1,
    memory_bytes: int | None = None,
    time: str | None = None,
    bits: str | None = None,
    layers: str | None = None,
    heads: int | None = None,
    page_slots: int = PAGE_SLOTS,
    compression: float | None = None,
) -> tuple[PlanRow, ...]:
    """Plan `rows` rows of `context_tokens` tokens, without folding, along each axis given, and along all of them.
    `compression`: what a learned method reaches; None = the most it may hold.
    """
    if rows < 1 or context_tokens < 1:
        raise UserError(
            f"{rows} rows of {context_tokens} tokens: a plan is for 1 or more of each: write positive numbers"
        )
    axes = {"heads": heads, "layers": layers, "time": time, "bits": bits}
    axes = {axis: value for axis, value in axes.items() if value is not None}
    folds = {"as it is": {}} | {f"{axis} {value}": {axis: value} for axis, value in axes.items()}
    if len(axes) > 1:
        folds["together"] = axes
    if compression is not None and time is None:
        raise UserError(f"compression {compression:g} without time: only dmc and dms learn one: add one of them")
    plans = {
        name: plan(source, page_slots=page_slots, compression=compression if "time" in fold else None, **fold)
        for name, fold in folds.items()
    }
    lengths = [context_tokens] * rows
    whole_bytes = plans["as it is"].bytes(lengths)
    return tuple(
        PlanRow(
            name=name,
            layout=one.layout,
            bytes_per_token=one.bytes_per_token,
            context_bytes=one.bytes(lengths),
            max_rows=None if memory_bytes is None else one.max_rows(memory_bytes, context_tokens),
            max_context_tokens=None if memory_bytes is None else one.max_context_tokens(memory_bytes, rows),
            compression=whole_bytes / one.bytes(lengths),
        )
        for name, one in plans.items()
    )
