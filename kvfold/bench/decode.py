"""Decoding speed and memory of `generate`, kvfold's and transformers' side by side in one run.

Both sides take turns, round after round, so that whatever else the machine does hits both; ratios are taken within a
round. Time is that of decoding alone: from the first new token, with which the prompt is done, to the last.
"""

import ctypes
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from kvfold.bench.roofline import Machine, measure_machine, step_allowed
from kvfold.bench.vllm_peer import VllmPeer
from kvfold.data import TextFile, text_windows
from kvfold.errors import UserError
from kvfold.eval.progress import Report, silent
from kvfold.eval.reading import entry_bytes, kept_shares, method_about, method_layouts
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.decoder import FoldForCausalLM

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_HIGH_WATER = "5"
"""What Linux wants written to set the high-water mark back to what is held now."""


class PeakMemory:
    """Measures from its making on. On a GPU what torch allocated; on a CPU the process's resident memory."""

    def __init__(self, device: torch.device):
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            _return_freed_memory()
            self._before = _resident_bytes("VmRSS") if _reset_high_water() else None

    def bytes(self) -> int | None:
        """Peak since the making, less what was held then; None where the system doesn't tell."""
        if self._before is None:
            return None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device) - self._before
        peak = _resident_bytes("VmHWM")
        return None if peak is None else max(0, peak - self._before)


def _return_freed_memory() -> None:
    """Memory that was freed but kept by the C library would hide what comes next."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_high_water() -> bool:
    try:
        _CLEAR.write_text(_RESET_HIGH_WATER, encoding="ascii")
    except OSError:
        return False
    return _resident_bytes("VmRSS") is not None


def _resident_bytes(name: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith(f"{name}:")]
    return int(found[0][1]) * 1024 if found else None


_WARM_UP_TOKENS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A size at which decoding is measured."""

    name: str
    """As people read it: `16 x (32 + 64)`."""
    batch: int
    """Rows."""
    prompt_tokens: int
    """Columns of the prompt."""
    new_tokens: int
    """Tokens generated in each row; the first one comes with the prompt and is not timed."""

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("prompt_tokens", 2), ("new_tokens", 2)):
            if getattr(self, name) < least:
                raise UserError(
                    f"{name} {getattr(self, name)}: a point of measurement has {least} or more: ask for more"
                )


POINTS = (
    Point(name="1 x 64", batch=1, prompt_tokens=16, new_tokens=64),
    Point(name="16 x (32 + 64)", batch=16, prompt_tokens=32, new_tokens=64),
    Point(name="8 x 1,024", batch=8, prompt_tokens=1024, new_tokens=32),
)


def text_prompts(text: TextFile, tokenizer: Any) -> Callable[[Point], Tensor]:
    """Prompts for `bench_decode` out of a text: as many stretches as a point has rows, evenly spaced. Raises `UserError`
    where the text is too short.
    """

    def prompt(point: Point) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fewer windows than asked for: here that is an error
            found = text_windows(text, tokenizer, windows=point.batch, context_tokens=point.prompt_tokens).ids_WT
        if len(found) < point.batch:
            raise UserError(
                f"{text.name}: the text has {len(found)} prompts of {point.prompt_tokens:,} tokens, not {point.batch}: give a "
                "longer text or ask for fewer"
            )
        return found

    return prompt


def bench_decode(
    ours: FoldForCausalLM,
    theirs: PreTrainedModel | None,
    *,
    name: str,
    methods: Sequence[str] = ("full",),
    points: Sequence[Point] = POINTS,
    padded: Sequence[bool] = (False, True),
    repeats: int = 5,
    seed: int = 0,
    prompts: Callable[[Point], Tensor] | None = None,
    vllm: VllmPeer | None = None,
    report: Report = silent,
) -> dict[str, Any]:
    """A result of kind `decode`: a row for each point, with and without left padding, and method.

    `theirs`: transformers' model of the same checkpoint, or None to measure ours alone. `methods` are `--time` texts.
    `prompts`: the ids [B, T] of a point's prompt; None = random ids, at which learned gates decide otherwise than at text.
    `vllm`: the same checkpoint there, with room for every point; it takes turns where rows are not padded.
    Greedy; every row generates all its tokens. A row without padding has the roofline of its last step.
    """
    if repeats < 1:
        raise UserError(f"{repeats} repeats: 1 or more are measured: ask for more")
    layouts = method_layouts(ours, methods)
    for point in points:
        if point.prompt_tokens + point.new_tokens > ours.config.max_position_embeddings:
            raise UserError(
                f"point '{point.name}': {point.prompt_tokens + point.new_tokens} tokens, and the model reads "
                f"{ours.config.max_position_embeddings} at most: ask for fewer"
            )
    rows, machine = [], measure_machine(ours.dtype)
    for point in points:
        for pads in padded:
            ids = _random_ids(point, ours.config.vocab_size, seed) if prompts is None else prompts(point)
            prompt = _prompt(point, ids.to(ours.device), pads=pads)
            found = _measure_point(ours, theirs, None if pads else vllm, layouts, point, pads, prompt, repeats, report)
            rows += found if pads else [row | _allowed(row, machine, ours, point) for row in found]
    return {
        "model": {"name": name, "parameters": ours.num_parameters()},
        "environment": {
            "device": ours.device.type,
            "dtype": str(ours.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            **machine.about(),
            **({} if vllm is None else {"vllm": vllm.about["version"]}),
        },
        "repeats": repeats,
        "rows": rows,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """One `generate`."""

    step_seconds: tuple[float, ...]
    """From each new token to the next."""
    allocated_bytes: int
    """Held by the cache at the end."""
    peak_bytes: int | None
    """The most memory taken on top of what was held before."""
    new_ids: Tensor
    """What was generated [B, new tokens]."""
    compression: float = 1.0
    """Tokens seen / tokens kept at the end."""

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together."""
        return self.new_ids.shape[0] * len(self.step_seconds) / sum(self.step_seconds)


class _Clock(BaseStreamer):
    """Notes when tokens come; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """The next tokens are there."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """All tokens have come."""


def _measure_point(
    ours: FoldForCausalLM, theirs: PreTrainedModel | None, vllm: VllmPeer | None, layouts: Sequence[KVLayout],
    point: Point, pads: bool, prompt: tuple[Tensor, Tensor | None], repeats: int, report: Report,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rounds of one point: the peers once, then each method once."""
    what = point.name + (", padded" if pads else "")
    sides: list[Callable[[int], _Run]] = [] if theirs is None else [lambda tokens: _run_theirs(theirs, prompt, tokens)]
    sides += [] if vllm is None else [lambda tokens: _run_vllm(vllm, prompt[0], tokens)]
    sides += [lambda tokens, layout=layout: _run_ours(ours, layout, prompt, tokens) for layout in layouts]
    total = len(sides) * (repeats + 1)
    runs: list[list[_Run]] = [[] for _ in sides]
    for number in range(total):
        turn, side = divmod(number, len(sides))
        report(what, number, total)
        run = sides[side](_WARM_UP_TOKENS if turn == 0 else point.new_tokens)
        if turn:
            runs[side].append(run)
    report(what, total, total)
    peer = None if theirs is None else runs.pop(0)
    engine = None if vllm is None else runs.pop(0)
    first = runs[0] if len(runs) > 1 else None
    return [_row(point, pads, layout, mine, peer, engine, first) for layout, mine in zip(layouts, runs, strict=True)]


def _row(
    point: Point, pads: bool, layout: KVLayout, ours: list[_Run], theirs: list[_Run] | None,
    vllm: list[_Run] | None = None, first: list[_Run] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`first`: the runs of the first of several methods."""
    row = {
        "point": point.name,
        "batch": point.batch,
        "context_tokens": point.prompt_tokens + point.new_tokens,
        "new_tokens": point.new_tokens,
        "padded": pads,
        **method_about(layout),
        "compression": ours[-1].compression,
        "ours": _figures(ours),
    }
    if first is not None:
        row["over_first"] = _ratios(ours, first)
    if vllm is not None:
        row |= {"vllm": _figures(vllm), "vllm_ratio": _ratios(ours, vllm)}
    if theirs is None:
        return row
    pairs = list(zip(ours, theirs, strict=True))
    return row | {
        "theirs": _figures(theirs),
        "ratio": _ratios(ours, theirs),
        "equal_tokens": _mean([(mine.new_ids == other.new_ids).float().mean().item() for mine, other in pairs]),
    }


def _ratios(ours: list[_Run], others: list[_Run]) -> dict[str, float]:
    """Of speeds, round by round."""
    return spread([one.tokens_per_second / other.tokens_per_second for one, other in zip(ours, others, strict=True)])


def _figures(runs: list[_Run]) -> dict[str, Any]:
    peaks = [run.peak_bytes for run in runs]
    return {
        "tokens_per_second": spread([run.tokens_per_second for run in runs]),
        "step_ms": spread([1000 * statistics.median(run.step_seconds) for run in runs]),
        "allocated_bytes": runs[-1].allocated_bytes,
        "peak_bytes": None if None in peaks else round(statistics.median(peaks)),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _random_ids(point: Point, vocab_size: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (point.batch, point.prompt_tokens), generator=draw)


def _prompt(point: Point, ids: Tensor, *, pads: bool) -> tuple[Tensor, Tensor | None]:
    """The ids [B, T] and, with padding, a mask that leaves out up to a quarter of the columns on the left."""
    if not pads:
        return ids, None
    missing = 1 + torch.arange(point.batch) * 7 % max(1, point.prompt_tokens // 4)
    real = torch.arange(point.prompt_tokens) >= missing[:, None]
    return ids, real.long().to(ids.device)


def _run_theirs(model: PreTrainedModel, prompt: tuple[Tensor, Tensor | None], new_tokens: int) -> _Run:
    cache = DynamicCache(config=model.config)
    return _run(
        model,
        cache,
        lambda: sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)),
        prompt,
        new_tokens,
    )


def _run_vllm(vllm: VllmPeer, ids: Tensor, new_tokens: int) -> _Run:
    run = vllm.run(ids.tolist(), new_tokens)
    return _Run(step_seconds=run.step_seconds, allocated_bytes=0, peak_bytes=None, new_ids=torch.tensor(run.new_ids))


def _allowed(row: dict[str, Any], machine: Machine, model: FoldForCausalLM, point: Point) -> dict[str, Any]:
    """The roofline of a step in the middle of the answer."""
    layout, tokens = model.config.layout, point.prompt_tokens + point.new_tokens // 2
    kept = tokens / row["compression"]
    entry = sum(
        layout.layers[layer].num_kv_heads
        * sum(layout.bits_of(layout.owner_of(layer)).slot_bytes(layout.layers[layer].head_dim, model.dtype.itemsize))
        for layer in range(layout.num_layers)
    )
    allowed = step_allowed(machine, model, rows=point.batch, kv_bytes=point.batch * kept * entry, kept_mean=kept)
    return allowed | {"over_roofline": row["ours"]["step_ms"]["median"] / allowed["roofline_ms"]}


def _run_ours(model: FoldForCausalLM, layout: KVLayout, prompt: tuple[Tensor, Tensor | None], new_tokens: int) -> _Run:
    cache = model.new_cache(rows=prompt[0].shape[0], time=layout.time_text(), bits=layout.bits_text())
    run = _run(model, cache, lambda: cache.allocated_bytes, prompt, new_tokens)
    kept = kept_shares(cache, entry_bytes(layout, model.dtype.itemsize, model.device)).mean().item()
    cache.free()
    return replace(run, compression=1 / kept)


def _run(
    model: PreTrainedModel, cache: Any, held: Callable[[], int], prompt: tuple[Tensor, Tensor | None], new_tokens: int
) -> _Run:
    ids, mask = prompt
    clock, peak = _Clock(), PeakMemory(model.device)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids) if mask is None else mask, past_key_values=cache, streamer=clock,
        do_sample=False, num_beams=1, min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0,
    )  # fmt: skip
    new_times = clock.times[1:]
    return _Run(
        step_seconds=tuple(after - before for before, after in pairwise(new_times)),
        allocated_bytes=held(), peak_bytes=peak.bytes(), new_ids=output[:, ids.shape[1] :],
    )  # fmt: skip
