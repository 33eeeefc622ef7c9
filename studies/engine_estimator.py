#!/usr/bin/env python3
"""How well the engine knows what a learned method will keep: bytes estimated before a prompt is read against bytes held after it.

  studies/engine_estimator.py MODEL OUT.json --adapter NAME --text FILE [--text FILE ...] [--prompts 12 --tokens 256-2048]

MODEL without its adapter's data: every text must be held out. Of each text so many prompts are cut, their lengths drawn evenly
between the bounds. Each prompt is read once, through the cache that the engine has; then three estimators are told its
length: `uncalibrated` takes everything to be kept, `calibrated` starts from the adapter's kept ratios and stays, `online`
starts there and learns from every prompt before, texts in turn.
Error: |estimated / held - 1|, and its sign kept. Covered: share of prompts that hold no more than the estimate at 95 %.
"""

import argparse
import json
import os
import random
import shlex
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

import kvfold
from kvfold.bench.serve import parse_lengths
from kvfold.data import read_text_file
from kvfold.engine.budget import SequenceCost
from kvfold.layout.planner import PAGE_SLOTS
from kvfold.record import cpu_name, git_commit, made, with_record, write_whole_file
from kvfold.train.calibrate import CALL_TOKENS, kept_streams


def main() -> None:
    """Read, estimate, write."""
    wanted = _arguments()
    model, tokenizer = kvfold.load(wanted.model, adapter=wanted.adapter), kvfold.load_tokenizer(wanted.model)
    bounds, draw = parse_lengths(wanted.tokens), random.Random(0)
    prompts = []
    for path in wanted.text:
        text = read_text_file(path)
        ids = tokenizer(text.joined[: 40 * wanted.prompts * bounds[1]], add_special_tokens=False)["input_ids"]
        for place in range(wanted.prompts):
            length, start = draw.randint(*bounds), place * (len(ids) // wanted.prompts)
            prompts.append((text.name, ids[start : start + length]))
    # Texts in turn, as requests of several kinds would come.
    prompts = [
        prompts[kind * wanted.prompts + place] for place in range(wanted.prompts) for kind in range(len(wanted.text))
    ]
    cost = new_cost(model, calibrated=True)
    read, seconds = [], {"all": 0.0}
    for number, (name, ids) in enumerate(prompts):
        began = time.perf_counter()
        kept = read_prompt(model, ids)
        for key in (name, "all"):
            seconds[key] = seconds.get(key, 0.0) + time.perf_counter() - began
        read.append((name, len(ids), kept, held_bytes(cost, kept)))
        print(f"{number + 1}/{len(prompts)} {name} {len(ids)} tokens", file=sys.stderr)
    rows = []
    for estimator in ("uncalibrated", "calibrated", "online"):
        found = judged(estimator, new_cost(model, calibrated=estimator != "uncalibrated"), read)
        rows += [row | {"reading_seconds": seconds[row["text"]]} for row in found]
    result = {
        "kind": "estimator", "created": datetime.now(UTC).isoformat(timespec="seconds"), "git_commit": git_commit(),
        "command": shlex.join(["studies/engine_estimator.py", *sys.argv[1:]]), "adapter": wanted.adapter,
        "time": model.config.layout.time_text(), "prompts": wanted.prompts, "tokens": bounds,
        "rows": with_record(rows, made(torch.get_num_threads(), str(model.dtype))),
        "environment": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "cores": os.cpu_count()},
    }  # fmt: skip
    write_whole_file(wanted.out, json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(f"{row['estimator']:13} {row['text']:16} error {row['mean_error']:.3f} ({row['mean_signed']:+.3f})  "
              f"covered {row['covered']:.3f}")  # fmt: skip


def new_cost(model, *, calibrated: bool) -> SequenceCost:
    """The engine's own estimate of the model's method."""
    ratios = model.config.kept_ratios if calibrated else None
    return SequenceCost(model.config.layout, model_bytes=model.dtype.itemsize, page_slots=PAGE_SLOTS, ratios=ratios)


@torch.inference_mode()
def read_prompt(model, ids: list[int]) -> list[int]:
    """Entries that each KV stream holds after the prompt."""
    cache = model.new_cache(rows=1)
    for start in range(0, len(ids), CALL_TOKENS):
        model.model(torch.tensor([ids[start : start + CALL_TOKENS]]), past_key_values=cache, use_cache=True)
    kept = kept_streams(cache.kept_tokens)[0].tolist()
    cache.free()
    return kept


def held_bytes(cost: SequenceCost, kept: list[int]) -> int:
    """Whole pages, and the sequence's own state."""
    pages = zip(cost.streams, kept, strict=True)
    return cost.state_bytes + sum(page * -(-number // cost.page_slots) for (_, page), number in pages)


def judged(estimator: str, cost: SequenceCost, read: list[tuple[str, int, list[int], int]]) -> list[dict]:
    """A row for each text, and one for all."""
    found: dict[str, list[tuple[float, bool]]] = {}
    for name, length, kept, held in read:
        error, covered = cost.bytes(length) / held - 1, held <= cost.bytes(length, high=True)
        for key in (name, "all"):
            found.setdefault(key, []).append((error, covered))
        if estimator == "online":
            cost.observe(length, kept)
    return [
        {
            "estimator": estimator, "text": name, "prompts": len(some),
            "mean_error": statistics.mean(abs(error) for error, _ in some),
            "mean_signed": statistics.mean(error for error, _ in some),
            "covered": statistics.mean(covered for _, covered in some),
        }
        for name, some in found.items()
    ]  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", default="256-2048")
    return parser.parse_args()


if __name__ == "__main__":
    main()
