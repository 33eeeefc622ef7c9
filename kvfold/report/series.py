"""From rows to what is drawn: the names of methods, their colours on one page, the lines of the quality picture.

A family is a method whatever its budget: `h2o:128+128` and `h2o:256+256` are one line. A budget that grows with the
text (in percent) is a line of its own, since a fixed one starts uncompressed and looks better than it is on short texts.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvfold.report.results import Result, number, words

NUM_COLOURS = 7
"""Colours in the style sheet, apart from the neutral one (index 0) of the unfolded model."""
UNFOLDED = "full"
_OWN_SHARE = 0.9
"""Below it a model's layout saves by itself; what a method stores besides (pages, scores) can only raise the share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One measured budget of one method on one text."""

    share: float
    """Kept bytes over the bytes of the full cache, 1.0 = nothing saved."""
    change: float
    """Perplexity change against the unfolded model, percent."""
    error: float | None
    """Its standard error, percent."""
    row: Mapping
    """The row it came from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One method over its budgets on one text, the largest budget first."""

    title: str
    """What stands at its end."""
    family: str
    """The method's name without settings: decides the colour."""
    grows: bool
    """Whether the budgets are shares of the text."""
    points: tuple[Point, ...]
    """At least one."""
    from_unfolded: bool = True
    """Whether a budget that covers the text makes it the unfolded model, as it doesn't for a model with other weights."""


def family_of(row: Mapping) -> str:
    """The method's name without its settings. Layers under different methods (`tova:64; 0-3=full`) are a family of their own."""
    method = words(row, "method")
    return method if ";" in method else method.partition(":")[0].strip() or words(row, "title") or "unnamed"


def title_of(row: Mapping) -> str:
    """What people call the method, first letter large; a model's own name as it is."""
    mixed = ";" in words(row, "method")
    title = family_of(row) if mixed else words(row, "title") or family_of(row)
    return title if title == words(row, "model") else title[:1].upper() + title[1:]


def label_of(row: Mapping) -> str:
    """Title and settings: `H2O 128+128`. The method's own text form where there is no title, or several methods."""
    if not words(row, "title") or ";" in words(row, "method"):
        return words(row, "method") or title_of(row)
    settings = words(row, "method").partition(":")[2].strip()
    return f"{title_of(row)} {settings}".strip()


def colours_of(results: Iterable[Result]) -> dict[str, int]:
    """Family -> colour index, the same in every picture of a page; the unfolded model is 0, others 1, 2, ... in turn.

    In alphabetical order, so that a page made again with one more file of known methods keeps its colours.
    """
    rows = [
        row for result in results if result.kind in ("quality", "memory", "kept", "document") for row in result.rows
    ]
    families = sorted({family_of(row) for row in rows} - {UNFOLDED})
    return {UNFOLDED: 0} | {family: 1 + index % NUM_COLOURS for index, family in enumerate(families)}


def kept_share(row: Mapping) -> float | None:
    """Allocated bytes over those of the full cache; the inverse of the compression where bytes are unknown."""
    allocated, full = number(row, "allocated_bytes"), number(row, "full_bytes")
    if allocated is not None and full:
        return allocated / full
    compression = number(row, "compression")
    return 1 / compression if compression else None


def changed_model(row: Mapping) -> str:
    """The name of a model that stores less by itself (fewer heads, shared layers): the method is on top of that, and no
    budget of the method alone. Empty for any other row.
    """
    share, compression = kept_share(row), number(row, "compression")
    own_share = share * compression if share and compression else 1.0
    return words(row, "model") if own_share < _OWN_SHARE else ""


def texts_of(rows: Iterable[Mapping]) -> list[str]:
    """The texts that rows were measured on, in order of appearance."""
    return list(dict.fromkeys(words(row, "text") for row in rows))


def quality_lines(rows: Iterable[Mapping], text: str) -> list[Line]:
    """The folded methods on one text, a line per family, kind of budget and changed model below it; rows without the two
    numbers are left out.
    """
    found: dict[tuple[str, bool, str], list[Point]] = {}
    for row in rows:
        share, change = kept_share(row), number(row, "perplexity_change_percent", "mean")
        if words(row, "text") != text or family_of(row) == UNFOLDED or share is None or share <= 0 or change is None:
            continue
        error = number(row, "perplexity_change_percent", "standard_error")
        key = (family_of(row), "%" in words(row, "method"), changed_model(row))
        found.setdefault(key, []).append(Point(share=share, change=change, error=error, row=row))
    return [_line(family, grows, model, points) for (family, grows, model), points in found.items()]


def _line(family: str, grows: bool, model: str, points: list[Point]) -> Line:
    points = tuple(sorted(points, key=lambda point: -point.share))
    title = title_of(points[0].row) + (" %" if grows else "")
    title += f" of {model}" if model and model != title else ""
    is_other = bool(model) or family.startswith(f"{UNFOLDED} of ")
    return Line(title=title, family=family, grows=grows, points=points, from_unfolded=not is_other)
