"""What more training makes of a changed model: its perplexity over the tokens that it saw, and where that would lead.

Both axes are logarithmic: a power law is a straight line, and nothing is claimed beyond that.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvfold.report.markup import Markup
from kvfold.report.numbers import count, difference, tick
from kvfold.report.pictures.drawing import (
    LETTER,
    MOST_NAME,
    Frame,
    end_labels,
    mark,
    picture,
    polyline,
    short,
)
from kvfold.report.results import number, words
from kvfold.report.series import UNFOLDED, changed_model, kept_share

LAST = 3
"""Points that an extrapolation rests on, and that a line needs."""
FURTHER = 10
"""As many times the most tokens is how far it goes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One model after so much training."""

    tokens: float
    """That it saw, those that weights were fitted on included."""
    change: float
    """Of its perplexity against the model it came from, percent, above 0."""
    error: float | None
    """Its standard error, percent."""
    name: str
    """Of the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Road:
    """The models of one layout on one text."""

    text: str
    layers: str
    """Which layers share, as a `--layers` text."""
    stages: tuple[Stage, ...]
    """All of them, the fewest tokens first."""
    best: tuple[Stage, ...]
    """Those that none on as few tokens comes up to; at least `LAST`."""

    def beyond(self, tokens: float) -> float | None:
        """The change after so many tokens, in percent, if it fell on as over the last points: extrapolated. None where it
        doesn't fall.
        """
        x = [math.log(stage.tokens) for stage in self.best[-LAST:]]
        y = [math.log(stage.change) for stage in self.best[-LAST:]]
        slope, at_one = statistics.linear_regression(x, y)
        return math.exp(slope * math.log(tokens) + at_one) if slope < 0 else None

    @property
    def end(self) -> Stage:
        """The last measured one."""
        return self.best[-1]


def roads_of(rows: Sequence[Mapping]) -> list[Road]:
    """Of models that store less by themselves and drop nothing besides, those layouts that were trained to several lengths."""
    found: dict[tuple[str, str, float], list[Stage]] = {}
    for row in rows:
        tokens, share = number(row, "trained_tokens"), kept_share(row)
        change = number(row, "perplexity_change_percent", "mean")
        drops = words(row, "method").partition(" of ")[0] != UNFOLDED
        if drops or not changed_model(row) or not tokens or change is None or change <= 0:
            continue
        error = number(row, "perplexity_change_percent", "standard_error")
        key = (words(row, "text"), words(row, "layers"), round(share or 0, 2))
        found.setdefault(key, []).append(Stage(tokens=tokens, change=change, error=error, name=words(row, "model")))
    roads = [
        Road(text=text, layers=layers, stages=tuple(sorted(stages, key=_place)), best=_best(stages))
        for (text, layers, _), stages in found.items()
    ]
    return [road for road in roads if len(road.best) >= LAST]


def _place(stage: Stage) -> tuple[float, float]:
    return stage.tokens, stage.change


def _best(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    kept: list[Stage] = []
    for stage in sorted(stages, key=_place):
        if not kept or (stage.change < kept[-1].change and stage.tokens > kept[-1].tokens):
            kept.append(stage)
    return tuple(kept)


def uptraining_picture(roads: Sequence[Road], width: float) -> Markup:
    """One SVG for the roads of one text: a line through the best, marks for all, a dashed stroke for what was not measured."""
    names = [short(road.layers or road.end.name, width * MOST_NAME) for road in roads]
    room = max(map(len, names)) * LETTER
    ends = [(road.end.tokens * FURTHER, road.beyond(road.end.tokens * FURTHER) or road.end.change) for road in roads]
    changes = [stage.change for road in roads for stage in road.stages] + [change for _, change in ends]
    first = min(stage.tokens for road in roads for stage in road.stages)
    low, high = math.log(min(changes)) - 0.15, math.log(max(changes)) + 0.15
    height = 300 if width < 500 else 400
    frame = Frame(
        left=58, right=width - room - 26, top=28, bottom=height - 44, x_bend=math.log, y_bend=math.log,
        x_range=(math.log(first) - 0.1, math.log(max(tokens for tokens, _ in ends))), y_range=(low, high),
    )  # fmt: skip
    y_ticks = [(value, f"+{tick(value)} %") for value in _steps(math.exp(low), math.exp(high), (1, 2, 5))]
    x_ticks = [(value, count(value)) for value in _steps(first, max(tokens for tokens, _ in ends), (1,))]
    parts = frame.axes(x_ticks, y_ticks, "tokens of training", "perplexity change")
    labels = []
    for colour, (road, (tokens, change), name) in enumerate(zip(roads, ends, names, strict=True), 1):
        parts += _road(road, (frame.x(tokens), frame.y(change)), frame, colour)
        labels.append((frame.x(tokens), frame.y(change), name, colour))
    parts += end_labels(labels, frame.top, frame.bottom - 2)
    spoken = f"Perplexity change over tokens of training, text {roads[0].text or 'unnamed'}. The table below has the numbers."
    return picture(width, height, spoken, *parts)


def _road(road: Road, end: tuple[float, float], frame: Frame, colour: int) -> list[Markup]:
    places = [(frame.x(stage.tokens), frame.y(stage.change)) for stage in road.best]
    parts = [polyline(places, f"line c{colour}"), polyline([places[-1], end], f"line dashed c{colour}")]
    for stage in road.stages:
        said = f"{stage.name}: {count(stage.tokens)} tokens, {difference(stage.change, stage.error, '%')}"
        hollow = stage not in road.best
        parts.append(mark(colour, frame.x(stage.tokens), frame.y(stage.change), said, hollow=hollow))
    return parts


def _steps(low: float, high: float, factors: Sequence[int]) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
