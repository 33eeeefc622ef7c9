"""The quality picture as a PNG, for places that show no page: a README, a slide. The only part that needs matplotlib."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from kvfold.data.whole_file import write_whole_file
from kvfold.errors import UserError, need_packages
from kvfold.report.groups import Group, group_results
from kvfold.report.numbers import tick
from kvfold.report.pictures.drawing import apart
from kvfold.report.pictures.quality import BEND, X_TITLE, Y_TITLE, Axes, axes_of
from kvfold.report.results import read_results
from kvfold.report.series import Line, colours_of, quality_lines, texts_of

COLOURS = ("#5b6068", "#0072b2", "#c24e00", "#007a58", "#9a3f86", "#7d5a00", "#b3123f", "#5148b0")
"""The page's colours on white, in the same order."""
MARKS = ("o", "s", "^", "D", "v")
INK, SOFT, LEVEL = "#1d1f23", "#5d6169", "#e9e6df"


def save_quality_png(results: Path, out: Path) -> Path:
    """Draw the newest quality measurement in `results` (a folder or a file) to `out`, a panel a text.

    UserError where matplotlib is missing or nothing is there to draw; nothing half-written is left.
    """
    need_packages("matplotlib", extra="plot", what="a PNG")
    found, _ = read_results(Path(results))
    groups = [group for group in group_results(found) if group.kind == "quality"]
    panels = _panels(groups[0]) if groups else []
    if not panels:
        raise UserError(
            f"{results}: no folded method with kept bytes and perplexity to draw: run `kvfold eval --out` first"
        )
    picture = BytesIO()
    # The same colours as on the page that is made from the same files.
    _figure(panels, colours_of(found)).savefig(picture, format="png", dpi=200)
    return write_whole_file(Path(out), picture.getvalue())


def _panels(group: Group) -> list[tuple[str, list[Line]]]:
    return [(text, lines) for text in texts_of(group.rows) if (lines := quality_lines(group.rows, text))]


def _figure(panels: Sequence[tuple[str, list[Line]]], colours: Mapping[str, int]) -> Any:
    """A matplotlib Figure, made without pyplot: no window, no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.4, 1.0 + 3.6 * len(panels)), 3.7), layout="constrained", facecolor="white")
    axes = axes_of([lines for _, lines in panels])
    places = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for place, (text, lines) in zip(places, panels, strict=True):
        _prepare(place, axes)
        place.set_title(text or "unnamed text", loc="left", fontsize=11, fontweight="bold", color=INK)
        for line in lines:
            _draw(place, line, COLOURS[colours.get(line.family, 0)], MARKS[colours.get(line.family, 0) % len(MARKS)])
        _name(place, lines, axes, colours)
    places[0].set_ylabel(Y_TITLE, color=SOFT)
    figure.supxlabel(X_TITLE, color=SOFT, fontsize=10)
    return figure


def _prepare(place: Any, axes: Axes) -> None:
    place.set_xscale("log", base=2)
    if axes.bent:
        place.set_yscale("asinh", linear_width=BEND)
    place.set_xlim(1.06, axes.least * 0.94)
    place.set_ylim(axes.low, axes.high)
    levels = axes.levels()
    place.set_xticks(axes.shares, [f"{tick(100 * share)} %" for share in axes.shares])
    place.set_yticks(levels, [f"{'+' if level > 0 else ''}{tick(level)} %" for level in levels])
    place.minorticks_off()
    place.grid(axis="y", color=LEVEL)
    place.set_axisbelow(True)
    place.tick_params(length=0, labelsize=9, labelcolor=SOFT)
    for side in place.spines.values():
        side.set_visible(False)
    place.axhline(0, color=COLOURS[0], linewidth=1.2)
    place.annotate("unfolded", (1, 0), xytext=(2, -11), textcoords="offset points", fontsize=8.5, color=SOFT)


def _draw(place: Any, line: Line, colour: str, mark: str) -> None:
    shares = [point.share for point in line.points]
    changes = [point.change for point in line.points]
    errors = [point.error or 0.0 for point in line.points]
    place.plot([1, shares[0]], [0, changes[0]], color=colour, linewidth=1, linestyle=(0, (1, 2.5)))
    place.errorbar(
        shares, changes, yerr=errors, color=colour, linewidth=1.8, elinewidth=1, linestyle="--" if line.grows else "-",
        marker=mark, markersize=6.5, markerfacecolor="white" if line.grows else colour, markeredgecolor=colour,
    )  # fmt: skip


def _name(place: Any, lines: Sequence[Line], axes: Axes, colours: Mapping[str, int]) -> None:
    """Names at the right edge, kept apart; heights are counted in shares of the panel."""
    span = axes.bend(axes.high) - axes.bend(axes.low)
    wanted = [1 - (axes.bend(line.points[-1].change) - axes.bend(axes.low)) / span for line in lines]
    for line, height in zip(lines, apart(wanted, 0.058, 0.0, 1.0), strict=True):
        place.annotate(
            line.title, (line.points[-1].share, line.points[-1].change), xytext=(1.06, 1 - height),
            textcoords="axes fraction", va="center", fontsize=9, fontweight="bold",
            color=COLOURS[colours.get(line.family, 0)], annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": COLOURS[colours.get(line.family, 0)], "linewidth": 0.6, "alpha": 0.5},
        )  # fmt: skip
