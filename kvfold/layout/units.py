"""Amounts as people write them on a command line: memory (`80GB`, `16GiB`) and counts of tokens (`32k`).

Memory follows the standard: kB, MB, GB, TB are powers of 1,000, KiB, MiB, GiB, TiB powers of 1,024. Counts follow the
habit of model names: k is 1,024 tokens, M 1,024 k (a "32k" model reads 32,768 tokens).
"""

import re
from fractions import Fraction

from kvfold.errors import UserError

SIZE_UNITS: dict[str, int] = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
}
"""Bytes of each unit, in lower case."""
COUNT_UNITS: dict[str, int] = {"": 1, "k": 1024, "m": 1024**2}
"""Tokens of each unit, in lower case."""


def parse_size(text: str) -> int:
    """Bytes: a number, maybe with a fraction, and a unit from `SIZE_UNITS` in any case; part of a byte is cut off."""
    return _parse("memory", text, SIZE_UNITS, "'80GB' (10^9 bytes each) or '16GiB' (2^30)")


def parse_count(text: str) -> int:
    """Tokens: a number, maybe with a fraction, and `k` (1,024), `M` (1,024 k) or nothing; parts of a token are cut."""
    return _parse("count", text, COUNT_UNITS, "'4096' or '32k' (1,024 each)")


def _parse(what: str, text: str, units: dict[str, int], examples: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower(), re.ASCII)
    amount = Fraction(match[1]) * units[match[2]] if match and match[2] in units else Fraction(0)
    if amount < 1:
        raise UserError(f"{what} '{text}': it is a positive number with a unit it knows: write e.g. {examples}")
    return int(amount)
