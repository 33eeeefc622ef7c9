"""Models from scratch: perplexity against bytes a token, with the line of those that nothing beats; and their losses."""

import math
from collections.abc import Sequence

from kvfold.report.design import Model, frontier
from kvfold.report.markup import Markup
from kvfold.report.numbers import count, three, tick
from kvfold.report.pictures.curve import Series
from kvfold.report.pictures.drawing import LETTER, Frame, apart, mark, picture, polyline, ticks, write
from kvfold.report.results import number

SHARING, PLAIN = 1, 2
"""Colours of models whose layers share, and of those whose don't."""
_LINE = 13
"""Pixels from name to name."""
_NAMES_FROM = 500
"""Width from which models are named in the picture; narrower, the table has the names."""


def design_picture(models: Sequence[Model], width: float) -> Markup:
    """One SVG: bytes to the right, halved or doubled at equal steps, perplexity upwards; a thin stroke spans the seeds."""
    named = width >= _NAMES_FROM
    height = max(420, 80 + _LINE * len(models)) if named else 300
    room = max(len(one.recipe) for one in models) * LETTER + 24 if named else 12
    values = [value for one in models for value in one.perplexities]
    low, high = min(values), max(values)
    edge = max(high - low, high * 0.01) * 0.06
    bytes_ = [math.log2(one.kv_bytes) for one in models]
    frame = Frame(
        left=52, right=width - room, top=28, bottom=height - 44, x_range=(min(bytes_) - 0.2, max(bytes_) + 0.2),
        x_bend=math.log2, y_range=(low - edge, high + edge),
    )  # fmt: skip
    x_ticks = [(2.0**power, count(2.0**power)) for power in range(math.ceil(min(bytes_)), math.floor(max(bytes_)) + 1)]
    every = -(-len(x_ticks) // (3 if width < _NAMES_FROM else 8)) or 1
    y_ticks = [(value, tick(value)) for value in ticks(low, high, 5)]
    parts = frame.axes(x_ticks[::every], y_ticks, "bytes of keys and values a token, at 16 bit", "held-out perplexity")
    best = [(frame.x(one.kv_bytes), frame.y(one.perplexity)) for one in frontier(models)]
    parts.append(polyline(best, "line dashed c0"))
    for one in models:
        parts += _mark(one, frame)
    if named:
        parts += _names(models, frame)
    spoken = "Held-out perplexity against bytes of keys and values a token. The table below has the numbers."
    return picture(width, height, spoken, *parts)


def _colour(one: Model) -> int:
    return SHARING if one.shares_layers else PLAIN


def _mark(one: Model, frame: Frame) -> list[Markup]:
    x, y, colour = frame.x(one.kv_bytes), frame.y(one.perplexity), _colour(one)
    lowest, highest = one.perplexities[0], one.perplexities[-1]
    hover = f"{one.recipe}: {count(one.kv_bytes)} bytes a token, perplexity {three(one.perplexity)}"
    span = [polyline([(x, frame.y(lowest)), (x, frame.y(highest))], f"error c{colour}")] if len(one.runs) > 1 else []
    return [*span, mark(colour, x, y, hover)]


def _names(models: Sequence[Model], frame: Frame) -> list[Markup]:
    """All names in one column at the right, from top to bottom as the models lie, each with a stroke to its mark."""
    heights = apart([frame.y(one.perplexity) for one in models], _LINE, frame.top, frame.bottom)
    parts = []
    for one, place in zip(models, heights, strict=True):
        x, y, colour = frame.x(one.kv_bytes), frame.y(one.perplexity), _colour(one)
        parts.append(polyline([(x + 6, y), (frame.right + 6, place)], f"leader c{colour}"))
        parts.append(write(frame.right + 10, place + 4, one.recipe, f"name c{colour}"))
    return parts


def loss_lines(models: Sequence[Model], most: int = 7) -> list[Series]:
    """The losses of the best runs over their tokens, of as many models as there are colours: those that nothing beats first."""
    first = frontier(models)
    lines = []
    for one in [*first, *(other for other in models if other not in first)]:
        points = _points(one)
        if points and len(lines) < most:
            lines.append(Series(name=one.recipe, points=points))
    return lines


def _points(one: Model) -> tuple[tuple[float, float], ...]:
    curve = one.row.get("curve")
    tokens, losses = ((curve or {}).get(key) for key in ("tokens", "loss")) if isinstance(curve, dict) else (None, None)
    if not isinstance(tokens, list) or not isinstance(losses, list):
        return ()
    pairs = [(number({"x": at}, "x"), number({"x": loss}, "x")) for at, loss in zip(tokens, losses, strict=False)]
    return tuple((at, loss) for at, loss in pairs if at is not None and loss is not None)
