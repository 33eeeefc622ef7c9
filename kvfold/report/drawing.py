"""What every picture shares: colours, a chart of a size in pixels, names kept apart, and writing a figure as SVG or PNG.

Pictures are drawn in the light colours of the page. In SVG each of them becomes the CSS variable of its name, so that the page
shows the same drawing in light, dark and print; text stays text, in the page's own font. matplotlib is imported where it draws.
"""

import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

from kvfold.record import write_whole_file
from kvfold.report.results import count, tick

COLOURS = {
    "page": ("#fcfbf8", "#15171a"), "ink": ("#1d1f23", "#e9e6df"), "soft": ("#5d6169", "#a2a5ab"), "hair": ("#e3e0d8", "#30343a"),
    "level": ("#ebe8e1", "#272b30"), "accent": ("#0a6a8f", "#7cc4e4"), "cell": ("#0b6a8f", "#58b4dc"),
    "on-cell": ("#ffffff", "#0c1216"), "tint": ("#d9e9f1", "#1c3947"), "ours": ("#0071b1", "#2f83bf"),
    "theirs": ("#bcbfc4", "#545a62"), "k0": ("#5b6068", "#a2a5ab"), "k1": ("#0072b2", "#6cb8f0"), "k2": ("#c24e00", "#ff9a57"),
    "k3": ("#007a58", "#45cfa1"), "k4": ("#9a3f86", "#e398d1"), "k5": ("#7d5a00", "#e0bf50"), "k6": ("#b3123f", "#ff8299"),
    "k7": ("#5148b0", "#aeb2ff"),
}  # fmt: skip
"""CSS variable -> colour in light and in dark; the light ones differ from each other, since SVG is recoloured by them."""
LIGHT = {name: light for name, (light, _) in COLOURS.items()}
SERIES = tuple(LIGHT[f"k{index}"] for index in range(8))
"""Colours of lines: 0 is the unfolded model's."""
MARKERS = "os^Dv"
"""Shapes differ too, for eyes that tell colours apart badly and for grey paper."""

LETTER = 6.6
"""Mean width of a letter at the size of labels, pixels; a little wide on purpose."""
NAME_GAP = 14.0
"""Pixels from one name to the next, at least."""
SMALL = 500
"""Pictures narrower than this, for phones, are less high and have fewer ticks."""
_TIP, _NEXT = "tip:", "\u2028"
_PLAIN = ("font-family", "font-size: 11.5px", "text-anchor: start", "stroke-linecap: square", f"fill: {LIGHT['soft']}")
"""What the page's style sheet says of all pictures, or that makes no difference."""
_LINK = "{http://www.w3.org/1999/xlink}href"
_NAMES = {light: f"var(--{name})" for name, light in LIGHT.items()}


def chart(
    width: float, height: float = 0, *, left: float = 52, right: float = 12, titles: tuple[str, str] = ("", ""), panels: int = 1
) -> tuple[Any, list[Any]]:  # fmt: skip
    """A figure of so many pixels and its axes, side by side, with margins in pixels, round ticks and counts along the x axis;
    `titles` of the x and y axis. Without the former there is less room below.
    """
    from matplotlib.figure import Figure

    height = height or (300 if width < SMALL else 400)
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    each, bottom, places = width / panels, 44 if titles[0] else 22, []
    for start in (index * each for index in range(panels)):
        box = ((start + left) / width, bottom / height, (each - left - right) / width, (height - bottom - 28) / height)
        place = figure.add_axes(box)
        place.patch.set_visible(False)
        place.spines[:].set_visible(False)
        place.tick_params(length=0, labelsize=11.5, labelcolor=LIGHT["soft"], pad=7)
        place.grid(axis="y", color=LIGHT["level"], linewidth=1)
        place.set_axisbelow(True)
        ruled(place.xaxis, 3 if width < SMALL else 6, count)
        ruled(place.yaxis, 5, tick)
        write(figure, start + 4, 13, titles[1])
        write(figure, start + (left + each - right) / 2, height - 8, titles[0], ha="center")
        places.append(place)
    return figure, places


def write(figure: Any, x: float, y: float, text: str, **style: Any) -> None:
    """Text whose base line begins (or by `ha` is centred or ends) so many pixels from the left and the top."""
    width, height = figure.get_size_inches() * 72
    style = {"fontsize": 11.5, "color": LIGHT["soft"], "parse_math": False, **style}
    figure.text(x / width, 1 - y / height, plain(text), **style)


def ruled(axis: Any, most: int, say: Callable[[float], str]) -> None:
    """At most about `most` ticks at round values of one axis (`place.xaxis`), each written by `say`."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(lambda value, _: say(value))


def dot(place: Any, x: float, y: float, colour: int, hover: str, hollow: bool = False) -> None:
    """One mark in the colour and shape of its line that says more when it is pointed at."""
    place.plot(
        [x], [y], MARKERS[colour % len(MARKERS)], color=SERIES[colour], gid=tip([hover]), markersize=7.5, clip_on=False,
        markerfacecolor=LIGHT["page"] if hollow else SERIES[colour], zorder=3,
        markeredgecolor=SERIES[colour] if hollow else LIGHT["page"], markeredgewidth=1.6 if hollow else 1,
    )  # fmt: skip


def curve(
    place: Any, points: Sequence[tuple[float, float]], name: str, colour: int, said: Sequence[str], *, dashed: bool = False
) -> tuple[float, float, str, int]:  # fmt: skip
    """A line of points, about a dozen of which say what they are when pointed at; gives its end and its name."""
    place.plot(*zip(*points, strict=True), "--" if dashed else "-", color=SERIES[colour], linewidth=2)
    every = max(1, len(points) // 12)
    spots(place, points[::every], said[::every])
    return (*points[-1], name, colour)


def spots(place: Any, points: Sequence[tuple[float, float]], said: Sequence[str]) -> None:
    """Invisible marks that say what is there when pointed at."""
    style = {"color": LIGHT["page"], "alpha": 0, "markersize": 18, "markeredgewidth": 0}
    place.plot(*zip(*points, strict=True), "o", gid=tip(said), **style)


def tip(hovers: Iterable[str]) -> str:
    """The id of an artist that in SVG becomes the tooltip of each of its marks."""
    return _TIP + _NEXT.join(map(plain, hovers))


def plain(text: str) -> str:
    """Without what SVG cannot hold: control characters become spaces."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def short(text: str, pixels: float) -> str:
    """The text, cut with an ellipsis where it is wider than that; tables have it whole."""
    most = max(1, int(pixels / LETTER))
    return text if len(text) <= most else text[: most - 1] + "…"


def name_room(names: Iterable[str], width: float) -> tuple[list[str], float]:
    """Names cut to at most two fifths of a picture's width, and the margin in pixels that they, in bold, need at the right."""
    names = [short(name, width * 0.4) for name in names]
    return names, max(map(len, names)) * LETTER * 1.08 + 24


def name_ends(place: Any, ends: Sequence[tuple[float, float, str, int]]) -> Any:
    """The figure with names of lines in a column at the right, (x, y, name, colour) each, kept apart, with a thin stroke from the
    line's end.
    """
    from matplotlib.lines import Line2D

    figure = place.figure
    place.get_xlim(), place.get_ylim()  # pending autoscaling is done now
    width, height = figure.get_size_inches() * 72
    box = place.get_position()
    tops = [height - place.transData.transform((x, y))[1] for x, y, _, _ in ends]
    at = box.x1 * width + 14
    heights = apart(tops, NAME_GAP, height * (1 - box.y1), height * (1 - box.y0))
    for (x, y, name, colour), placed in zip(ends, heights, strict=True):
        across, up = place.transData.transform((x, y))
        strokes = [(across + 6) / width, (at - 4) / width], [up / height, 1 - placed / height]
        stroke = Line2D(*strokes, transform=figure.transFigure, color=SERIES[colour], linewidth=0.75, alpha=0.55)
        figure.add_artist(stroke)
        write(figure, at, placed, name, color=SERIES[colour], fontweight="bold", va="center_baseline")
    return figure


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near to the wanted ones as can be, at least `gap` apart, in the same order, within low..high.

    Neighbours that would touch are moved as one block around their mean.
    """
    blocks: list[list[int]] = []

    def start(block: list[int]) -> float:
        middle, length = sum(wanted[index] for index in block) / len(block), gap * (len(block) - 1)
        return max(low, min(middle - length / 2, high - length))

    for index in sorted(range(len(wanted)), key=lambda index: wanted[index]):
        blocks.append([index])
        while len(blocks) > 1 and start(blocks[-1]) < start(blocks[-2]) + gap * len(blocks[-2]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    placed = {index: start(block) + gap * at for block in blocks for at, index in enumerate(block)}
    return [placed[index] for index in range(len(wanted))]


def svg(figure: Any, spoken: str) -> Markup:
    """The figure for the page; `spoken` is what a screen reader says of it."""
    written = _saved(figure, StringIO(), format="svg", transparent=True, metadata={"Date": None}).getvalue()
    prefix = f"p{zlib.crc32(written.encode()):08x}"
    (root,) = _slim(ElementTree.fromstring(written), prefix)
    width = root.get("viewBox", "").split()[2]
    root.attrib |= {"role": "img", "aria-label": plain(spoken), "width": width}
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # escaped by the serialiser


def save_png(figure: Any, out: Path) -> Path:
    """The figure on white, for places that show no page; complete or not there at all."""
    return write_whole_file(Path(out), _saved(figure, BytesIO(), format="png", dpi=144, facecolor="white").getvalue())


def _saved(figure: Any, stream: Any, **how: Any) -> Any:
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "kvfold"}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that matplotlib's font lacks: the reader's font may have them
        figure.savefig(stream, **how)
    return stream


def _slim(element: ElementTree.Element, prefix: str) -> list[ElementTree.Element]:
    """An element of matplotlib's SVG as the page needs it: no namespaces, metadata, clipping or groups; ids by picture, colours
    by name, tooltips as titles.
    """
    name, known = element.tag.rpartition("}")[2], element.attrib
    style = _style(known.get("style", ""))
    if name in ("metadata", "style", "clipPath") or (name == "path" and style == "fill: none"):
        return []
    children = [slim for child in element for slim in _slim(child, prefix)]
    if name == "g":
        hovers = known.get("id", "").removeprefix(_TIP).split(_NEXT) if known.get("id", "").startswith(_TIP) else []
        marks = [child for child in children if child.tag != "defs"]
        for mark, hover in zip(marks, hovers, strict=True) if len(marks) == len(hovers) else ():
            mark.insert(0, title := ElementTree.Element("title"))
            title.text = hover
    if name == "g" or (name == "defs" and not children):
        return children
    slim = ElementTree.Element(name, {key: _rounded(known[key]) for key in ("d", "x", "y", "viewBox") if key in known})
    slim.attrib |= {"style": style} if style else {}
    slim.attrib |= {"href": f"#{prefix}{known[_LINK][1:]}"} if _LINK in known else {}
    slim.attrib |= {"id": prefix + known["id"]} if name == "path" and "id" in known else {}
    slim.text = (element.text or "").strip() if name == "text" else None
    slim.extend(children)
    return [slim]


def _rounded(path: str) -> str:
    """Coordinates with one digit behind the point: a tenth of a pixel is enough, and pages stay small."""
    return " ".join(re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), path).split())


def _style(style: str) -> str:
    """Colours by their variables, the page's font in place of matplotlib's."""
    kept = [part for part in style.split("; ") if part and not part.startswith(_PLAIN)]
    return re.sub(r"#[0-9a-f]{6}", lambda found: _NAMES.get(found[0], found[0]), "; ".join(kept))
