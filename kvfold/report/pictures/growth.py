"""How the kept tokens grow while a document is read: their mean over all heads, and how far heads lie apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvfold.report.markup import Markup, tag
from kvfold.report.numbers import count
from kvfold.report.pictures.drawing import (
    LETTER,
    MOST_NAME,
    Frame,
    end_labels,
    picture,
    polyline,
    short,
    ticks,
)
from kvfold.report.results import number
from kvfold.report.series import family_of, label_of

SPREAD = ("mean", "least", "lower", "upper", "most")
"""Keys of `over_time`: the mean, the smallest head, the quartiles, the largest head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """One method's."""

    row: Mapping
    """The row it came from."""
    tokens: tuple[float, ...]
    """Seen, ascending."""
    kept: Mapping[str, tuple[float | None, ...]]
    """Of each of `SPREAD`, as many as tokens."""


def growth_of(row: Mapping) -> Growth | None:
    """Of one row; None where it has no mean over time."""
    told = row.get("over_time")
    if not isinstance(told, Mapping) or not isinstance(told.get("tokens"), list):
        return None
    columns = [told.get(name) if isinstance(told.get(name), list) else [] for name in SPREAD]
    points = []
    for index, token in enumerate(told["tokens"]):
        values = [number({"x": column[index]}, "x") if index < len(column) else None for column in columns]
        seen = number({"x": token}, "x")
        if seen is not None and values[0] is not None and min(value or 0 for value in (seen, *values)) >= 0:
            points.append((seen, *values))
    if not points:
        return None
    points.sort(key=lambda point: point[0])
    tokens, *values = zip(*points, strict=True)
    return Growth(row=row, tokens=tokens, kept=dict(zip(SPREAD, values, strict=True)))


def growth_picture(rows: Sequence[Mapping], colours: Mapping[str, int], width: float) -> Markup | None:
    """One SVG with a line and two bands a method, or None where no row has points."""
    lines = [one for row in rows if (one := growth_of(row)) is not None]
    if not lines:
        return None
    most = max(one.tokens[-1] for one in lines) or 1
    highest = max(
        [most, *(value for one in lines for line in one.kept.values() for value in line if value is not None)]
    )
    names = [short(label_of(one.row), width * MOST_NAME) for one in lines]
    height = 320 if width < 500 else 400
    room = max(len(name) for name in (*names, "tokens seen")) * LETTER
    frame = Frame(
        left=52, right=width - room - 26, top=28, bottom=height - 44, x_range=(0, most), y_range=(0, highest * 1.02)
    )  # fmt: skip
    x_ticks = [(value, count(value)) for value in ticks(0, most, 3 if width < 500 else 6)]
    parts = frame.axes(x_ticks, [(value, count(value)) for value in ticks(0, highest, 5)], "tokens seen", "tokens kept")
    parts.append(tag("line", class_="base", x1=frame.x(0), y1=frame.y(0), x2=frame.x(most), y2=frame.y(most)))
    for one in lines:
        parts += _bands(one, frame, colours.get(family_of(one.row), 0))
    ends = [(frame.x(most), frame.y(most), "tokens seen", 0)]
    for one, name in zip(lines, names, strict=True):
        colour = colours.get(family_of(one.row), 0)
        places = _places(one, "mean", frame)
        parts += [polyline(places, f"line c{colour}"), *_hovers(one, places)]
        ends.append((*places[-1], name, colour))
    parts += end_labels(ends, frame.top, frame.bottom - 2)
    spoken = "Tokens kept over tokens seen, mean and spread over all heads. The table below has the numbers."
    return picture(width, height, spoken, *parts)


def _places(one: Growth, name: str, frame: Frame) -> list[tuple[float, float]]:
    return [
        (frame.x(seen), frame.y(value))
        for seen, value in zip(one.tokens, one.kept[name], strict=True)
        if value is not None
    ]


def _bands(one: Growth, frame: Frame, colour: int) -> list[Markup]:
    """From the smallest to the largest head, faint, and the middle half of the heads, stronger; the outer has an outline."""
    parts = []
    for low, high, class_ in (("least", "most", "band outer"), ("lower", "upper", "band")):
        below, above = _places(one, low, frame), _places(one, high, frame)
        if below and above:
            edge = "L".join(f"{x:.1f} {y:.1f}" for x, y in (*below, *reversed(above)))
            parts.append(tag("path", class_=f"{class_} c{colour}", d=f"M{edge}z"))
    return parts


def _hovers(one: Growth, places: list[tuple[float, float]]) -> list[Markup]:
    """About a dozen invisible spots along the mean that say what it is there."""
    step = max(1, len(places) // 12)
    spots = []
    for index in range(0, len(places), step):
        values = {name: one.kept[name][index] for name in SPREAD}
        around = (
            f", from {count(round(values['least']))} to {count(round(values['most']))} over heads"
            if values["least"] is not None and values["most"] is not None
            else ""
        )
        said = f"{label_of(one.row)}: {count(round(values['mean']))} of {count(one.tokens[index])} kept{around}"
        spots.append(tag("circle", tag("title", said), class_="spot", cx=places[index][0], cy=places[index][1], r=9))
    return spots
