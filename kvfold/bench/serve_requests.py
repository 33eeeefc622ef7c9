"""The requests of a serving benchmark: lengths drawn within bounds over stretches of a text, or a trace of real ones."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.data.texts import TextFile, file_bytes, json_lines
from kvfold.errors import UserError

MOST_NEW_TOKENS = 16
"""Tokens of an answer where a trace does not say: what OpenAI's API takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """One request."""

    prompt: tuple[int, ...]
    max_tokens: int
    """Tokens of the answer, all of which are generated."""
    at_s: float = 0.0
    """When it comes, seconds after the first one."""


def parse_lengths(text: str) -> tuple[int, int]:
    """Bounds of a length: `128`, or `64-512`, both included."""
    low, dash, high = text.partition("-")
    if not (low.isdecimal() and (high.isdecimal() if dash else True)):
        raise UserError(f"length '{text}': it is a number or two bounds: write e.g. 128 or 64-512")
    bounds = int(low), int(high or low)
    if not 1 <= bounds[0] <= bounds[1]:
        raise UserError(f"length '{text}': bounds ascend from 1: write e.g. 128 or 64-512")
    return bounds


def drawn_requests(
    number: int, prompt: tuple[int, int], new: tuple[int, int], text: TextFile, tokenizer: Any, *, seed: int = 0
) -> list[Wanted]:
    """So many requests with lengths drawn evenly between bounds; prompts are stretches of a text, evenly spaced over it."""
    draw = random.Random(seed)
    sizes = [(draw.randint(*prompt), draw.randint(*new)) for _ in range(number)]
    ids = tokenizer(text.joined, add_special_tokens=False)["input_ids"]
    needed = sum(length for length, _ in sizes)
    if len(ids) < needed:
        raise UserError(
            f"{text.name}: the text has {len(ids):,} tokens, and prompts take {needed:,}: give a longer one"
        )
    gap, start, found = (len(ids) - needed) // max(1, number), 0, []
    for length, answer in sizes:
        found.append(Wanted(prompt=tuple(ids[start : start + length]), max_tokens=answer))
        start += length + gap
    return found


def trace_requests(path: str | Path, tokenizer: Any) -> list[Wanted]:
    """Requests of a file of JSON lines: `prompt` (a text or token ids), `max_tokens`, and `at_s`, seconds after the first."""
    path = Path(path)
    rule = "a line of a trace is an object with a prompt"
    found = []
    for number, one in json_lines(path, file_bytes(path).split(b"\n"), rule):
        prompt = one.get("prompt") if isinstance(one, dict) else None
        ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        new, at = (one.get("max_tokens", MOST_NEW_TOKENS), one.get("at_s", 0.0)) if isinstance(one, dict) else (0, 0)
        if not (_are_ids(ids) and isinstance(new, int) and new > 0 and isinstance(at, int | float) and at >= 0):
            raise UserError(
                f"{path}:{number}: a request has a prompt, 1 or more max_tokens and at_s from 0 on: "
                'write e.g. {"prompt": "Once", "max_tokens": 64, "at_s": 0.5}'
            )
        found.append(Wanted(prompt=tuple(ids), max_tokens=new, at_s=float(at)))
    return sorted(found, key=lambda one: one.at_s)


def _are_ids(ids: object) -> bool:
    return isinstance(ids, Sequence) and bool(ids) and all(type(one) is int and one >= 0 for one in ids)
