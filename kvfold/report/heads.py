"""What single layers and heads hold: maps of kept tokens, scores and compression, and a text as one head holds it.

Where a result brings a score of its own (`score`, named by `value_name`), that is what a map shows, since a method with one
budget for all keeps the same number everywhere. A map is a matplotlib figure of a width in pixels, or None where there is
nothing to draw.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvfold.report.drawing import LIGHT, SMALL, chart, tip, write
from kvfold.report.numbers import count, percent, three, times
from kvfold.report.results import grid, number, rows_of, words
from kvfold.report.series import label_of, layers_of

KEPT_NAME, COMPRESSION_NAME = "share of the tokens kept", "compression"
KEPT, GONE, MERGED, WAITING = "kgmw"
"""Letters of `states`: has an entry; nothing is left; part of the entry of a token after it; has one that can't go yet."""
FIRST_TOKENS, MOST_TOKENS = 320, 2000
"""Of a text, those that are seen at once, and those that the page has at all."""


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
    """The map of one row; None where it has neither kept counts nor scores. -1 kept stands for a head that a layer lacks."""
    kept, score, seen = grid(row, "kept"), grid(row, "score"), number(row, "seen_tokens")
    shares = [[cell / seen if cell is not None and cell >= 0 and seen else None for cell in line] for line in kept]
    values = score or shares
    if not any(values):
        return None
    listed = row.get("owners")
    fits = isinstance(listed, list) and len(listed) >= len(values) and all(isinstance(x, int) for x in listed)
    owners = tuple(listed[: len(values)] if fits else range(len(values)))
    name = (words(row, "value_name") or "score") if score else KEPT_NAME

    def hover(at: int, head: int) -> str:
        said = []
        if (cell := _at(kept, at, head)) is not None and cell >= 0:
            said.append(f"{count(cell)}{f' of {count(seen)}' if seen else ''} kept")
        if (cell := _at(score, at, head)) is not None:
            said.append(f"{name} {three(cell)}")
        return f"layer {owners[at]}, head {head}: {', '.join(said) or 'none'}"

    hovers = tuple(tuple(hover(at, head) for head in range(len(line))) for at, line in enumerate(values))
    return HeadMap(row=row, owners=owners, values=tuple(map(tuple, values)), hovers=hovers, value_name=name)


def _at(cells: list, line: int, column: int) -> float | None:
    return cells[line][column] if line < len(cells) and column < len(cells[line]) else None


def compression_map(row: Mapping) -> HeadMap | None:
    """Tokens seen over tokens kept; None where a row has no kept counts."""
    one = head_map({key: row.get(key) for key in ("owners", "seen_tokens", "kept")})
    if one is None:
        return None
    values = tuple(tuple(1 / share if share else None for share in line) for line in one.values)
    if not any(value is not None for line in values for value in line):
        return None
    pairs = [list(zip(*pair, strict=True)) for pair in zip(one.hovers, values, strict=True)]
    hovers = tuple(tuple(f"{hover}: {times(value)}" for hover, value in line) for line in pairs)
    return HeadMap(row=row, owners=one.owners, values=values, hovers=hovers, value_name=COMPRESSION_NAME)


def scale_of(maps: Sequence[HeadMap]) -> tuple[float, float]:
    """The smallest and largest value over all maps; shares begin at 0, compressions at 1."""
    cells = [cell for one in maps for line in one.values for cell in line if cell is not None]
    if not cells:
        return 0.0, 1.0
    low = {KEPT_NAME: 0.0, COMPRESSION_NAME: 1.0}.get(maps[0].value_name, min(cells))
    return low, max(max(cells), low)


def is_even(maps: Sequence[HeadMap]) -> bool:
    """Whether every map has one value everywhere."""
    return all(len({cell for line in one.values for cell in line}) == 1 for one in maps)


def said_scale(maps: Sequence[HeadMap]) -> tuple[str, str]:
    """Both ends of the scale of these maps in words."""
    low, high = map({KEPT_NAME: percent, COMPRESSION_NAME: times}.get(maps[0].value_name, three), scale_of(maps))
    return low, high


def place_on(scale: tuple[float, float], value: float, name: str) -> float:
    """Where a value lies on the scale, 0 to 1; of compressions equal steps are equal ratios."""
    bend = (lambda number: math.log(max(number, 1e-9))) if name == COMPRESSION_NAME else float
    low, high, at = map(bend, (*scale, value))
    return 1.0 if high <= low else (at - low) / (high - low)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadText:
    """What one head holds of a text."""

    name: str
    """`layer 3, head 1: 120 of 1,024 kept (8.53×)`."""
    marks: tuple[tuple[str, str, int], ...]
    """(state, characters, tokens) of each stretch in one state; a run that was merged is one stretch, its state `MERGED`."""

    @property
    def states(self) -> str:
        """Letters of the states that occur."""
        return "".join(sorted({state for state, _, _ in self.marks}))

    @property
    def parts(self) -> tuple[list, list]:
        """The stretches that are seen at once, and the rest."""
        passed, first = 0, 0
        while first < len(self.marks) and passed < FIRST_TOKENS:
            passed, first = passed + self.marks[first][2], first + 1
        return list(self.marks[:first]), list(self.marks[first:])


def head_texts(row: Mapping, tokens: object) -> list[HeadText]:
    """Of each head that a row tells about, or one for all where they hold the same; those without a state a token are left
    out.
    """
    pieces = [
        piece if isinstance(piece, str) else "" for piece in (tokens if isinstance(tokens, list) else [])[:MOST_TOKENS]
    ]
    told = [head for head in rows_of(row, "heads") if words(head, "states") and pieces]
    marks = [tuple(_stretches(words(head, "states")[:MOST_TOKENS], pieces)) for head in told]
    if len(told) > 1 and len(set(marks)) == 1:
        # A method with one budget for all: the same page three times would say no more.
        return [HeadText(name=_name("every head asked for", told[0], row), marks=marks[0])]
    places = [f"layer {words(head, 'layer') or '?'}, head {words(head, 'head') or '?'}" for head in told]
    return [HeadText(name=_name(*of, row), marks=one) for *of, one in zip(places, told, marks, strict=True)]


def _name(where: str, head: Mapping, row: Mapping) -> str:
    kept, seen = number(head, "kept_tokens"), number(row, "seen_tokens")
    if kept is None or not seen:
        return where
    return f"{where}: {count(kept)} of {count(seen)} kept" + (f" ({times(seen / kept)})" if kept > 0 else "")


def _stretches(states: str, pieces: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    """Neighbours in one state together, but each merged run, which ends with the token that has the entry, alone; and cut
    where the first page ends, unless that is within a run. A token without characters is a dot.
    """
    state, text, tokens = "", "", 0
    for index, (letter, piece) in enumerate(zip(states, pieces, strict=False)):
        ends_run = state == MERGED and letter == KEPT
        cut = letter != state or (index == FIRST_TOKENS and state != MERGED)
        if cut and not ends_run and tokens:
            yield state, text, tokens
            text, tokens = "", 0
        state = state if ends_run else letter
        text, tokens = text + (piece or "·"), tokens + 1
        if ends_run:
            yield state, text, tokens
            state, text, tokens = "", "", 0
    if tokens:
        yield state, text, tokens


FAINTEST = 0.07
"""Opacity of the smallest value in a map: a measured cell is never as blank as one that is not there."""


def layers(rows: Sequence[Mapping], width: float) -> Any:
    """Compression of each layer over the steps of a run: steps to the right, layers downwards, stronger colour is more."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    found = layers_of(rows, 36 if width < SMALL else 80)
    low, high = 1.0, _most(found)
    if high is None:
        return None
    num_layers = max(len(line) for _, line in found)
    tall = min(14.0, max(5.0, 300 / num_layers))
    figure, (place,) = chart(width, 72 + tall * num_layers, left=40, right=8,
                             titles=("step", "layers that have gates, counted from 0"))  # fmt: skip
    boxes: dict[int, list[list[tuple[float, float]]]] = {}
    for column, (_, line) in enumerate(found):
        for layer, value in enumerate(line):
            if value is not None:
                at = 0 if high <= low else round(9 * min(1.0, max(0.0, (value - low) / (high - low))))
                left, right, top, bottom = column, column + 1, layer, layer + 0.95
                box = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
                boxes.setdefault(at, []).append(box)
    for at, outlines in sorted(boxes.items()):
        # An outline a shade: a rectangle a cell would make the page ten times larger.
        codes = [Outline.MOVETO, *[Outline.LINETO] * 3, Outline.CLOSEPOLY] * len(outlines)
        outline = Outline([corner for box in outlines for corner in box], codes)
        place.add_patch(PathPatch(outline, facecolor=LIGHT["cell"], alpha=shade(at / 9), linewidth=0))
    every = max(1, len(found) // (3 if width < SMALL else 8))
    across = {column: count(found[column][0]) for column in range(every - 1, len(found), every)}
    down = {layer: str(layer) for layer in range(0, num_layers, max(1, round(20 / tall)))}
    return _named(figure, place, (len(found), num_layers), across, down)


def _named(figure: Any, place: Any, size: tuple[int, int], across: Mapping[int, str], down: Mapping[int, str]) -> Any:
    """The figure with names of some columns below and of some rows at the left; rows are counted from the top."""
    place.set(xlim=(0, size[0]), ylim=(size[1], 0))
    place.set_xticks([at + 0.5 for at in across], list(across.values()))
    place.set_yticks([at + 0.5 for at in down], list(down.values()))
    place.grid(visible=False)
    return figure


def said_layer_scale(rows: Sequence[Mapping]) -> tuple[str, str]:
    """Both ends of the scale of that map in words."""
    return times(1), times(_most(layers_of(rows, 80)))


def _most(found: Sequence[tuple[float, Sequence[float | None]]]) -> float | None:
    values = [value for _, line in found for value in line if value is not None]
    return max(*values, 1.0) if values else None


def head_cells(one: HeadMap, scale: tuple[float, float], width: float) -> Any:
    """One method's map of layers and KV heads: a column a layer, a row a head, stronger colour is more."""
    from matplotlib.patches import Rectangle

    num_heads = max(map(len, one.values))
    wide = min(26.0, (width - 64) / len(one.owners))
    tall = min(22.0, max(8.0, 150 / num_heads))
    figure, (place,) = chart(width, 50 + tall * num_heads, left=56, right=width - 56 - wide * len(one.owners))
    write(figure, 0, 14, label_of(one.row), color=LIGHT["ink"], fontweight="bold")
    write(figure, 48, 28 + tall * num_heads + 15, "layer", ha="right")
    gaps = (1 if wide >= 6 else 0.3) / wide, 1 / tall
    for column, line in enumerate(one.values):
        for head, value in enumerate(line):
            if value is not None:
                style = {
                    "facecolor": LIGHT["cell"],
                    "alpha": shade(place_on(scale, value, one.value_name)),
                    "linewidth": 0,
                }
                box = Rectangle((column, head), 1 - gaps[0], 1 - gaps[1], gid=tip([one.hovers[column][head]]), **style)
                place.add_patch(box)
    every = next(step for step in (1, 2, 5, 10, 20, 50, 1000) if step * wide >= 24)
    across = {column: str(one.owners[column]) for column in range(0, len(one.owners), every)}
    down = {head: f"head {head}" for head in range(0, num_heads, 1 if tall >= 13 else 4)}
    return _named(figure, place, (len(one.owners), num_heads), across, down)


def shade(share: float) -> float:
    """Opacity of a value that lies so far between the smallest and the largest."""
    return FAINTEST + (1 - FAINTEST) * min(1.0, max(0.0, share))
