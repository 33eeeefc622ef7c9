"""What every hand-drawn SVG shares: the frame with its axes, marks, ticks, and labels kept apart.

Pictures carry classes, never colours: the page's style sheet colours them, for light, dark and paper alike. They hold
no ids and no references, so that one page may hold many.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

from kvfold.report.markup import Markup, tag

LETTER = 6.6
"""Mean width of a letter at the size of labels, pixels; a little wide on purpose."""
NAME_GAP = 14.0
"""Pixels from one name's base line to the next, at least."""
MOST_NAME = 0.4
"""Share of a picture's width that names beside the plot may take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """The rectangle between the axes, in pixels, and how values fall into it."""

    left: float
    right: float
    top: float
    bottom: float
    x_range: tuple[float, float]
    """Values at the left and right edge, after `x_bend`; the first may be the larger one."""
    y_range: tuple[float, float]
    """Values at the bottom and top edge, after `y_bend`."""
    x_bend: Callable[[float], float] = float
    """Makes an axis other than linear."""
    y_bend: Callable[[float], float] = float

    def x(self, value: float) -> float:
        """Pixels from the left."""
        low, high = self.x_range
        return self.left + (self.x_bend(value) - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        low, high = self.y_range
        return self.bottom - (self.y_bend(value) - low) / (high - low) * (self.bottom - self.top)

    def axes(
        self, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]], x_title: str, y_title: str
    ) -> list[Markup]:
        """Faint level lines with their values, ticks below, and what both axes show."""
        lines = [
            tag("line", class_="level", x1=self.left, x2=self.right, y1=self.y(value), y2=self.y(value))
            for value, _ in y_ticks
        ]
        values = [write(self.left - 8, self.y(value) + 4, text, "tick", "end") for value, text in y_ticks]
        ticks = [write(self.x(value), self.bottom + 17, text, "tick", "middle") for value, text in x_ticks]
        titles = [
            write(4, 13, y_title, "axis"),
            write((self.left + self.right) / 2, self.bottom + 36, x_title, "axis", "middle"),
        ]
        return lines + values + ticks + titles


def picture(width: float, height: float, spoken: str, *parts: str) -> Markup:
    """One SVG of that size in pixels at most, narrower where the page is; `spoken` is what a screen reader says."""
    return tag(
        "svg", *parts, role="img", aria_label=spoken, viewBox=f"0 0 {width:.0f} {height:.0f}", width=f"{width:.0f}"
    )


def write(x: float, y: float, text: str, class_: str, anchor: str | None = None) -> Markup:
    """Text whose base line starts, is centred, or ends at (x, y)."""
    return tag("text", text, x=float(x), y=float(y), class_=class_, text_anchor=anchor)


def short(text: str, pixels: float) -> str:
    """The text, cut with an ellipsis where it is wider than that; tables have it whole."""
    most = max(1, int(pixels / LETTER))
    return text if len(text) <= most else text[: most - 1] + "…"


def mark(index: int, x: float, y: float, hover: str, hollow: bool = False) -> Markup:
    """The mark of colour `index`: shapes differ too, for eyes that tell colours apart badly and for grey paper."""
    shapes = (
        f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
        f"M{x - 3.6:.1f} {y - 3.6:.1f}h7.2v7.2h-7.2z",
        f"M{x:.1f} {y - 5:.1f}l4.8 8.4h-9.6z",
        f"M{x:.1f} {y - 5.2:.1f}l5.2 5.2l-5.2 5.2l-5.2 -5.2z",
        f"M{x:.1f} {y + 5:.1f}l4.8 -8.4h-9.6z",
    )
    kind = "mark hollow" if hollow else "mark"
    return tag("path", tag("title", hover), class_=f"{kind} c{index}", d=shapes[index % len(shapes)])


def spots(hovers: Sequence[str], places: Sequence[tuple[float, float]]) -> list[Markup]:
    """About a dozen invisible spots along a line that say what it is there; a text for each place."""
    step = max(1, len(places) // 12)
    return [
        tag("circle", tag("title", hover), class_="spot", cx=x, cy=y, r=9)
        for hover, (x, y) in list(zip(hovers, places, strict=True))[::step]
    ]


def polyline(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """Straight strokes from point to point."""
    return tag("path", class_=class_, d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points))


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) from low to high, at most about `most` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / max(1, most)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near to the wanted ones as can be, at least `gap` apart, in the same order, within low..high.

    Neighbours that would touch are moved as one block around their mean.
    """
    blocks: list[list[int]] = []
    for index in sorted(range(len(wanted)), key=lambda index: wanted[index]):
        blocks.append([index])
        while len(blocks) > 1 and _start(blocks[-1], wanted, gap, low, high) < (
            _start(blocks[-2], wanted, gap, low, high) + gap * len(blocks[-2])
        ):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    placed = [0.0] * len(wanted)
    for block in blocks:
        start = _start(block, wanted, gap, low, high)
        for place, index in enumerate(block):
            placed[index] = start + gap * place
    return placed


def _start(block: list[int], wanted: Sequence[float], gap: float, low: float, high: float) -> float:
    middle = sum(wanted[index] for index in block) / len(block)
    length = gap * (len(block) - 1)
    return max(low, min(middle - length / 2, high - length))


def end_labels(ends: Sequence[tuple[float, float, str, int]], top: float, bottom: float) -> list[Markup]:
    """Names at the ends of lines, (x, y, name, colour) each, moved apart up or down with a thin stroke back to the end.

    Ends that lie nearly above each other share one column of names, and so do columns that would run into each other.
    """
    columns: list[list[tuple[float, float, str, int]]] = []
    for end in sorted(ends):
        near = columns and end[0] - columns[-1][-1][0] < 40
        columns[-1].append(end) if near else columns.append([end])
    pairs = list(combinations(range(len(columns)), 2))
    while pairs:
        left, right = pairs.pop(0)
        if _collide(columns[left], columns[right], top, bottom):
            columns[left : right + 1] = [[end for column in columns[left : right + 1] for end in column]]
            pairs = list(combinations(range(len(columns)), 2))
    parts = []
    for column in columns:
        at = _names_at(column)
        for (x, y, name, colour), place in zip(column, _places(column, top, bottom), strict=True):
            parts.append(polyline([(x + 6, y), (at - 3, place)], f"leader c{colour}"))
            parts.append(write(at, place + 4, name, f"name c{colour}"))
    return parts


def _names_at(column: Sequence[tuple[float, float, str, int]]) -> float:
    return max(end[0] for end in column) + 16


def _places(column: Sequence[tuple[float, float, str, int]], top: float, bottom: float) -> list[float]:
    return apart([end[1] for end in column], NAME_GAP, top, bottom)


def _collide(left: Sequence, right: Sequence, top: float, bottom: float) -> bool:
    """Whether a name of the one column lies on a mark or a name of the other, which is further to the right."""
    taken = [*(end[1] for end in right), *_places(right, top, bottom)]
    marks = min(end[0] for end in right) - 8
    return any(
        _names_at(left) + len(end[2]) * LETTER > marks and any(abs(place - other) < NAME_GAP for other in taken)
        for end, place in zip(left, _places(left, top, bottom), strict=True)
    )
