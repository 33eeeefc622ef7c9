"""Serving many requests at once, in process: methods against compression 1 in the same bytes, over several budgets, beside other
engines: kvfold's and transformers' `generate` as one batch, transformers' continuous batching, and vLLM in the same bytes.

Every side answers the same requests, all handed over at once or when a trace says so. Throughput counts the time from the first
request to the last token, prompts included. Seconds of the processor stand beside those of the clock: others' load lengthens the
latter alone. Requests are stretches of a text of lengths drawn within bounds, or a trace of real ones.
"""

import math
import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from transformers import DynamicCache, GenerationConfig

from kvfold.bench.measuring import check_size, in_turns, measured_on, ratios, spread
from kvfold.bench.vllm_peer import VllmPeer
from kvfold.data import TextFile, file_bytes
from kvfold.engine.answers import Piece
from kvfold.engine.budget import WATERMARK, SequenceCost
from kvfold.engine.engine import Engine
from kvfold.errors import UserError, one_line
from kvfold.eval.cells import load_theirs
from kvfold.eval.progress import Report, silent
from kvfold.eval.reading import method_about, method_layouts
from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import PAGE_SLOTS
from kvfold.models.blocks import packed_bytes
from kvfold.models.decoder import FoldForCausalLM


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """One request."""

    prompt: str | Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    """A text, for an endpoint alone, or token ids."""
    max_tokens: PositiveInt = 16
    """Tokens of the answer, all of which are generated; OpenAI's API takes 16 where nothing is said."""
    at_s: NonNegativeFloat = 0.0
    """When it comes, seconds after the first one."""
    time: str | None = None
    """A method of kvfold's; other servers ignore it."""


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


_WANTED = TypeAdapter(Wanted)


def read_trace(path: Path) -> list[Wanted]:
    """Requests of a file of JSON lines with the fields of `Wanted`, by their times. Raises `UserError` for a line that is none,
    and for none at all.
    """
    found = []
    for number, line in enumerate(file_bytes(path).splitlines(), start=1):
        if line.strip():
            try:
                found.append(_WANTED.validate_json(line, strict=True))
            except ValidationError as error:
                raise UserError(
                    f"{path} line {number}: it is no request, {one_line(error)}: write e.g. "
                    '{"prompt": "Once", "max_tokens": 64, "at_s": 0.5}'
                ) from error
    if not found:
        raise UserError(f"{path}: a trace of 0 requests: there is nothing to ask: write 1 line or more")
    return sorted(found, key=lambda one: one.at_s)


def tokenised(requests: Sequence[Wanted], tokenizer: Any) -> list[Wanted]:
    """With token ids as prompts."""
    return [
        replace(one, prompt=tuple(tokenizer(one.prompt)["input_ids"])) if isinstance(one.prompt, str) else one
        for one in requests
    ]


MAX_RUNNING = 256
"""Requests in flight at most, on every side that has a bound."""
PATIENCE_SECONDS = 3600
"""After so long without any answer a run is given up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeRun:
    """One side's answers to all requests."""

    seconds: float
    """From the first request to the last token."""
    outputs: tuple[tuple[int, ...], ...]
    """What was generated, request by request."""
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

    @property
    def tokens(self) -> int:
        """Generated, of all requests together."""
        return sum(map(len, self.outputs))


Side = Callable[[Sequence[Wanted]], ServeRun]


def budget_bytes(model: FoldForCausalLM, requests: float, tokens: int) -> int:
    """The KV memory in which so many requests of `tokens` tokens fit with nothing evicted, by the engine's own formula."""
    cost = SequenceCost(model.config.layout.base(), model_bytes=model.dtype.itemsize, page_slots=PAGE_SLOTS)
    pages = requests * cost.bytes(tokens) + cost.bytes(1)  # a page a stream more, as a budget is cut into whole pages
    return math.ceil(pages / (1 - WATERMARK)) + 2 * MAX_RUNNING * cost.state_bytes


def _requests_held(model: FoldForCausalLM, memory_bytes: int, tokens: int) -> float:
    """The other way round: how many such requests a KV memory holds."""
    one = budget_bytes(model, 1, tokens)
    return 1 + (memory_bytes - one) / (budget_bytes(model, 2, tokens) - one)


def bench_serve(
    model: FoldForCausalLM, requests: Sequence[Wanted], *, name: str, methods: Sequence[str], budgets: Sequence[int],
    peers: Mapping[str, Side] | None = None, repeats: int = 1, temperature: float = 0.0,
    keep: Callable[[Mapping[str, Any]], None] = lambda result: None, report: Report = silent,
) -> dict[str, Any]:  # fmt: skip
    """A result of kind `serve`: a row for each budget and side. The first method is what the others are compared with.

    `budgets`: bytes of KV memory. `peers` by name, measured in the first budget's rounds. `keep`: is given the result so far
    after each budget. Greedy unless `temperature` says otherwise; every request generates all its tokens.
    """
    if not requests:
        raise UserError("0 requests: there is nothing to serve: ask for 1 or more")
    layouts = method_layouts(model, methods)
    longest = max(len(one.prompt) + one.max_tokens for one in requests)
    check_size(model, "a request", longest, repeats)
    result = measured_on(model, name) | {
        "requests": {
            "number": len(requests), "prompt_tokens": _ends([len(one.prompt) for one in requests]),
            "new_tokens": _ends([one.max_tokens for one in requests]), "temperature": temperature,
        },
        "repeats": repeats, "max_running": MAX_RUNNING, "rows": [],
    }  # fmt: skip
    result["model"]["packed_bytes"] = packed_bytes(model)
    abouts = {layout.time_text(): method_about(layout) for layout in layouts}
    for place, memory in enumerate(budgets):
        sides: dict[str, Side] = {
            layout.time_text(): partial(run_engine, model, layout, memory, temperature=temperature)
            for layout in layouts
        }
        sides |= (peers or {}) if place == 0 else {}
        timed = [lambda _, side=side: side(requests) for side in sides.values()]
        runs = in_turns(timed, repeats, f"{memory / 1e6:,.0f} MB", report, turning=True)
        speeds = [[run.tokens / run.seconds for run in found] for found in runs]
        for side, found, own in zip(sides, runs, speeds, strict=True):
            result["rows"].append({
                "budget_bytes": memory, "holds_uncompressed": _requests_held(model, memory, longest - 1), "side": side,
                **abouts.get(side, {"method": None, "title": side}), "tokens_per_second": spread(own), **_figures(found),
                "over_first": ratios(own, speeds[0]),
            })  # fmt: skip
        keep(result)
    return result


def run_engine(
    model: FoldForCausalLM, layout: KVLayout, memory_bytes: int, requests: Sequence[Wanted], *, temperature: float = 0.0
) -> ServeRun:
    """All requests through one fresh engine of one method. Raises `UserError` for a request that it refuses."""
    times: list[list[float]] = [[] for _ in requests]
    outputs: list[list[int]] = [[] for _ in requests]
    ends: list[Piece | None] = [None] * len(requests)
    over = threading.Semaphore(0)
    with Engine(model, None, memory_bytes, [layout.time_text()], max_running=MAX_RUNNING) as engine:

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
        seconds=max(found[-1] for found in times) - start, cpu_seconds=cpu,
        first_token_s=tuple(found[0] - at for found, at in zip(times, begun, strict=True)),
        gaps_s=tuple(after - before for found in times for before, after in pairwise(found)), stats=stats,
        compression=sum(one.seen_tokens for one in usages) / max(1, sum(one.kept_tokens for one in usages)),
        outputs=tuple(map(tuple, outputs)),
    )  # fmt: skip


def _figures(runs: Sequence[ServeRun]) -> dict[str, Any]:
    stats = runs[-1].stats
    seconds = [one.stats for one in runs if "forward_s" in one.stats]
    return {
        "tokens_per_cpu_second": None if runs[-1].cpu_seconds is None else spread([
            one.tokens / max(1e-9, one.cpu_seconds) for one in runs
        ]),
        "seconds": spread([one.seconds for one in runs]),
        "first_token_ms": _quantiles([1000 * x for one in runs for x in one.first_token_s]),
        "inter_token_ms": _quantiles([1000 * x for one in runs for x in one.gaps_s]),
        "most_running": stats.get("most_running"),
        "tokens_per_step": runs[-1].tokens / stats["steps"] if stats.get("steps") else None,
        "preemptions": stats.get("preemptions"),
        "prompt_tokens_read": stats.get("prompt_tokens"),
        "pool_bytes": stats.get("pool_bytes"),
        "compression": runs[-1].compression,
        "outside_forwards": None if not seconds else spread([
            1 - one["forward_s"] / max(1e-9, one["step_s"]) for one in seconds
        ]),
    }  # fmt: skip


def _ends(values: Sequence[int]) -> dict[str, float]:
    return {"min": min(values), "mean": statistics.mean(values), "max": max(values)}


def _quantiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    return {"p50": statistics.median(ordered), "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]}


PEERS = ("generate", "transformers", "continuous", "vllm")
"""Names on the command line."""


def check_peers(names: Sequence[str]) -> None:
    """Raise `UserError` for a peer that nobody knows."""
    unknown = sorted(set(names) - set(PEERS))
    if unknown:
        raise UserError(f"peers '{unknown[0]}': it is one of {', '.join(PEERS)}: write one of them")


def open_peers(
    names: Sequence[str], model: FoldForCausalLM, source: str, requests: Sequence[Wanted], kv_bytes: int, stack: ExitStack
) -> dict[str, Side]:  # fmt: skip
    """The sides of these names, on the checkpoint `source`; vLLM in so many bytes, in a process of its own that `stack` ends."""
    sides: dict[str, Side] = {}
    if "generate" in names:
        sides["generate"] = partial(run_batch, model, lambda rows: model.new_cache(rows=rows, time="full"))
    if {"transformers", "continuous"} & set(names):
        theirs = load_theirs(source, dtype=model.dtype, device=model.device)
        if "transformers" in names:
            sides["transformers"] = partial(run_batch, theirs, lambda rows: DynamicCache(config=theirs.config))
        if "continuous" in names:
            sides["continuous"] = partial(_run_continuous, theirs)
    if "vllm" in names:
        sizes = {"max_rows": len(requests), "max_tokens": max(len(one.prompt) + one.max_tokens for one in requests)}
        peer = VllmPeer(source, **sizes, kv_bytes=kv_bytes, threads=torch.get_num_threads())
        sides["vllm"] = partial(_run_vllm, stack.enter_context(peer))
    return sides


def run_batch(model: Any, new_cache: Callable[[int], Any], requests: Sequence[Wanted]) -> ServeRun:
    """`generate` of ours or of transformers: all requests as one batch, padded at the left, until the longest is done."""
    widest, most = max(len(one.prompt) for one in requests), max(one.max_tokens for one in requests)
    pads = [widest - len(one.prompt) for one in requests]
    ids = torch.tensor([[0] * pad + list(one.prompt) for pad, one in zip(pads, requests, strict=True)])
    mask = torch.arange(widest) >= torch.tensor(pads)[:, None]
    cpu, start = time.process_time(), time.perf_counter()
    out = model.generate(
        ids.to(model.device), attention_mask=mask.long().to(model.device), past_key_values=new_cache(len(requests)),
        do_sample=False, num_beams=1, min_new_tokens=most, max_new_tokens=most, pad_token_id=0,
    )  # fmt: skip
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    new = zip(out[:, widest:].tolist(), requests, strict=True)
    outputs = tuple(tuple(row[: one.max_tokens]) for row, one in new)
    return ServeRun(seconds=seconds, cpu_seconds=cpu, outputs=outputs)


def _run_continuous(model: Any, requests: Sequence[Wanted]) -> ServeRun:
    """transformers' continuous batching; every request generates as many tokens as the longest, and those are counted."""
    most = max(one.max_tokens for one in requests)
    wanted = GenerationConfig(do_sample=False, max_new_tokens=most, eos_token_id=-1, pad_token_id=0)
    cpu, start = time.process_time(), time.perf_counter()
    found = model.generate_batch([list(one.prompt) for one in requests], generation_config=wanted, warmup=False)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    outputs = tuple(tuple(one.generated_tokens) for one in found.values())
    return ServeRun(seconds=seconds, cpu_seconds=cpu, outputs=outputs)


def _run_vllm(peer: VllmPeer, requests: Sequence[Wanted]) -> ServeRun:
    if len({one.max_tokens for one in requests}) > 1:
        raise UserError(
            "requests of several lengths: vLLM is asked for one length of answers: draw one, or leave it out"
        )
    found = peer.run([list(one.prompt) for one in requests], requests[0].max_tokens)
    stats = {"most_running": max(found.step_rows), "preemptions": found.preemptions, **peer.about}
    return ServeRun(seconds=found.step_ends[-1], gaps_s=found.step_seconds, stats=stats, outputs=found.new_ids)
