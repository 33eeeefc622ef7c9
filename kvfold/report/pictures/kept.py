"""What each layer and KV head keeps: one map a method, a column a layer, a row a head, deeper colour = more.

All maps of one picture share one scale. Where a result brings a score of its own (`score`, named by `value_name`), that
is what is coloured, since a method with one budget for all keeps the same number everywhere. The same map shows how many
times smaller each head's cache has become.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvfold.report.markup import Markup, tag
from kvfold.report.numbers import count, percent, three, times
from kvfold.report.pictures.drawing import picture, write
from kvfold.report.results import grid, number, words
from kvfold.report.series import label_of

KEPT_NAME = "share of the tokens kept"
COMPRESSION_NAME = "compression"
FAINTEST = 0.07
"""Opacity of the smallest value: a measured cell is never as blank as one that is not there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadMap:
    """One method's map."""

    row: Mapping
    """The row it came from."""
    owners: tuple[int, ...]
    """Layers that keep a cache, ascending."""
    values: tuple[tuple[float | None, ...], ...]
    """What is coloured: [owner][head]."""
    hovers: tuple[tuple[str, ...], ...]
    """What a cell says: [owner][head]."""
    value_name: str
    """What the values are."""


def head_map(row: Mapping) -> HeadMap | None:
    """The map of one row; None where it has neither kept counts nor scores."""
    kept, score = grid(row, "kept"), grid(row, "score")
    values = score or _shares(kept, number(row, "seen_tokens"))
    if not any(values):
        return None
    listed = row.get("owners")
    fits = isinstance(listed, list) and len(listed) >= len(values) and all(isinstance(x, int) for x in listed)
    owners = tuple(listed[: len(values)] if fits else range(len(values)))
    name = (words(row, "value_name") or "score") if score else KEPT_NAME
    hovers = tuple(
        tuple(_hover(row, kept, score, name, owner, index, head) for head in range(len(line)))
        for index, (owner, line) in enumerate(zip(owners, values, strict=True))
    )
    return HeadMap(row=row, owners=owners, values=tuple(map(tuple, values)), hovers=hovers, value_name=name)


def compression_map(row: Mapping) -> HeadMap | None:
    """Tokens seen over tokens kept; None where a row has no kept counts."""
    one = head_map({key: row.get(key) for key in ("method", "title", "owners", "seen_tokens", "kept")})
    if one is None:
        return None
    values = tuple(tuple(1 / share if share else None for share in line) for line in one.values)
    if not any(value is not None for line in values for value in line):
        return None
    hovers = tuple(
        tuple(f"{hover}: {times(value)}" for hover, value in zip(*pair, strict=True))
        for pair in zip(one.hovers, values, strict=True)
    )
    return HeadMap(row=row, owners=one.owners, values=values, hovers=hovers, value_name=COMPRESSION_NAME)


def _shares(kept: list[list[float | None]], seen: float | None) -> list[list[float | None]]:
    """Kept counts over tokens seen; -1 stands for a head that a layer doesn't have."""
    return [[cell / seen if cell is not None and cell >= 0 and seen else None for cell in line] for line in kept]


def _hover(row: Mapping, kept: list, score: list, name: str, owner: int, index: int, head: int) -> str:
    """`kept` and `score` are [owner][head]; either may be shorter than the other."""
    said = []
    seen = number(row, "seen_tokens")
    if index < len(kept) and head < len(kept[index]) and (cell := kept[index][head]) is not None and cell >= 0:
        of = f" of {count(seen)}" if seen else ""
        said.append(f"{count(cell)}{of} kept")
    if index < len(score) and head < len(score[index]) and score[index][head] is not None:
        said.append(f"{name} {three(score[index][head])}")
    return f"layer {owner}, head {head}: {', '.join(said) or 'none'}"


def scale_of(maps: Sequence[HeadMap]) -> tuple[float, float]:
    """The smallest and largest value over all maps; shares begin at 0, compressions at 1."""
    cells = [cell for one in maps for line in one.values for cell in line if cell is not None]
    if not cells:
        return 0.0, 1.0
    low = {KEPT_NAME: 0.0, COMPRESSION_NAME: 1.0}.get(maps[0].value_name, min(cells))
    return low, max(max(cells), low)


def kept_picture(one: HeadMap, scale: tuple[float, float], width: float) -> Markup:
    """The SVG of one method's map."""
    num_heads = max(len(line) for line in one.values)
    cell = min(26.0, (width - 64) / len(one.owners))
    tall = min(22.0, max(8.0, 150 / num_heads))
    left, top = 56.0, 28.0
    parts = [write(0, 14, label_of(one.row), "name")]
    for column, line in enumerate(one.values):
        for head, value in enumerate(line):
            if value is not None:
                x, y = left + column * cell, top + head * tall
                parts.append(_cell(x, y, cell, tall, _opacity(one, value, scale), one.hovers[column][head]))
    every = next(step for step in (1, 2, 5, 10, 20, 50, 1000) if step * cell >= 24)
    bottom = top + num_heads * tall
    for column, owner in enumerate(one.owners):
        if column % every == 0:
            parts.append(write(left + (column + 0.5) * cell, bottom + 15, str(owner), "tick", "middle"))
    parts.append(write(left - 8, bottom + 15, "layer", "tick", "end"))
    for head in range(0, num_heads, 1 if tall >= 13 else 4):
        parts.append(write(left - 8, top + (head + 0.5) * tall + 4, f"head {head}", "tick", "end"))
    spoken = f"{label_of(one.row)}: {one.value_name} by layer and head. The table below has the numbers."
    return picture(width, bottom + 22, spoken, *parts)


def key_picture(one: HeadMap, scale: tuple[float, float]) -> Markup:
    """The colour scale with its two ends."""
    write_value = {KEPT_NAME: percent, COMPRESSION_NAME: times}.get(one.value_name, three)
    low, high = (write_value(value) for value in scale)
    steps = [_cell(60 + 12 * step, 4, 12, 12, FAINTEST + (1 - FAINTEST) * step / 11, None) for step in range(12)]
    ends = [write(52, 14, low, "tick", "end"), write(210, 14, high, "tick")]
    return picture(270, 20, f"{one.value_name}: from {low} to {high}", *steps, *ends)


def _opacity(one: HeadMap, value: float, scale: tuple[float, float]) -> float:
    """Of compressions equal steps are equal ratios."""
    bend = math.log if one.value_name == COMPRESSION_NAME else float
    low, high, at = (bend(max(number, 1e-9) if bend is math.log else number) for number in (*scale, value))
    return 1.0 if high <= low else FAINTEST + (1 - FAINTEST) * min(1.0, max(0.0, (at - low) / (high - low)))


def _cell(x: float, y: float, wide: float, tall: float, opacity: float, hover: str | None) -> Markup:
    gap = 1.0 if wide >= 6 else 0.3
    return tag(
        "rect",
        tag("title", hover) if hover else None,
        class_="cell",
        x=float(x),
        y=float(y),
        width=wide - gap,
        height=tall - gap,
        fill_opacity=f"{opacity:.2f}",
    )
