"""Passkey retrieval: a five-digit key somewhere in filler text, asked for at the end; found means all digits right.

Perplexity hardly notices a token that is gone for good; this does. Prompts are plain text, so that models that were never
instruction-tuned understand them. Prompts are read as methods are meant to be fed: steps methods one token a call.
Letters: B rows, T columns.
"""

import random
import re
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvfold.data import opening_tokens
from kvfold.errors import UserError
from kvfold.eval.cells import Beside, Cells, ids_key, layout_key, method_beside, model_key, opened
from kvfold.eval.progress import Report, silent
from kvfold.eval.reading import calls, folded_cache, method_layouts, padded, with_unfolded
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.decoder import FoldForCausalLM

DEPTHS = (0.1, 0.5, 0.9)
"""Where in the filler the key stands, 0 = at its beginning."""

# Worded so that even a small model answers with the number: where the wording is weak, a change of the cache turns the
# answer into small talk although the key is still there, and the figure says little about what was kept.
_OPENING = "Read the text and remember the secret number in it.\n\n"
_FILLER = (
    "The river runs past the mill and the children throw flat stones. ",
    "A cart goes up the hill while the baker opens his shutters. ",
    "Rain is expected before evening, but the wash is still on the line. ",
    "Two old men play chess under the chestnut tree and nobody wins. ",
    "The clock on the square is slow, as it was last year. ",
    "In the garden the beans have climbed to the top of their poles. ",
    "A dog sleeps across the doorstep and the visitors walk around it. ",
)
_NEEDLE = "The secret number is {key}. Remember it: the secret number is {key}. "
_QUESTION = "\n\nQuestion: What is the secret number in the text above?\nAnswer: The secret number is"
_SPARE_TOKENS = 2
"""New tokens beyond those of the key, for a space or a full stop."""


def measure_passkey(
    model: FoldForCausalLM, tokenizer: Any, methods: Sequence[str], *, name: str, beside: Sequence[Beside] = (),
    lengths: Sequence[int] = (1024,), depths: Sequence[float] = DEPTHS, tries: int = 4, seed: int = 0,
    with_full: bool = True, cells: Any = None, report: Report = silent,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of `method`, `length_tokens`, `depth`, `found`, `tries`, and the `seconds` that all depths of a length took together;
    the unfolded model first, if `with_full`; those of the models `beside` come last, each under its own method.

    `lengths`: tokens of a prompt, at most. Each length and depth is tried with `tries` keys, the same for every method.
    All tries of one length are read side by side. `cells`: a folder of finished measurements, which are not made again.
    """
    check_lengths(model, tokenizer, lengths)
    layouts = method_layouts(model, methods)
    layouts = with_unfolded(model, layouts) if with_full else layouts
    key = {
        "model": model_key(model, name), "depths": list(depths), "tries": tries, "seed": seed,
        "prompt": [_OPENING, *_FILLER, _NEEDLE, _QUESTION],
    }  # fmt: skip
    kept, rows = Cells(cells), []
    prompts = {length: _asked(tokenizer, length, depths, tries, seed) for length in lengths}
    for layout in layouts:
        method = layout.time_text()
        for length in lengths:
            about, cell_key = f"passkey {length}, {method}", {**key, "length": length, "layout": layout_key(layout)}
            asked = prompts[length]
            ids = ids_key(*(prompt for _, prompt in asked))
            measure = partial(_found, model, tokenizer, layout, asked, tries, about, report)
            cell = kept.measured(about, cell_key, measure, of=ids)
            pairs = zip(depths, cell["found"], strict=True)
            rows += [
                {"method": method, "length_tokens": length, "depth": depth, "found": found, "tries": tries}
                | {name: cell[name] for name in ("seconds", "made") if name in cell}
                for depth, found in pairs
            ]
    settings = {"lengths": lengths, "depths": depths, "tries": tries, "seed": seed, "cells": kept, "report": report}
    for other in beside:
        with opened(other, model) as its:
            layout, named = its.config.layout, {"name": other.label, "with_full": False}
            found = measure_passkey(its, tokenizer, [layout.time_text()], **named, **settings)
        rows += [row | {"method": method_beside(other, layout), "model": other.label} for row in found]
    return rows


def check_lengths(model: FoldForCausalLM, tokenizer: Any, lengths: Sequence[int]) -> None:
    """Raises `UserError` for a length that the model can't read, or that is too short for a prompt."""
    most = model.config.max_position_embeddings
    for length in lengths:
        if length > most:
            raise UserError(
                f"a passkey prompt of {length} tokens: the model reads {most} at most: ask for shorter ones"
            )
        passkey_prompt(tokenizer, "12345", length, 0.5)


def passkey_prompt(tokenizer: Any, key: str, length: int, depth: float) -> list[int]:
    """Token ids of one prompt: as many sentences of filler as `length` tokens hold, the key at `depth` of them."""

    def tokens(count: int) -> list[int]:
        sentences = [_FILLER[index % len(_FILLER)] for index in range(count)]
        sentences.insert(round(depth * count), _NEEDLE.format(key=key))
        text = _OPENING + "".join(sentences).rstrip() + _QUESTION
        return opening_tokens(tokenizer) + tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    fewest, most = 1, max(2, length)
    if len(tokens(fewest)) > length:
        raise UserError(
            f"a passkey prompt of {length} tokens: the shortest has {len(tokens(fewest))}: ask for longer ones"
        )
    while most - fewest > 1:
        middle = (fewest + most) // 2
        fewest, most = (middle, most) if len(tokens(middle)) <= length else (fewest, middle)
    return tokens(fewest)


def _asked(tokenizer: Any, length: int, depths: Sequence[float], tries: int, seed: int) -> list[tuple[str, list[int]]]:
    """Keys and prompts, depth by depth; each length has the same under every method."""
    draw = random.Random(f"{seed} {length}")
    keys = [(str(draw.randrange(10_000, 100_000)), depth) for depth in depths for _ in range(tries)]
    return [(key, passkey_prompt(tokenizer, key, length, depth)) for key, depth in keys]


def _found(
    model: FoldForCausalLM, tokenizer: Any, layout: KVLayout, asked: Sequence[tuple[str, list[int]]], tries: int,
    what: str, report: Report,
) -> dict[str, Any]:  # fmt: skip
    """Keys found at each depth, and the seconds that it took."""
    began = time.monotonic()
    keys = [key for key, _ in asked]
    new_tokens = max(len(tokenizer(f" {key}", add_special_tokens=False).input_ids) for key in keys) + _SPARE_TOKENS
    prompts = [prompt for _, prompt in asked]
    answers = continuations(model, layout, prompts, new_tokens, what=what, report=report)
    right = [_says(tokenizer.decode(answer), key) for answer, key in zip(answers, keys, strict=True)]
    found = [sum(right[first : first + tries]) for first in range(0, len(right), tries)]
    return {"found": found, "seconds": time.monotonic() - began}


def _says(answer: str, key: str) -> bool:
    """Whether the first number of an answer is the key."""
    number = re.search(r"\d+", answer)
    return number is not None and number[0] == key


def continuations(
    model: FoldForCausalLM, layout: KVLayout, prompts: Sequence[list[int]], new_tokens: int, *, what: str,
    report: Report = silent,
) -> list[list[int]]:  # fmt: skip
    """The likeliest next tokens of each prompt, prompts read through the cache as `layout` is meant to be fed."""
    ids_BT, real_BT = padded(prompts, model.device, flush="right")
    columns = ids_BT.shape[1]
    answers = []
    with folded_cache(model, layout, len(prompts)) as cache:

        def read(ids: Tensor, real: Tensor) -> Tensor:
            return model(ids, attention_mask=real, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(dim=-1)

        for start, stop in calls(layout, columns):
            newest = read(ids_BT[:, start:stop], real_BT[:, start:stop])
            report(what, stop, columns + new_tokens)
        for index in range(new_tokens):
            answers.append(newest)
            newest = read(newest[:, None], torch.ones_like(newest[:, None]))
            report(what, columns + index + 1, columns + new_tokens)
    return torch.stack(answers, dim=1).tolist()
