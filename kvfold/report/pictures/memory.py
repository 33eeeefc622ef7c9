"""Memory over time: bytes of the cache while a text is written, a line per method."""

from collections.abc import Mapping, Sequence

from kvfold.report.markup import Markup
from kvfold.report.numbers import count, size, size_unit, tick
from kvfold.report.pictures.drawing import LETTER, MOST_NAME, Frame, end_labels, picture, polyline, short, spots, ticks
from kvfold.report.results import number
from kvfold.report.series import family_of, label_of

X_TITLE = "tokens seen"
Y_TITLE = "bytes held by the cache"


def memory_points(row: Mapping) -> list[tuple[float, float]]:
    """(tokens, bytes) of one row, in order of tokens; pairs with a missing half are left out."""
    both = [row.get("tokens"), row.get("allocated_bytes")]
    if not all(isinstance(values, list) for values in both):
        return []
    pairs = [(number({"x": t}, "x"), number({"x": b}, "x")) for t, b in zip(*both, strict=False)]
    return sorted((tokens, held) for tokens, held in pairs if tokens is not None and held is not None)


def memory_picture(rows: Sequence[Mapping], colours: Mapping[str, int], width: float) -> Markup | None:
    """One SVG, or None where no row has points."""
    lines = [(row, points) for row in rows if (points := memory_points(row))]
    if not lines:
        return None
    most_tokens = max(points[-1][0] for _, points in lines) or 1
    most_bytes = max(held for _, points in lines for _, held in points) or 1
    names = [short(label_of(row), width * MOST_NAME) for row, _ in lines]
    room = max(map(len, names)) * LETTER
    height = 300 if width < 500 else 380
    frame = Frame(
        left=64, right=width - room - 26, top=28, bottom=height - 44,
        x_range=(0, most_tokens), y_range=(0, most_bytes * 1.05),
    )  # fmt: skip
    most_ticks = 3 if width < 500 else 6
    x_ticks = [(value, count(value)) for value in ticks(0, most_tokens, most_ticks)]
    unit, unit_name = size_unit(most_bytes)
    y_ticks = [(value, f"{tick(value / unit)} {unit_name}") for value in ticks(0, most_bytes, 5)]
    parts = frame.axes(x_ticks, y_ticks, X_TITLE, Y_TITLE)
    ends = []
    for (row, points), name in zip(lines, names, strict=True):
        colour = colours.get(family_of(row), 0)
        places = [(frame.x(tokens), frame.y(held)) for tokens, held in points]
        parts.append(polyline(places, f"line{' dashed' if '%' in label_of(row) else ''} c{colour}"))
        said = [f"{label_of(row)}: {size(held)} after {count(tokens)} tokens" for tokens, held in points]
        parts.extend(spots(said, places))
        ends.append((*places[-1], name, colour))
    parts.extend(end_labels(ends, frame.top, frame.bottom - 2))
    return picture(width, height, "Bytes held by the cache over tokens seen. The table below has the numbers.", *parts)
