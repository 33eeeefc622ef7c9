"""Passkey retrieval: one panel a length, a row a method, a column a depth; a cell says how many keys were found.

Deeper colour = more found. A length at which even the unfolded model misses more than a fifth says nothing about a
cache, and is left out of the picture (never out of the table).
"""

from collections.abc import Iterable, Mapping, Sequence

from kvfold.report.markup import Markup, tag
from kvfold.report.numbers import count, tick
from kvfold.report.pictures.drawing import LETTER, MOST_NAME, picture, short, write
from kvfold.report.results import number
from kvfold.report.series import UNFOLDED, family_of

ENOUGH = 0.8
"""Share of the keys that the unfolded model must find."""
ROW, COLUMN = 27, 54


def lengths_of(rows: Iterable[Mapping]) -> list[float]:
    """Lengths in tokens, ascending."""
    return sorted({length for row in rows if (length := number(row, "length_tokens")) is not None})


def found_keys(rows: Iterable[Mapping]) -> tuple[float, float]:
    """Keys found and keys asked for, all rows together; (0, 0) where nothing was tried."""
    pairs = [(number(row, "found"), number(row, "tries")) for row in rows]
    pairs = [(found, tries) for found, tries in pairs if found is not None and tries]
    return sum(found for found, _ in pairs), sum(tries for _, tries in pairs)


def unfolded_share(rows: Iterable[Mapping], length: float) -> float | None:
    """Share of the keys that the unfolded model finds at one length; None where it wasn't asked."""
    asked = (row for row in rows if family_of(row) == UNFOLDED and number(row, "length_tokens") == length)
    found, tries = found_keys(asked)
    return found / tries if tries else None


def worth_showing(rows: Iterable[Mapping], length: float) -> bool:
    """Whether the unfolded model finds enough keys at this length for misses to mean anything."""
    share = unfolded_share(rows, length)
    return share is None or share >= ENOUGH


def passkey_pictures(rows: Sequence[Mapping], labels: Mapping[str, str], width: float) -> list[Markup]:
    """One SVG for each length worth showing; `labels` gives the name of a method's text form."""
    return [
        _panel([row for row in rows if number(row, "length_tokens") == length], length, labels, width)
        for length in lengths_of(rows)
        if worth_showing(rows, length)
    ]


def _panel(rows: list[Mapping], length: float, labels: Mapping[str, str], width: float) -> Markup:
    methods = list(dict.fromkeys(str(row.get("method")) for row in rows))
    depths = sorted({depth for row in rows if (depth := number(row, "depth")) is not None})
    names = [short(labels.get(method, method), width * MOST_NAME) for method in methods]
    left = max(len(name) for name in names) * LETTER + 12
    column = min(COLUMN, (width - left) / max(1, len(depths)))
    top = 58.0
    parts = [write(0, 14, f"{count(length)} tokens", "name"), write(0, 46, "depth of the key", "tick")]
    for index, depth in enumerate(depths):
        parts.append(write(left + (index + 0.5) * column, 46, f"{tick(100 * depth)} %", "tick", "middle"))
    for index, name in enumerate(names):
        parts.append(write(0, top + index * ROW + 17, name, "tick"))
    for row in rows:
        depth = number(row, "depth")
        if depth is not None:
            x, y = left + depths.index(depth) * column, top + methods.index(str(row.get("method"))) * ROW
            parts.append(_cell(row, x, y, column, names[methods.index(str(row.get("method")))]))
    spoken = f"Passkeys found at {count(length)} tokens by method and depth. The table below has the numbers."
    return picture(left + column * len(depths) + 4, top + ROW * len(methods) + 4, spoken, *parts)


def _cell(row: Mapping, x: float, y: float, column: float, name: str) -> Markup:
    found, tries = number(row, "found"), number(row, "tries")
    share = found / tries if found is not None and tries else None
    text = "–" if share is None else f"{count(found)}/{count(tries)}"
    hover = f"{name}, depth {tick(100 * number(row, 'depth'))} %: " + (
        "not measured" if share is None else f"{text} found"
    )
    box = tag(
        "rect", class_="cell", x=x, y=y, width=column - 2, height=float(ROW - 2),
        fill_opacity=f"{0.05 + 0.95 * (share or 0):.2f}",
    )  # fmt: skip
    ink = "strong" if share is not None and share > 0.55 else "weak"
    return tag("g", tag("title", hover), box, write(x + column / 2 - 1, y + 17, text, ink, "middle"))
