"""Texts that give single owners something else than the rest, `h2o:64+64; 0-3,7=full`: taken apart and put together.

The first part holds for all owners and may be missing; each further part names layers, ranges included, and what the
owners among them get. What stands between the separators is not looked at here.
"""

import re
from collections.abc import Sequence

from kvfold.errors import UserError


def join_per_owner(rest: str, given: Sequence[str], wanted: Sequence[str], owners: Sequence[int]) -> str:
    """`rest`, then the owners whose wanted text is not the given one, in runs of neighbouring owners."""
    runs: list[list] = []
    for index, owner in enumerate(owners):
        if wanted[index] == given[index]:
            continue
        if runs and runs[-1][2] == index - 1 and runs[-1][3] == wanted[index]:
            runs[-1][1:3] = [owner, index]
        else:
            runs.append([owner, owner, index, wanted[index]])
    spans = [f"{first if first == last else f'{first}-{last}'}={text}" for first, last, _, text in runs]
    return "; ".join([rest, *spans])


def most_common(texts: Sequence[str]) -> str | None:
    """The text that stands most often, the first of equals; None of none."""
    return max(texts, key=list(texts).count, default=None)


def split_per_owner(text: str) -> tuple[str | None, list[tuple[range, str]]]:
    """What stands for all layers (None: nothing does), then the layers named and what stands for them, in order."""
    rest, named = None, []
    for part in (part.strip() for part in text.split(";")):
        layers, equals, value = (piece.strip() for piece in part.partition("="))
        if not part or (equals and not (layers and value)):
            raise UserError(f"'{text}': a part is empty: write e.g. 'h2o:64+64; 0-3=full'")
        if equals:
            named += [(_layer_range(piece.strip(), text), value) for piece in layers.split(",")]
        elif rest is None and not named:
            rest = part
        else:
            raise UserError(
                f"'{text}': only the first part may hold for all layers: give '{part}' its layers, e.g. '0-3={part}'"
            )
    return rest, named


def _layer_range(piece: str, text: str) -> range:
    match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", piece, re.ASCII)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise UserError(f"'{text}': '{piece}' is no layer or range of layers: write e.g. '3=full' or '0-3,7=full'")
    return range(first, last + 1)
