"""Serving many requests at once, in process: methods against compression 1 in the same bytes, over several budgets.

Every side answers the same requests, all handed over at once or when a trace says so; sides take turns, round after round,
so that whatever else the machine does hits all. Throughput counts the time from the first request to the last token,
prompts included. Seconds of the processor stand beside those of the clock: others' load lengthens the latter alone.
Requests are stretches of a text of lengths drawn within bounds, or a trace of real ones. Other engines as sides: serve_peers.py.
"""

import math
import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from kvfold.data.texts import TextFile, file_bytes, json_lines
from kvfold.engine.answers import Piece
from kvfold.engine.budget import WATERMARK, SequenceCost
from kvfold.engine.engine import Engine
from kvfold.errors import UserError
from kvfold.eval.folding import method_about, method_layouts
from kvfold.eval.progress import Report, silent
from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import PAGE_SLOTS
from kvfold.models.blocks import packed_bytes
from kvfold.models.decoder import FoldForCausalLM

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


MAX_RUNNING = 256
"""Requests in flight at most, on every side that has a bound."""
PATIENCE_SECONDS = 3600
"""After so long without any answer a run is given up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeRun:
    """One side's answers to all requests."""

    seconds: float
    """From the first request to the last token."""
    tokens: int
    """Generated, of all requests together."""
    cpu_seconds: float | None = None
    """Of this process, all threads; None where another process did the work."""
    first_token_s: tuple[float, ...] = ()
    """From each request to its first token; () where a side does not say."""
    gaps_s: tuple[float, ...] = ()
    """From each piece of an answer to the next one."""
    stats: Mapping[str, Any] = field(default_factory=dict)
    """`Engine.stats` at the end; what a peer says of itself."""
    compression: float | None = None
    """Tokens seen over tokens kept at the end of each request, by their sums."""
    outputs: tuple[tuple[int, ...], ...] = ()
    """What was generated, request by request."""


Side = Callable[[Sequence[Wanted]], ServeRun]


def budget_bytes(model: FoldForCausalLM, requests: float, tokens: int, *, max_running: int = MAX_RUNNING) -> int:
    """The KV memory in which so many requests of `tokens` tokens fit with nothing evicted, by the engine's own formula."""
    cost = SequenceCost(model.config.layout.base(), model_bytes=model.dtype.itemsize, page_slots=PAGE_SLOTS)
    pages = requests * cost.bytes(tokens) + cost.bytes(1)  # a page a stream more, as a budget is cut into whole pages
    return math.ceil(pages / (1 - WATERMARK)) + 2 * max_running * cost.state_bytes


def requests_held(model: FoldForCausalLM, memory_bytes: int, tokens: int, *, max_running: int = MAX_RUNNING) -> float:
    """The other way round: how many such requests a KV memory holds."""
    one = budget_bytes(model, 1, tokens, max_running=max_running)
    return 1 + (memory_bytes - one) / (budget_bytes(model, 2, tokens, max_running=max_running) - one)


def bench_serve(
    model: FoldForCausalLM,
    requests: Sequence[Wanted],
    *,
    name: str,
    methods: Sequence[str],
    budgets: Sequence[int],
    peers: Mapping[str, Side] | None = None,
    repeats: int = 1,
    max_running: int = MAX_RUNNING,
    temperature: float = 0.0,
    keep: Callable[[Mapping[str, Any]], None] = lambda result: None,
    report: Report = silent,
) -> dict[str, Any]:
    """A result of kind `serve`: a row for each budget and side. The first method is what the others are compared with.

    `budgets`: bytes of KV memory. `peers` by name, measured in the first budget's rounds. `keep`: is given the result so far
    after each budget. Greedy unless `temperature` says otherwise; every request generates all its tokens.
    """
    if repeats < 1:
        raise UserError(f"{repeats} repeats: 1 or more are measured: ask for more")
    if not requests:
        raise UserError("0 requests: there is nothing to serve: ask for 1 or more")
    layouts = method_layouts(model, methods)
    longest = max(len(one.prompt) + one.max_tokens for one in requests)
    if longest > model.config.max_position_embeddings:
        raise UserError(
            f"a request of {longest} tokens: the model reads {model.config.max_position_embeddings} at most: ask for fewer"
        )
    result = {
        **_about(model, name),
        "requests": {
            "number": len(requests), "prompt_tokens": _ends([len(one.prompt) for one in requests]),
            "new_tokens": _ends([one.max_tokens for one in requests]), "temperature": temperature,
        },
        "repeats": repeats, "max_running": max_running, "rows": [],
    }  # fmt: skip
    for place, memory in enumerate(budgets):
        sides: dict[str, Side] = {}
        for layout in layouts:
            sides[layout.time_text()] = lambda wanted, layout=layout, memory=memory: run_engine(
                model, layout, memory, wanted, max_running=max_running, temperature=temperature
            )
        sides |= (peers or {}) if place == 0 else {}
        runs = _rounds(sides, requests, repeats, f"{memory / 1e6:,.0f} MB", report)
        first = runs[layouts[0].time_text()]
        about = {layout.time_text(): method_about(layout) for layout in layouts}
        for side, found in runs.items():
            result["rows"].append({
                "budget_bytes": memory, "holds_uncompressed": requests_held(
                    model, memory, longest - 1, max_running=max_running
                ), "side": side,
                **about.get(side, {"method": None, "title": side}), **_figures(found),
                "over_first": _spread([
                    _speed(one) / _speed(other) for one, other in zip(found, first, strict=True)
                ]),
            })  # fmt: skip
        keep(result)
    return result


def _about(model: FoldForCausalLM, name: str) -> dict[str, Any]:
    """The model, and where it ran."""
    return {
        "model": {"name": name, "parameters": model.num_parameters(), "packed_bytes": packed_bytes(model)},
        "environment": {
            "device": model.device.type, "dtype": str(model.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
        },
    }  # fmt: skip


def run_engine(
    model: FoldForCausalLM, layout: KVLayout, memory_bytes: int, requests: Sequence[Wanted], *, max_running: int = MAX_RUNNING,
    temperature: float = 0.0,
) -> ServeRun:  # fmt: skip
    """All requests through one fresh engine of one method. Raises `UserError` for a request that it refuses."""
    times: list[list[float]] = [[] for _ in requests]
    outputs: list[list[int]] = [[] for _ in requests]
    ends: list[Piece | None] = [None] * len(requests)
    over = threading.Semaphore(0)
    with Engine(model, None, memory_bytes, [layout.time_text()], max_running=max_running) as engine:

        def deliver_to(place: int) -> Callable[[Piece], None]:
            def deliver(piece: Piece) -> None:
                if piece.token_ids:
                    times[place].append(time.perf_counter())
                    outputs[place] += piece.token_ids
                if piece.finish_reason is not None:
                    ends[place] = piece
                    over.release()

            return deliver

        cpu, start = time.process_time(), time.perf_counter()
        begun = [start] * len(requests)
        together: dict[float, list[tuple[int, Any]]] = {}
        for place, one in enumerate(requests):
            asked = {
                "prompt": list(one.prompt), "max_tokens": one.max_tokens, "ignore_eos": True, "temperature": temperature,
                "seed": place,
            }  # fmt: skip
            together.setdefault(one.at_s, []).append((place, asked))
        for at, some in sorted(together.items()):
            wait = start + at - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
            for place, _ in some:
                begun[place] = time.perf_counter()
            engine.submit_all([(asked, deliver_to(place)) for place, asked in some])
        for _ in requests:
            if not over.acquire(timeout=PATIENCE_SECONDS):
                raise RuntimeError(f"the engine gave no answer for {PATIENCE_SECONDS} seconds")
        cpu = time.process_time() - cpu
        stats = engine.stats()
    failed = next((one.error for one in ends if one.error), None)
    if failed:
        raise UserError(f"a request failed: {failed}")
    usages = [one.usage for one in ends]
    return ServeRun(
        seconds=max(found[-1] for found in times) - start, tokens=sum(map(len, outputs)), cpu_seconds=cpu,
        first_token_s=tuple(found[0] - at for found, at in zip(times, begun, strict=True)),
        gaps_s=tuple(after - before for found in times for before, after in pairwise(found)), stats=stats,
        compression=sum(one.seen_tokens for one in usages) / max(1, sum(one.kept_tokens for one in usages)),
        outputs=tuple(map(tuple, outputs)),
    )  # fmt: skip


# -- figures -----------------------------------------------------------------------------------------------------


def _rounds(
    sides: Mapping[str, Side], requests: Sequence[Wanted], repeats: int, what: str, report: Report
) -> dict[str, list[ServeRun]]:
    runs: dict[str, list[ServeRun]] = {side: [] for side in sides}
    total = repeats * len(sides)
    for number in range(total):
        turn, place = divmod(number, len(sides))
        # The order turns, so that no side is always the one behind another.
        names = list(sides)
        side = names[(place + turn) % len(names)]
        report(f"{what}, {side}", number, total)
        runs[side].append(sides[side](requests))
    report(what, total, total)
    return runs


def _figures(runs: Sequence[ServeRun]) -> dict[str, Any]:
    stats = runs[-1].stats
    seconds = [one.stats for one in runs if "forward_s" in one.stats]
    return {
        "tokens_per_second": _spread([_speed(one) for one in runs]),
        "tokens_per_cpu_second": None if runs[-1].cpu_seconds is None else _spread([
            one.tokens / max(1e-9, one.cpu_seconds) for one in runs
        ]),
        "seconds": _spread([one.seconds for one in runs]),
        "first_token_ms": _quantiles([1000 * x for one in runs for x in one.first_token_s]),
        "inter_token_ms": _quantiles([1000 * x for one in runs for x in one.gaps_s]),
        "most_running": stats.get("most_running"),
        "tokens_per_step": runs[-1].tokens / stats["steps"] if stats.get("steps") else None,
        "preemptions": stats.get("preemptions"),
        "prompt_tokens_read": stats.get("prompt_tokens"),
        "pool_bytes": stats.get("pool_bytes"),
        "compression": runs[-1].compression,
        "outside_forwards": None if not seconds else _spread([
            1 - one["forward_s"] / max(1e-9, one["step_s"]) for one in seconds
        ]),
    }  # fmt: skip


def _speed(run: ServeRun) -> float:
    return run.tokens / run.seconds


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _ends(values: Sequence[int]) -> dict[str, float]:
    return {"min": min(values), "mean": statistics.mean(values), "max": max(values)}


def _quantiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    return {"p50": statistics.median(ordered), "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]}
