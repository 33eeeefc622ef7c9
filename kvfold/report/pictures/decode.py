"""Decode speed: kvfold's and the peer's tokens per second at each point, bars from zero, with the spread of the runs."""

from collections.abc import Mapping, Sequence

from kvfold.report.markup import Markup, tag
from kvfold.report.numbers import spread, three, tick, times
from kvfold.report.pictures.drawing import Frame, picture, ticks, write
from kvfold.report.results import number, words
from kvfold.report.series import UNFOLDED

SIDES = (("ours", "kvfold"), ("theirs", "transformers"))
ROW, BAR = 70, 17
"""Height of one point with both its bars, and of one bar."""


def point_name(row: Mapping) -> str:
    """`8 x 1,024`, and how it differs from the plain case: padded rows, a method that folds."""
    name = words(row, "point").replace(" x ", " × ") or "unnamed point"
    method = words(row, "method")
    extras = [method] if method and method != UNFOLDED else []
    extras += ["left-padded rows"] if row.get("padded") is True else []
    return ", ".join([name, *extras])


def decode_picture(rows: Sequence[Mapping], width: float) -> Markup | None:
    """One SVG, or None where no row has a speed."""
    rows = [row for row in rows if any(number(row, side, "tokens_per_second", "median") for side, _ in SIDES)]
    if not rows:
        return None
    fastest = max(
        number(row, side, "tokens_per_second", edge) or 0
        for row in rows
        for side, _ in SIDES
        for edge in ("median", "max")
    )
    height = 24 + ROW * len(rows) + 44
    frame = Frame(
        left=92, right=width - 70, top=24, bottom=height - 44, x_range=(0, fastest * 1.02), y_range=(0, 1)
    )  # fmt: skip
    x_ticks = [(value, tick(value)) for value in ticks(0, fastest, 3 if width < 500 else 6)]
    parts = frame.axes(x_ticks, [], "tokens per second", "")
    for value, _ in x_ticks:
        x = frame.x(value)
        parts.append(tag("line", class_="level", x1=x, x2=x, y1=frame.top, y2=frame.bottom))
    for index, row in enumerate(rows):
        parts.extend(_point(row, frame, frame.top + index * ROW))
    return picture(
        width, height, "Tokens per second of kvfold and transformers. The table below has the numbers.", *parts
    )


def _point(row: Mapping, frame: Frame, top: float) -> list[Markup]:
    parts = [write(0, top + 10, point_name(row), "name")]
    for index, (side, name) in enumerate(SIDES):
        y = top + 17 + index * (BAR + 3)
        parts.append(write(frame.left - 8, y + BAR - 4, name, "tick", "end"))
        low, median, high = (number(row, side, "tokens_per_second", edge) for edge in ("min", "median", "max"))
        if median is None:
            parts.append(write(frame.left + 6, y + BAR - 4, "not measured", "quiet"))
            continue
        around = spread(low, high)
        hover = f"{name}, {point_name(row)}: {three(median)} tokens/s" + (f", runs from {around}" if around else "")
        parts.append(
            tag(
                "rect", tag("title", hover), class_=f"bar {side}",
                x=frame.left, y=y, width=max(0.0, frame.x(median) - frame.left), height=BAR,
            )
        )  # fmt: skip
        if around:
            middle = y + BAR / 2
            parts.append(tag("line", class_="runs", x1=frame.x(low), x2=frame.x(high), y1=middle, y2=middle))
    ratio = number(row, "ratio", "median")
    if ratio is not None:
        around = spread(number(row, "ratio", "min"), number(row, "ratio", "max"))
        parts.append(
            tag(
                "g",
                tag("title", f"runs from {around}" if around else "one run"),
                write(frame.right + 12, top + 41, times(ratio), "big"),
            )
        )
    return parts
