"""Every picture, one function each: from rows to a matplotlib figure of a width in pixels, or None where there is nothing to
draw. The page shows them as SVG (drawn anew for a phone, so that letters keep their size), README and `bench serve` as PNG.

Where a result brings a score of its own (`score`, named by `value_name`), that is what a map of layers and heads shows, since a
method with one budget for all keeps the same number everywhere.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.errors import UserError, need_packages
from kvfold.report import series
from kvfold.report.drawing import (
    LETTER,
    LIGHT,
    NAME_GAP,
    SERIES,
    SMALL,
    chart,
    curve,
    dot,
    name_ends,
    name_room,
    save_png,
    tip,
    write,
)
from kvfold.report.results import (
    count,
    difference,
    group_results,
    number,
    percent,
    read_results,
    size,
    size_unit,
    spread,
    three,
    tick,
    times,
)
from kvfold.report.sheets import COMPRESSION_NAME, KEPT_NAME, HeadMap

BEND = 2.0
"""Percent up to which a bent axis is nearly linear; beyond, equal steps are equal ratios."""
SHARING, PLAIN = 1, 2
"""Colours of models whose layers share, and of those whose don't."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Axes:
    """What all panels of the quality picture share: whether the upper part of the vertical axis is compressed, percent at the
    bottom and at the top, and shares of the cache at the left and at the right edge.
    """

    bent: bool
    low: float
    high: float
    most: float
    least: float

    def levels(self) -> list[float]:
        """Changes to draw a level line at, where the axis is bent: round ones, apart from each other."""
        steps = [sign * factor * 10.0**power for power in range(6) for factor in (1, 2, 5) for sign in (1, -1)]
        gap = (math.asinh(self.high / BEND) - math.asinh(self.low / BEND)) / 11
        kept: list[float] = []
        for level in (0.0, *steps):
            apart_enough = (abs(math.asinh(level / BEND) - math.asinh(other / BEND)) >= gap for other in kept)
            if self.low <= level <= self.high and all(apart_enough):
                kept.append(level)
        return sorted(kept)

    def shares(self) -> list[float]:
        """Ticks of the horizontal axis: halved from one to the next, or quartered, ..."""
        first, last = math.floor(math.log2(self.most)), math.ceil(math.log2(self.least))
        every = 1 + (first - last) // 5
        return [2.0**power for power in range(first, last - 1, -1) if power % every == 0]


def axes_of(panels: Sequence[tuple[str, Sequence[series.Line]]]) -> Axes:
    """Ranges that hold every point with its error; bent where small and large changes stand side by side."""
    points = [point for _, lines in panels for line in lines for point in line.points]
    high = max([1.0, *(point.change + (point.error or 0) for point in points)])
    low = min([0.0, *(point.change - (point.error or 0) for point in points)])
    bent = high > 12 and min(abs(point.change) for point in points) < high / 8
    bend, straight = (math.asinh, math.sinh) if bent else (float, float)
    top, bottom = bend(high / BEND), bend(low / BEND)
    # Room above the highest point, and below the base line for its name.
    low, high = (BEND * straight(edge) for edge in (bottom - 0.09 * (top - bottom), top + 0.04 * (top - bottom)))
    most, least = max([1.0, *(point.share for point in points)]), min([0.5, *(point.share for point in points)])
    return Axes(bent=bent, low=low, high=high, most=most * 1.04, least=least * 0.96)


def quality(
    panels: Sequence[tuple[str, Sequence[series.Line]]], axes: Axes, colours: Mapping[str, int], width: float,
    named: bool = False,
) -> Any:  # fmt: skip
    """Perplexity change against kept bytes, a panel a text, side by side; reading goes from the full cache to ever smaller ones.
    A line a method over its budgets, the unfolded model as the base line; `named`: whether a panel says its text.
    """
    names, room = name_room([line.title for _, lines in panels for line in lines], width / len(panels))
    left = max(46.0, 20 + LETTER * max(len(_signed(level)) for level in (axes.levels() if axes.bent else [axes.high])))
    height = max(300 if width < SMALL else 400, 72 + NAME_GAP * max(len(lines) for _, lines in panels))
    across, up = "share of the full cache kept", "perplexity change (lower is better)"
    titles, height = ((across, ""), 320) if named else ((across, up), height)
    figure, places = chart(width, height, left=left, right=room, titles=titles, panels=len(panels))
    for index, (place, (text, lines)) in enumerate(zip(places, panels, strict=True)):
        place.set(xscale="log", xlim=(axes.most, axes.least), ylim=(axes.low, axes.high))
        place.set_xticks(axes.shares(), [f"{tick(100 * share)} %" for share in axes.shares()])
        if axes.bent:
            place.set_yscale("asinh", linear_width=BEND)
            place.set_yticks(axes.levels())
        place.yaxis.set_major_formatter(lambda level, _: _signed(level))
        place.minorticks_off()
        place.axhline(0, color=SERIES[0], linewidth=1.5)
        place.annotate("unfolded", (1, 0), (0, -15), textcoords="offset points", fontsize=11.5, color=LIGHT["soft"])
        name_ends(place, [_quality_line(place, line, names.pop(0), colours.get(line.family, 0)) for line in lines])
        if named:
            start = width / len(panels) * index + 4
            write(figure, start, 13, f"{text or 'unnamed text'}: {up}", color=LIGHT["ink"], fontweight="bold")
    return figure


def _signed(level: float) -> str:
    return f"{'+' if level > 0 else ''}{tick(level)} %"


def _quality_line(place: Any, line: series.Line, name: str, colour: int) -> tuple[float, float, str, int]:
    first, last, style = line.points[0], line.points[-1], {"color": SERIES[colour]}
    if line.from_unfolded:
        place.plot([1, first.share], [0, first.change], linewidth=1.4, linestyle=(0, (1, 2.5)), **style)
    places = [(point.share, point.change) for point in line.points]
    place.plot(*zip(*places, strict=True), "--" if line.grows else "-", linewidth=2, **style)
    for point in line.points:
        ends = [point.change - (point.error or 0), point.change + (point.error or 0)]
        place.plot([point.share] * 2, ends, linewidth=1.25, **style)
        changed = difference(point.change, point.error, "%")
        said = f"{series.label_of(point.row)}: {percent(point.share)} of the bytes kept, perplexity {changed}"
        dot(place, point.share, point.change, colour, said, hollow=line.grows)
    return last.share, last.change, name, colour


def uptraining(roads: Sequence[series.Road], width: float) -> Any:
    """Perplexity change over tokens of training for the layouts of one text, both scales logarithmic: a power law is a straight
    line. A line through the best, marks for all, a dashed stroke for what was not measured.
    """
    from matplotlib.ticker import LogLocator

    names, room = name_room([road.layers or road.end.name for road in roads], width)
    _, (place,) = chart(width, left=58, right=room, titles=("tokens of training", "perplexity change"))
    place.set(xscale="log", yscale="log")
    for axis, subs, say in ((place.xaxis, (1,), count), (place.yaxis, (1, 2, 5), lambda change: f"+{tick(change)} %")):
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(lambda value, _, say=say: say(value))
    place.minorticks_off()
    ends = []
    for index, (road, name) in enumerate(zip(roads, names, strict=True)):
        colour, further = 1 + index % 7, road.end.tokens * series.FURTHER
        ends.append((further, road.beyond(further) or road.end.change, name, colour))
        tokens, changes = zip(*((one.tokens, one.change) for one in road.best), strict=True)
        place.plot(tokens, changes, color=SERIES[colour], linewidth=2)
        place.plot([road.end.tokens, further], [road.end.change, ends[-1][1]], "--", color=SERIES[colour], linewidth=2)
        for stage in road.stages:
            said = f"{stage.name}: {count(stage.tokens)} tokens, {difference(stage.change, stage.error, '%')}"
            dot(place, stage.tokens, stage.change, colour, said, hollow=stage not in road.best)
    place.margins(y=0.06)
    place.set_xlim(min(road.stages[0].tokens for road in roads) * 0.9, max(end[0] for end in ends))
    return name_ends(place, ends)


def memory(rows: Sequence[Mapping], colours: Mapping[str, int], width: float) -> Any:
    """Bytes of the cache while a text is written, a line a method."""
    lines = [(row, points) for row in rows if (points := series.memory_points(row))]
    if not lines:
        return None
    names, room = name_room([series.label_of(row) for row, _ in lines], width)
    _, (place,) = chart(width, left=64, right=room, titles=("tokens seen", "bytes held by the cache"))
    most = max(held for _, points in lines for _, held in points) or 1
    unit, unit_name = size_unit(most)
    place.set(xlim=(0, max(points[-1][0] for _, points in lines) or 1), ylim=(0, most * 1.04))
    place.yaxis.set_major_formatter(lambda held, _: f"{tick(held / unit)} {unit_name}")
    ends = []
    for (row, points), name in zip(lines, names, strict=True):
        label, colour = series.label_of(row), colours.get(series.family_of(row), 0)
        said = [f"{label}: {size(held)} after {count(at)} tokens" for at, held in points]
        ends.append(curve(place, points, name, colour, said, dashed="%" in label))
    return name_ends(place, ends)


def growth(rows: Sequence[Mapping], colours: Mapping[str, int], width: float) -> Any:
    """Tokens kept while a document is read: a line a method for the mean over all heads, the darker band for the middle half of
    the heads, the fainter one, with an outline, for all of them.
    """
    lines = [(row, one) for row in rows if (one := series.growth_of(row)) is not None]
    if not lines:
        return None
    names, room = name_room([*(series.label_of(row) for row, _ in lines), "tokens seen"], width)
    _, (place,) = chart(width, right=room, titles=("tokens seen", "tokens kept"))
    most = max(one["tokens"][-1] for _, one in lines)
    highest = max(value for _, one in lines for column in one.values() for value in column if value is not None)
    place.set(xlim=(0, most or 1), ylim=(0, max(highest, 1) * 1.02))
    place.yaxis.set_major_formatter(lambda value, _: count(value))
    place.plot([0, most], [0, most], color=SERIES[0], linewidth=1.5)
    ends = [(most, most, names.pop(), 0)]
    for (row, one), name in zip(lines, names, strict=True):
        colour = colours.get(series.family_of(row), 0)
        for low, high, alpha, stroke in (("least", "most", 0.09, 0.75), ("lower", "upper", 0.22, 0)):
            below, above = (series.known_pairs(one["tokens"], one[edge]) for edge in (low, high))
            if below and above:
                place.fill(*zip(*below, *reversed(above), strict=True), facecolor=(SERIES[colour], alpha),
                           edgecolor=(SERIES[colour], 0.45), linewidth=stroke)  # fmt: skip
        said = []
        for seen, *kept in zip(*(one[name] for name in ("tokens", "mean", "least", "most")), strict=True):
            mean, *edges = ("" if value is None else count(round(value)) for value in kept)
            around = ", from {} to {} over heads".format(*edges) if all(edges) else ""
            said.append(f"{series.label_of(row)}: {mean} of {count(seen)} kept{around}")
        ends.append(curve(place, list(zip(one["tokens"], one["mean"], strict=True)), name, colour, said))
    return name_ends(place, ends)


def over_steps(
    lines: Sequence[series.Run], title: str, width: float, *, least: float | None = None, across: str = "step"
) -> Any:
    """Lines over the steps of a run or the tokens it saw, every line its colour and its name at its end; `least`: where the
    vertical axis begins at the latest.
    """
    if not lines:
        return None
    names, room = name_room([one.name for one in lines], width)
    _, (place,) = chart(width, 240 if width < SMALL else 300, right=max(110, room), titles=(across, title))
    x, y = ([point[at] for one in lines for point in one.points] for at in (0, 1))
    low, high = min(y if least is None else [least, *y]), max(y)
    above = max(high - low, abs(high) * 1e-6, 1e-6)  # never so little that a picture could not tell them apart
    place.set(xlim=(min(x), max(max(x), min(x) + abs(min(x)) * 1e-6 + 1e-6)), ylim=(low, high + 0.04 * above))
    ends = []
    for index, (one, name) in enumerate(zip(lines, names, strict=True)):
        said = [f"{across} {count(step)}: {one.name} {three(value)}" for step, value in one.points]
        # A line that was asked for is neutral, as the unfolded model is elsewhere.
        ends.append(curve(place, one.points, name, 0 if one.dashed else 1 + index % 7, said, dashed=one.dashed))
    return name_ends(place, ends)


def speed(
    rows: Sequence[Mapping], sides: Sequence[tuple[str, str]], name: Callable[[Mapping], str], width: float
) -> Any:
    """Tokens per second of two sides at each point: bars from zero, with the spread of the runs, and their ratio. `sides`: name
    and key in a row of each; `name`: what a point is called.
    """
    edges = ("min", "median", "max")
    runs = [[[number(row, side, "tokens_per_second", edge) for edge in edges] for _, side in sides] for row in rows]
    shown = [(row, both) for row, both in zip(rows, runs, strict=True) if any(one[1] for one in both)]
    if not shown:
        return None
    figure, (place,) = chart(width, 72 + 70 * len(shown), left=92, right=70, titles=("tokens per second", ""))
    most = max(value for _, both in shown for one in both for value in one[1:] if value is not None)
    place.set(ylim=(70 * len(shown), 0), xlim=(0, most * 1.02), yticks=[])
    place.grid(axis="x", color=LIGHT["level"])
    place.xaxis.set_major_formatter(lambda value, _: tick(value))
    for index, (row, both) in enumerate(shown):
        top = 70 * index
        write(figure, 0, 38 + top, name(row), color=LIGHT["ink"], fontweight="bold")
        for at, ((side, _), (low, median, high)) in enumerate(zip(sides, both, strict=True)):
            y = top + 25.5 + 20 * at
            write(figure, 84, 28 + y + 4, side, ha="right")
            if median is None:
                write(figure, 98, 28 + y + 4, "not measured")
                continue
            around = spread(low, high)
            hover = f"{side}, {name(row)}: {three(median)} tokens/s" + (f", runs from {around}" if around else "")
            place.barh(y, median, 17, color=LIGHT["theirs" if at else "ours"])[0].set_gid(tip([hover]))
            if around:
                place.plot([low, high], [y, y], color=LIGHT["ink"], linewidth=1.5)
        if (ratio := number(row, "ratio", "median")) is not None:
            write(figure, width - 58, 28 + top + 41, times(ratio), color=LIGHT["ink"], fontweight="bold", fontsize=16)
    return figure


def design(models: Sequence[series.Model], width: float) -> Any:
    """Models from scratch: perplexity against bytes a token, halved or doubled at equal steps; a thin stroke spans the seeds, a
    dashed line joins those that nothing beats. Narrow pictures leave the names to the table.
    """
    from matplotlib.ticker import LogLocator

    named = width >= SMALL
    names, room = name_room([one.recipe for one in models], width)
    titles = ("bytes of keys and values a token, at 16 bit", "held-out perplexity")
    height = max(420, 80 + 13 * len(models)) if named else 300
    figure, (place,) = chart(width, height, right=room if named else 12, titles=titles)
    place.set_xscale("log", base=2)
    place.xaxis.set_major_locator(LogLocator(base=2, numticks=8 if named else 4))
    place.xaxis.set_major_formatter(lambda value, _: count(value))
    place.minorticks_off()
    best = [(one.kv_bytes, one.perplexity) for one in series.frontier(models)]
    place.plot(*zip(*best, strict=True), "--", color=SERIES[0], linewidth=1.5)
    ends = []
    for one, name in zip(models, names, strict=True):
        colour, seeds = SHARING if one.shares_layers else PLAIN, one.perplexities
        place.plot([one.kv_bytes] * 2, [seeds[0], seeds[-1]], color=SERIES[colour], linewidth=1.25)
        hover = f"{one.recipe}: {count(one.kv_bytes)} bytes a token, perplexity {three(one.perplexity)}"
        dot(place, one.kv_bytes, one.perplexity, colour, hover)
        ends.append((one.kv_bytes, one.perplexity, name, colour))
    place.margins(0.04, 0.06)
    return name_ends(place, ends) if named else figure


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


FAINTEST = 0.07
"""Opacity of the smallest value in a map: a measured cell is never as blank as one that is not there."""


def layers(rows: Sequence[Mapping], width: float) -> Any:
    """Compression of each layer over the steps of a run: steps to the right, layers downwards, stronger colour is more."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    found = series.layers_of(rows, 36 if width < SMALL else 80)
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
                across, down = (column, column + 1), (layer, layer + 0.95)
                box = [(across[x], down[y]) for x, y in ((0, 0), (1, 0), (1, 1), (0, 1), (0, 0))]
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
    return times(1), times(_most(series.layers_of(rows, 80)))


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
    write(figure, 0, 14, series.label_of(one.row), color=LIGHT["ink"], fontweight="bold")
    write(figure, 48, 28 + tall * num_heads + 15, "layer", ha="right")
    gaps = (1 if wide >= 6 else 0.3) / wide, 1 / tall
    for column, line in enumerate(one.values):
        for head, value in enumerate(line):
            if value is not None:
                alpha, hover = shade(place_on(scale, value, one.value_name)), tip([one.hovers[column][head]])
                style = {"facecolor": LIGHT["cell"], "alpha": alpha, "linewidth": 0, "gid": hover}
                place.add_patch(Rectangle((column, head), 1 - gaps[0], 1 - gaps[1], **style))
    every = next(step for step in (1, 2, 5, 10, 20, 50, 1000) if step * wide >= 24)
    across = {column: str(one.owners[column]) for column in range(0, len(one.owners), every)}
    down = {head: f"head {head}" for head in range(0, num_heads, 1 if tall >= 13 else 4)}
    return _named(figure, place, (len(one.owners), num_heads), across, down)


def shade(share: float) -> float:
    """Opacity of a value that lies so far between the smallest and the largest."""
    return FAINTEST + (1 - FAINTEST) * min(1.0, max(0.0, share))


def waits(rows: Sequence[Mapping[str, Any]]) -> Any:
    """How long clients of a server waited: the share of answers that were there after so many seconds, first tokens at the
    left, whole answers at the right.
    """
    figure, places = chart(1000, left=56, right=20, titles=("seconds after the request", ""), panels=2)
    for place, title, end in zip(places, ("First token", "Whole answer"), (1, 2), strict=True):
        place.set_title(f"{title}, share of requests", loc="left", fontsize=13, color=LIGHT["ink"])
        place.xaxis.set_major_formatter(lambda value, _: tick(value))
        for index, row in enumerate(rows):
            after = sorted(point[end] - point[0] for point in row["points"])
            # An answer that failed never comes: its line ends below 1.
            shares = [(place_of + 1) / row["requests"] for place_of in range(len(after))]
            name = f"{row['model']} at {row['url']}: {row['output_tokens_per_s']:.0f} tokens/s"
            place.step([0.0, *after], [0.0, *shares], where="post", color=SERIES[1 + index % 7], label=name)
        place.set(xlim=(0, None), ylim=(0, 1.02))
    places[1].legend(frameon=False, loc="lower right", fontsize=9)
    return figure


def save_waits(rows: Sequence[Mapping[str, Any]], out: Path) -> Path:
    """Draw what `bench serve` measured of each endpoint. UserError where matplotlib is missing or no answer came."""
    need_packages("matplotlib", extra="report", what="a PNG")
    if not any(row["points"] for row in rows):
        raise UserError("there is nothing to draw: no request was answered")
    return save_png(waits(rows), out)


def save_quality(results: Path, out: Path, *, families: Collection[str] = ()) -> Path:
    """Draw the newest quality measurement in `results` (a folder or a file) as PNG, a panel a text, in the colours of the page
    that is made from the same files; where `families` are named, of these methods on the unchanged model alone. UserError
    where matplotlib is missing or nothing is there to draw.
    """
    need_packages("matplotlib", extra="report", what="a PNG")
    found, _ = read_results(Path(results))
    groups = [group for group in group_results(found) if group.kind == "quality"]
    rows = groups[0].rows if groups else ()
    if families:
        rows = [row for row in rows if series.family_of(row) in families and not series.changed_model(row)]
    panels = series.quality_panels(rows)
    if not panels:
        raise UserError(
            f"{results}: no folded method with kept bytes and perplexity to draw: run `kvfold eval --out` first"
        )
    return save_png(quality(panels, axes_of(panels), series.colours_of(found), 400.0 * len(panels), named=True), out)
