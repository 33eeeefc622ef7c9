"""Maps whose colour is the number: what each layer and head keeps, and each layer's compression over the steps of a run. A
function gives a matplotlib figure of a width in pixels, or None where there is nothing to draw.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from kvfold.report.drawing import LIGHT, SMALL, chart, tip, write
from kvfold.report.heads import HeadMap, place_on
from kvfold.report.numbers import count, times
from kvfold.report.series import label_of, layers_of

FAINTEST = 0.07
"""Opacity of the smallest value in a map: a measured cell is never as blank as one that is not there."""


def layers(rows: Sequence[Mapping], width: float) -> Any:
    """Compression of each layer over the steps of a run: steps to the right, layers downwards, stronger colour is more."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    found = layers_of(rows, 36 if width < SMALL else 80)
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
                left, right, top, bottom = column, column + 1, layer, layer + 0.95
                box = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
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
    return times(1), times(_most(layers_of(rows, 80)))


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
    write(figure, 0, 14, label_of(one.row), color=LIGHT["ink"], fontweight="bold")
    write(figure, 48, 28 + tall * num_heads + 15, "layer", ha="right")
    gaps = (1 if wide >= 6 else 0.3) / wide, 1 / tall
    for column, line in enumerate(one.values):
        for head, value in enumerate(line):
            if value is not None:
                style = {
                    "facecolor": LIGHT["cell"],
                    "alpha": shade(place_on(scale, value, one.value_name)),
                    "linewidth": 0,
                }
                box = Rectangle((column, head), 1 - gaps[0], 1 - gaps[1], gid=tip([one.hovers[column][head]]), **style)
                place.add_patch(box)
    every = next(step for step in (1, 2, 5, 10, 20, 50, 1000) if step * wide >= 24)
    across = {column: str(one.owners[column]) for column in range(0, len(one.owners), every)}
    down = {head: f"head {head}" for head in range(0, num_heads, 1 if tall >= 13 else 4)}
    return _named(figure, place, (len(one.owners), num_heads), across, down)


def shade(share: float) -> float:
    """Opacity of a value that lies so far between the smallest and the largest."""
    return FAINTEST + (1 - FAINTEST) * min(1.0, max(0.0, share))
