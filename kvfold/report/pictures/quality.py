"""Quality against kept bytes, one panel a text: a line per method over its budgets, the unfolded model as the base line.

Reading goes from the full cache at the left to ever smaller ones at the right. Panels of one picture share both axes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvfold.report.markup import Markup, tag
from kvfold.report.numbers import difference, percent, tick
from kvfold.report.pictures.drawing import (
    LETTER,
    MOST_NAME,
    NAME_GAP,
    Frame,
    end_labels,
    mark,
    picture,
    polyline,
    short,
    ticks,
    write,
)
from kvfold.report.series import Line, Point, label_of, quality_lines, texts_of

BEND = 2.0
"""Percent up to which a bent axis is nearly linear; beyond, equal steps are equal ratios."""
MOST_SHARES = 5
"""Ticks of the horizontal axis; wider ranges are marked at every second halving."""
X_TITLE = "share of the full cache kept"
Y_TITLE = "perplexity change (lower is better)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Axes:
    """What all panels of one picture share."""

    bent: bool
    """Whether the upper part of the vertical axis is compressed."""
    low: float
    """Percent at the bottom."""
    high: float
    """Percent at the top."""
    shares: tuple[float, ...]
    """Ticks of the horizontal axis, halved from one to the next or quartered; 1.0 first unless something is larger than the
    full cache."""
    most: float
    """Share at the left edge."""
    least: float
    """Share at the right edge."""

    def bend(self, change: float) -> float:
        """Where a change of so many percent lies, in units of the vertical axis."""
        return math.asinh(change / BEND) if self.bent else change

    def levels(self) -> list[float]:
        """Changes to draw a level line at."""
        if not self.bent:
            return ticks(self.low, self.high, 5)
        steps = [factor * 10.0**power for power in range(6) for factor in (1, 2, 5)]
        inside = [level for level in (0.0, *steps, *(-step for step in steps)) if self.low <= level <= self.high]
        gap = (self.bend(self.high) - self.bend(self.low)) / 11
        kept: list[float] = []
        for level in sorted(inside, key=abs):
            if all(abs(self.bend(level) - self.bend(other)) >= gap for other in kept):
                kept.append(level)
        return sorted(kept)


def axes_of(panels: Sequence[Sequence[Line]]) -> Axes:
    """Ranges that hold every point with its error; bent where small and large changes stand side by side."""
    points = [point for lines in panels for line in lines for point in line.points]
    tops = [point.change + (point.error or 0) for point in points]
    bottoms = [point.change - (point.error or 0) for point in points]
    high, low = max([*tops, 1.0]), min([*bottoms, 0.0])
    bent = high > 12 and min(abs(point.change) for point in points) < high / 8
    least = min([point.share for point in points] + [0.5])
    most = max([point.share for point in points] + [1.0])
    first, last = math.floor(math.log2(most)), math.ceil(math.log2(least * 0.94))
    every = 1 + (first - last) // MOST_SHARES
    shares = [2.0**power for power in range(first, last - 1, -1) if power % every == 0]
    # Room above the highest point, and below the base line for its name.
    bend, straight = (math.asinh, math.sinh) if bent else (float, float)
    top, bottom = bend(high / BEND), bend(low / BEND)
    span = top - bottom
    edges = [BEND * straight(edge) for edge in (bottom - 0.09 * span, top + 0.04 * span)]
    return Axes(bent=bent, low=edges[0], high=edges[1], shares=tuple(shares), most=most * 1.04, least=least * 0.96)


def quality_pictures(rows: Sequence[Mapping], colours: Mapping[str, int], width: float) -> list[tuple[str, Markup]]:
    """(text, SVG) for each text that has at least one folded row to show."""
    panels = [(text, lines) for text in texts_of(rows) if (lines := quality_lines(rows, text))]
    if not panels:
        return []
    axes = axes_of([lines for _, lines in panels])
    return [(text, _panel(text, lines, axes, colours, width)) for text, lines in panels]


def _panel(text: str, lines: list[Line], axes: Axes, colours: Mapping[str, int], width: float) -> Markup:
    height = max(300 if width < 500 else 400, 72 + NAME_GAP * len(lines))
    names = [short(line.title, width * MOST_NAME) for line in lines]
    room = max(map(len, names)) * LETTER
    y_ticks = [(level, f"{'+' if level > 0 else ''}{tick(level)} %") for level in axes.levels()]
    frame = Frame(
        left=max(46.0, 10 + LETTER * max(len(text) for _, text in y_ticks)), right=width - room - 18, top=28, bottom=height - 44,
        x_range=(math.log2(axes.most), math.log2(axes.least)), x_bend=math.log2,
        y_range=(axes.bend(axes.low), axes.bend(axes.high)), y_bend=axes.bend,
    )  # fmt: skip
    parts = frame.axes([(share, f"{tick(100 * share)} %") for share in axes.shares], y_ticks, X_TITLE, Y_TITLE)
    zero = frame.y(0)
    parts.append(tag("line", class_="base", x1=frame.left, x2=frame.right, y1=zero, y2=zero))
    parts.append(write(frame.x(1), zero + 15, "unfolded", "quiet"))
    ends = []
    for line, name in zip(lines, names, strict=True):
        parts.extend(_line(line, frame, colours.get(line.family, 0)))
        last = line.points[-1]
        ends.append((frame.x(last.share), frame.y(last.change), name, colours.get(line.family, 0)))
    parts.extend(end_labels(ends, frame.top, frame.bottom - 2))
    spoken = f"Perplexity change against the share of the cache kept, text {text or 'unnamed'}. The table below has the numbers."
    return picture(width, height, spoken, *parts)


def _line(line: Line, frame: Frame, colour: int) -> list[Markup]:
    places = [(frame.x(point.share), frame.y(point.change)) for point in line.points]
    style = "dashed " if line.grows else ""
    parts = []
    if line.from_unfolded:
        parts.append(polyline([(frame.x(1), frame.y(0)), places[0]], f"toward c{colour}"))
    if len(places) > 1:
        parts.append(polyline(places, f"line {style}c{colour}"))
    for point, (x, y) in zip(line.points, places, strict=True):
        if point.error:
            low, high = frame.y(point.change - point.error), frame.y(point.change + point.error)
            parts.append(tag("line", class_=f"error c{colour}", x1=x, x2=x, y1=low, y2=high))
        parts.append(mark(colour, x, y, _hover(point), hollow=line.grows))
    return parts


def _hover(point: Point) -> str:
    change = difference(point.change, point.error, "%")
    return f"{label_of(point.row)}: {percent(point.share)} of the bytes kept, perplexity {change}"
