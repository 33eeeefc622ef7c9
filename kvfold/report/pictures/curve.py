"""A retrofit as it went: its loss, its compression beside what was asked for, and that of each layer, step by step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvfold.report.markup import Markup, tag
from kvfold.report.numbers import count, three, tick, times
from kvfold.report.pictures.drawing import (
    LETTER,
    MOST_NAME,
    Frame,
    end_labels,
    picture,
    polyline,
    short,
    spots,
    ticks,
    write,
)
from kvfold.report.results import number

MOST_POINTS = 240
"""Points of a line; a longer run shows means of neighbouring steps."""
COLUMNS = {True: 80, False: 36}
"""Columns of the map of layers, on a wide picture and on a narrow one."""
SHADES = 10
FAINTEST = 0.07


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line."""

    name: str
    points: tuple[tuple[float, float], ...]
    """(step, value), ascending."""
    dashed: bool = False
    """Whether it is what was asked for, not what came out."""


def series_of(rows: Sequence[Mapping], keys: Mapping[str, tuple[str, bool]], most: int = MOST_POINTS) -> list[Series]:
    """A line for each key that any row has; `keys`: name and whether it is dashed."""
    found = []
    for key, (name, dashed) in keys.items():
        points = [(number(row, "step"), number(row, key)) for row in rows]
        known = sorted((step, value) for step, value in points if step is not None and value is not None)
        if known:
            found.append(Series(name=name, points=tuple(_thinned(known, most)), dashed=dashed))
    return found


def _thinned(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Means of as many neighbours as it takes."""
    size = -(-len(points) // most)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


LOSS = {
    "loss": ("whole loss", False),
    "distillation": ("distillation", False),
    "next_token_loss": ("next token", False),
}
COMPRESSION = {"compression": ("reached", False), "target_compression": ("asked for", True)}


def lines_picture(
    lines: Sequence[Series], y_title: str, width: float, *, from_zero: float | None = 0.0, x_title: str = "step"
) -> Markup:
    """One SVG; every line its colour and its name at its end. `from_zero`: where the vertical axis begins."""
    last = max(line.points[-1][0] for line in lines)
    first = min(line.points[0][0] for line in lines)
    values = [value for line in lines for _, value in line.points]
    low = min([*values, *([] if from_zero is None else [from_zero])])
    high = max(values)
    high += _room(low, high) * 0.04
    height = 240 if width < 500 else 300
    names = [short(line.name, width * MOST_NAME) for line in lines]
    room = max(110, max(map(len, names)) * LETTER + 24)
    frame = Frame(
        left=52, right=width - room, top=28, bottom=height - 44, x_range=(first, first + _room(first, last)),
        y_range=(low, high),
    )  # fmt: skip
    x_ticks = [(value, count(value)) for value in ticks(first, last, 3 if width < 500 else 6)]
    parts = frame.axes(x_ticks, [(value, tick(value)) for value in ticks(low, high, 4)], x_title, y_title)
    ends = []
    for index, (line, name) in enumerate(zip(lines, names, strict=True)):
        # A line that was asked for is neutral, as the unfolded model is elsewhere.
        colour = 0 if line.dashed else 1 + index % 7
        places = [(frame.x(step), frame.y(value)) for step, value in line.points]
        parts.append(polyline(places, f"line{' dashed' if line.dashed else ''} c{colour}"))
        parts += spots([f"{x_title} {count(step)}: {line.name} {three(value)}" for step, value in line.points], places)
        ends.append((*places[-1], name, colour))
    parts += end_labels(ends, frame.top, frame.bottom - 2)
    return picture(width, height, f"{y_title} over training. The table below has the numbers.", *parts)


def _room(low: float, high: float) -> float:
    """From low to high; never so little that a picture could not tell them apart."""
    return max(high - low, abs(high) * 1e-6, 1e-6)


def layers_of(rows: Sequence[Mapping], most: int) -> list[tuple[float, list[float | None]]]:
    """(last step, compression of each layer that has gates), of at most so many stretches of the run."""
    told = []
    for row in rows:
        step, layers = number(row, "step"), row.get("layer_compression")
        if step is not None and isinstance(layers, list) and layers:
            told.append((step, [number({"x": one}, "x") for one in layers]))
    told.sort(key=lambda one: one[0])
    size = -(-len(told) // most) or 1
    parts = [told[start : start + size] for start in range(0, len(told), size)]
    return [(part[-1][0], [_mean(column) for column in _columns([line for _, line in part])]) for part in parts]


def _columns(lines: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    return [[line[at] for line in lines if at < len(line)] for at in range(max(map(len, lines)))]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def layers_picture(rows: Sequence[Mapping], width: float) -> Markup | None:
    """One SVG: steps to the right, layers downwards, stronger colour is more compression; None where no step told of layers."""
    stretches = layers_of(rows, COLUMNS[width >= 500])
    values = [value for _, line in stretches for value in line if value is not None]
    if not values:
        return None
    low, high = 1.0, max(*values, 1.0)
    num_layers = max(len(line) for _, line in stretches)
    left, top, tall = 40.0, 24.0, min(14.0, max(5.0, 300 / num_layers))
    wide = (width - left - 8) / len(stretches)
    shades: dict[int, list[str]] = {}
    for column, (_, line) in enumerate(stretches):
        for layer, value in enumerate(line):
            if value is not None:
                at = 0 if high <= low else round((SHADES - 1) * min(1.0, max(0.0, (value - low) / (high - low))))
                box = f"M{left + column * wide:.1f} {top + layer * tall:.1f}h{wide:.1f}v{tall - 0.5:.1f}h{-wide:.1f}z"
                shades.setdefault(at, []).append(box)
    # A path a shade: a rectangle a cell would make the page ten times larger.
    parts = [
        tag("path", class_="cell", d="".join(boxes), fill_opacity=f"{_opacity(shade):.2f}")
        for shade, boxes in sorted(shades.items())
    ]
    bottom = top + num_layers * tall
    parts += [
        write(left - 8, top + (layer + 0.5) * tall + 4, str(layer), "tick", "end")
        for layer in range(0, num_layers, max(1, round(20 / tall)))
    ]
    parts.append(write(4, 13, "layers that have gates, counted from 0", "axis"))
    every = max(1, len(stretches) // (3 if width < 500 else 8))
    parts += [
        write(left + (column + 0.5) * wide, bottom + 15, count(step), "tick", "middle")
        for column, (step, _) in list(enumerate(stretches))[every - 1 :: every]
    ]
    parts += _key(left, bottom + 26, low, high)
    spoken = f"Compression of each layer over the steps, from {times(low)} to {times(high)}."
    return picture(width, bottom + 44, spoken, *parts)


def _opacity(shade: int) -> float:
    return FAINTEST + (1 - FAINTEST) * shade / (SHADES - 1)


def _key(left: float, top: float, low: float, high: float) -> list[Markup]:
    boxes = [
        tag("rect", class_="cell", x=left + 40 + 12.0 * shade, y=top, width=11.0, height=11.0,
            fill_opacity=f"{_opacity(shade):.2f}")
        for shade in range(SHADES)
    ]  # fmt: skip
    ends = [
        write(left + 34, top + 10, times(low), "tick", "end"),
        write(left + 46 + 12 * SHADES, top + 10, times(high), "tick"),
    ]
    return [*boxes, *ends]
