"""How many bytes a layout needs, and the inverses: how many rows, how much context fit; the rows of a plan's table; what weights
weigh; and amounts as people write them on a command line.

The byte arithmetic is the store's own: it imports these terms, so that planned bytes equal allocated bytes. Where a method's
need depends on its gates (DMC, DMS) the plan is the upper bound, or what gates of a given compression keep where all heads
keep alike. No torch here, and no tensors are moved.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import inf
from os import PathLike
from pathlib import Path
from typing import Any

from kvfold.errors import UserError
from kvfold.layout.hf_config import base_layout, config_layout, model_tokens, read_config, text_config, value_bytes
from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.base import DTYPE_BYTES, Method
from kvfold.methods.bits import Storage, storage_bytes

PAGE_SLOTS = 16
"""Entries in a page, unless a store is told otherwise."""
POSITION_BYTES = 4
"""Position of one stored entry, int32."""
PAGE_OVERHEAD_BYTES = 40
"""For each page held: its reference count, its entry in the free list, and eight in the block tables (which are
rectangular, so that uneven rows and heads leave gaps), int32 each."""
LENGTH_BYTES = 4
"""Length of one KV stream (a sequence's entries of one owner and kv head), int32."""
SEQUENCE_BYTES = 8
"""Tokens seen by one sequence, int64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PageClass:
    """What pages must agree on to share one pool."""

    head_dim: int
    """Channels."""
    k: Storage
    """Storage of keys."""
    v: Storage
    """Storage of values."""


def page_class(layout: KVLayout, owner: int) -> PageClass:
    """The class of the pages that the owner's entries live in."""
    bits = layout.bits_of(owner)
    return PageClass(head_dim=layout.layers[owner].head_dim, k=bits.k, v=bits.v)


def slot_arrays(layout: KVLayout) -> dict[PageClass, dict[str, str]]:
    """Every page class of a layout with what its owners' methods keep with each slot: name -> dtype."""
    found: dict[PageClass, dict[str, str]] = {}
    for owner in layout.owners:
        arrays = found.setdefault(page_class(layout, owner), {})
        for name, dtype in layout.time_of(owner).slot_arrays.items():
            if arrays.setdefault(name, dtype) != dtype:
                raise UserError(
                    f"time '{layout.time_text()}': two methods keep '{name}' with each entry, as {arrays[name]} and as {dtype}: "
                    "use one of them"
                )
    return found


def page_classes(layout: KVLayout) -> dict[PageClass, int]:
    """Every page class of a layout with its per-slot state in bytes."""
    return {one: sum(DTYPE_BYTES[dtype] for dtype in arrays.values()) for one, arrays in slot_arrays(layout).items()}


def page_bytes(one: PageClass, slots: int, *, model_bytes: int, slot_state_bytes: int) -> int:
    """Bytes of one page of `slots` entries with everything that is kept for it."""
    payload = storage_bytes(one.k, one.head_dim, model_bytes) + storage_bytes(one.v, one.head_dim, model_bytes)
    return slots * (payload + POSITION_BYTES + slot_state_bytes) + PAGE_OVERHEAD_BYTES


def layout_bytes(
    layout: KVLayout, seen_tokens: Sequence[int], model_bytes: int, page_slots: int = PAGE_SLOTS,
    compression: float | None = None,
) -> int:  # fmt: skip
    """Bytes that rows of these lengths (real tokens seen) hold after a step.

    `model_bytes` = one number in the model's dtype. `compression`: of learned methods; None = the most they may hold.
    """
    states = page_classes(layout)
    streams: Counter[tuple[Method, PageClass]] = Counter()
    for owner in layout.owners:
        streams[layout.time_of(owner), page_class(layout, owner)] += layout.layers[owner].num_kv_heads
    rows = Counter(seen_tokens)
    total = SEQUENCE_BYTES * sum(rows.values())
    for (method, one), num_streams in streams.items():
        page = page_bytes(one, page_slots, model_bytes=model_bytes, slot_state_bytes=states[one])
        stream = LENGTH_BYTES + method.stream_state_bytes(one.head_dim)
        for seen, num_rows in rows.items():
            kept = method.max_kept(seen) if compression is None else method.expected_kept(seen, compression)
            total += num_streams * num_rows * (stream + page * -(-kept // page_slots))
    return total


def token_bytes(layout: KVLayout, model_bytes: int) -> int:
    """K and V of one more token while nothing is evicted or merged: payload alone, without pages and positions."""
    return sum(
        layout.layers[owner].num_kv_heads
        * sum(layout.bits_of(owner).slot_bytes(layout.layers[owner].head_dim, model_bytes))
        for owner in layout.owners
    )


def most_tokens(fits: Callable[[int], bool], most: int) -> int | None:
    """Tokens of the longest text that fits: 0 where none does, None where one of over half of `most` does."""
    found, too_long = 0, 1
    while fits(too_long):
        found, too_long = too_long, 2 * too_long
        if too_long > most:
            return None
    while too_long - found > 1:
        middle = (found + too_long) // 2
        found, too_long = (middle, too_long) if fits(middle) else (found, middle)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What one model's KV cache costs under one layout."""

    source: str
    """The model, by the name it was asked for."""
    layout: KVLayout
    """The layout planned for."""
    base_layout: KVLayout
    """The model's layout before it was folded."""
    model_bytes: int
    """Bytes of one number in the model's dtype."""
    model_tokens: int | None
    """Context that the model was made for; None where its config doesn't say."""
    page_slots: int = PAGE_SLOTS
    """Entries in a page."""
    learned_compression: float | None = None
    """What gates were trained to: tokens seen over tokens kept, delay included; None = planned for gates that never fire."""

    @property
    def bytes_per_token(self) -> int:
        """K and V of one more token while nothing is evicted or merged, without pages and positions."""
        return token_bytes(self.layout, self.model_bytes)

    def bytes(self, seen_tokens: Sequence[int]) -> int:
        """What the store allocates for rows of these lengths after a step. For DMC and DMS the most it may, or with
        `learned_compression` what it does where all heads keep alike: heads that differ leave more pages half filled.
        """
        return layout_bytes(self.layout, seen_tokens, self.model_bytes, self.page_slots, self.learned_compression)

    def max_rows(self, memory_bytes: int, context_tokens: int) -> int:
        """The most rows of `context_tokens` tokens that fit in `memory_bytes`."""
        _refuse_negative(memory_bytes=memory_bytes, context_tokens=context_tokens)
        return memory_bytes // self.bytes([context_tokens])

    def max_context_tokens(self, memory_bytes: int, rows: int) -> int | None:
        """The longest context of which `rows` rows fit in `memory_bytes`; 0 where not even empty rows do.

        Where a method's budget bounds the memory every context fits: then what the model was made for, or None.
        """
        _refuse_negative(memory_bytes=memory_bytes)
        if rows < 1:
            raise UserError(f"rows {rows}: a context is that of 1 row or more: write 1 or more")
        found = most_tokens(lambda tokens: self.bytes([tokens]) <= memory_bytes // rows, UNBOUNDED_TOKENS)
        return self.model_tokens if found is None else found

    def compression(self, context_tokens: int) -> float:
        """Times smaller than the base layout, in bytes, for one row of `context_tokens` tokens."""
        full = layout_bytes(self.base_layout, [context_tokens], self.model_bytes, self.page_slots)
        return full / self.bytes([context_tokens])


UNBOUNDED_TOKENS = 2**50
"""No memory holds this many tokens at a byte each: where they fit, the method's budget is what bounds the memory."""


def plan(
    source: Any, time: str | None = None, bits: str | None = None, layers: str | None = None, heads: int | None = None,
    page_slots: int = PAGE_SLOTS, compression: float | None = None,
) -> Plan:  # fmt: skip
    """The plan of a model: a config dict or object, a folder or config.json, a bundled or hub name, a loaded model.

    `heads` and `layers` change who stores, then `time` and `bits` say for the remaining owners what and how. `compression`:
    what the gates of DMC or DMS reach, tokens seen over tokens kept; None = they never fire.
    """
    if compression is not None and not 1 <= compression < inf:
        raise UserError(f"compression {compression:g}: it is times smaller, 1 or more: write e.g. 4")
    if page_slots < 1:
        raise UserError(f"page_slots {page_slots}: a page has 1 slot or more: write e.g. {PAGE_SLOTS}")
    name, config = read_config(source)
    layout = config_layout(config)
    if heads is not None:
        layout = layout.with_heads(heads)
    if layers is not None:
        layout = KVLayout.parse(layers, layout)
    layout = layout.folded(time, bits)
    if compression is not None and not any(method.trained for method in layout.time):
        raise UserError(
            f"compression {compression:g} with time '{layout.time_text()}': only what dmc and dms keep is learned: "
            "add one of them, or leave it out"
        )
    return Plan(
        source=name, layout=layout, base_layout=base_layout(config), model_bytes=value_bytes(config),
        model_tokens=model_tokens(config), page_slots=page_slots, learned_compression=compression,
    )  # fmt: skip


def _refuse_negative(**amounts: int) -> None:
    for name, amount in amounts.items():
        if amount < 0:
            raise UserError(f"{name} {amount}: an amount is 0 or more: write a positive number")


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
    source: Any, *, context_tokens: int, rows: int = 1, memory_bytes: int | None = None, time: str | None = None,
    bits: str | None = None, layers: str | None = None, heads: int | None = None, page_slots: int = PAGE_SLOTS,
    compression: float | None = None,
) -> tuple[PlanRow, ...]:  # fmt: skip
    """Plan `rows` rows of `context_tokens` tokens, without folding, along each axis given, and along all of them.
    `compression`: what a learned method reaches; None = the most it may hold.
    """
    if rows < 1 or context_tokens < 1:
        raise UserError(f"{rows} rows of {context_tokens} tokens: a plan is for 1 or more of each: write more")
    axes = {"heads": heads, "layers": layers, "time": time, "bits": bits}
    axes = {axis: value for axis, value in axes.items() if value is not None}
    folds: dict[str, dict[str, Any]] = {"as it is": {}}
    folds.update({f"{axis} {value}": {axis: value} for axis, value in axes.items()})
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
            name=name, layout=one.layout, bytes_per_token=one.bytes_per_token, context_bytes=one.bytes(lengths),
            max_rows=None if memory_bytes is None else one.max_rows(memory_bytes, context_tokens),
            max_context_tokens=None if memory_bytes is None else one.max_context_tokens(memory_bytes, rows),
            compression=whole_bytes / one.bytes(lengths),
        )
        for name, one in plans.items()
    )  # fmt: skip


_TIED_TYPES = ("cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text")
"""Model types whose head is the embedding where the config does not say."""
_OTHER_WEIGHTS = ("num_local_experts", "num_experts", "n_routed_experts", "vision_config", "audio_config")
"""Keys that tell of weights that are not counted here."""
_COUNTED = ("vocab_size", "hidden_size", "intermediate_size")


def weight_bytes(source: Any) -> int | None:
    """Bytes of the weights in the model's dtype: what a device's memory holds beside the cache; None where neither files nor
    config tell. `source` as for `plan`.
    """
    if callable(getattr(source, "named_parameters", None)):
        return sum(weight.numel() * weight.element_size() for _, weight in source.named_parameters())
    if isinstance(source, str | PathLike) and Path(source).expanduser().is_dir():
        files = list(Path(source).expanduser().glob("*.safetensors"))
        if files:
            return sum(file.stat().st_size for file in files)
    return counted_bytes(read_config(source)[1])


def counted_bytes(config: Mapping[str, Any]) -> int | None:
    """The same counted from a raw config, for decoders of one plain form: embeddings, four attention projections, three of a
    gated MLP, and a head unless it is the embedding. Biases and norms weigh next to nothing.
    """
    text = text_config(config)
    if any(config.get(key) or text.get(key) for key in _OTHER_WEIGHTS) or not all(text.get(key) for key in _COUNTED):
        return None
    layout = config_layout(config)
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    is_tied = text.get("tie_word_embeddings", text.get("model_type") in _TIED_TYPES)
    number = text["vocab_size"] * hidden * (1 if is_tied else 2)
    for layer, kept in enumerate(layout.layers):
        number += 3 * hidden * text["intermediate_size"] + 2 * hidden * heads * kept.head_dim
        if layout.is_owner(layer):
            number += 2 * hidden * kept.num_kv_heads * kept.head_dim
    return number * value_bytes(config)


SIZE_UNITS: dict[str, int] = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
}
"""Bytes of each unit, in lower case."""
COUNT_UNITS: dict[str, int] = {"": 1, "k": 1024, "m": 1024**2}
"""Tokens of each unit, in lower case."""


def parse_size(text: str) -> int:
    """Bytes: a number, maybe with a fraction, and a unit from `SIZE_UNITS` in any case; part of a byte is cut off."""
    return _parse("memory", text, SIZE_UNITS, "'80GB' (10^9 bytes each) or '16GiB' (2^30)")


def parse_count(text: str) -> int:
    """Tokens: a number, maybe with a fraction, and `k` (1,024), `M` (1,024 k) or nothing; parts of a token are cut."""
    return _parse("count", text, COUNT_UNITS, "'4096' or '32k' (1,024 each)")


def _parse(what: str, text: str, units: dict[str, int], examples: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower(), re.ASCII)
    amount = Fraction(match[1]) * units[match[2]] if match and match[2] in units else Fraction(0)
    if amount < 1:
        raise UserError(f"{what} '{text}': it is a positive number with a unit it knows: write e.g. {examples}")
    return int(amount)
