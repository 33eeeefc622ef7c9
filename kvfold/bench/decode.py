"""Decoding speed and memory, kvfold's and transformers' side by side in one run.

Either `generate` writes after a prompt, and the time is that of decoding alone: from the first new token, with which the prompt
is done, to the last. Or steps run over caches that were filled with random keys and values instead of a prompt: long contexts
in seconds. What a step costs depends on how many entries each KV head holds, not on what stands in them. A learned method holds
what its gates kept of one row of text, scaled to the compression that is asked for; every row holds the same number of entries
of each head, in pages of its own. Letters: B rows, T tokens, O owners, K kv heads, D head dim.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from kvfold.bench import measuring
from kvfold.bench.vllm_peer import VllmPeer
from kvfold.cache.hf import FoldCache
from kvfold.data import TextFile, text_windows
from kvfold.errors import UserError
from kvfold.eval.progress import Report, silent
from kvfold.eval.reading import entry_bytes, kept_shares, method_about, method_layouts
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.decoder import FoldForCausalLM

_WARM_UP_TOKENS = 4
_FILL_TOKENS = 1024
"""Entries of a filled cache that are written at a time."""


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


def random_ids(point: Point, vocab_size: int) -> Tensor:
    """A prompt [B, T] at which learned gates decide otherwise than at text."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (point.batch, point.prompt_tokens), generator=draw)


def bench_decode(
    ours: FoldForCausalLM, theirs: PreTrainedModel | None, *, name: str, methods: Sequence[str] = ("full",),
    points: Sequence[Point] = POINTS, padded: Sequence[bool] = (False, True), repeats: int = 5,
    prompts: Callable[[Point], Tensor] | None = None, vllm: VllmPeer | None = None, report: Report = silent,
) -> dict[str, Any]:  # fmt: skip
    """A result of kind `decode`: a row for each point, with and without left padding, and method.

    `theirs`: transformers' model of the same checkpoint, or None to measure ours alone. `methods` are `--time` texts.
    `prompts`: the ids [B, T] of a point's prompt; None = random ids.
    `vllm`: the same checkpoint there, with room for every point; it takes turns where rows are not padded.
    Greedy; every row generates all its tokens. A row without padding has the roofline of its last step.
    """
    layouts = method_layouts(ours, methods)
    for point in points:
        measuring.check_size(ours, f"point '{point.name}'", point.prompt_tokens + point.new_tokens, repeats)
    rows, machine = [], measuring.measure_machine(ours.dtype)
    for point in points:
        for pads in padded:
            ids = random_ids(point, ours.config.vocab_size) if prompts is None else prompts(point)
            prompt = _prompt(point, ids.to(ours.device), pads=pads)
            found = _measure_point(ours, theirs, None if pads else vllm, layouts, point, pads, prompt, repeats, report)
            rows += found if pads else [row | _allowed(row, machine, ours, point) for row in found]
    versions = {} if vllm is None else {"vllm": vllm.about["version"]}
    return measuring.measured_on(ours, name, **machine.about(), **versions) | {"repeats": repeats, "rows": rows}


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
    sides: list[Callable[[int], _Run]] = [] if theirs is None else [lambda tokens: _run_theirs(theirs, prompt, tokens)]
    sides += [] if vllm is None else [lambda tokens: _run_vllm(vllm, prompt[0], tokens)]
    sides += [lambda tokens, layout=layout: _run_ours(ours, layout, prompt, tokens) for layout in layouts]
    timed = [lambda turn, side=side: side(point.new_tokens if turn else _WARM_UP_TOKENS) for side in sides]
    runs = measuring.in_turns(timed, repeats, point.name + (", padded" if pads else ""), report, warm_up=True)
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
        "point": point.name, "batch": point.batch, "context_tokens": point.prompt_tokens + point.new_tokens,
        "new_tokens": point.new_tokens, "padded": pads, **method_about(layout), "compression": ours[-1].compression,
        "ours": _figures(ours),
    }  # fmt: skip
    if first is not None:
        row["over_first"] = measuring.ratios(_speeds(ours), _speeds(first))
    if vllm is not None:
        row |= {"vllm": _figures(vllm), "vllm_ratio": measuring.ratios(_speeds(ours), _speeds(vllm))}
    if theirs is not None:
        pairs = zip(ours, theirs, strict=True)
        equal = [(mine.new_ids == other.new_ids).float().mean().item() for mine, other in pairs]
        row |= {"theirs": _figures(theirs), "ratio": measuring.ratios(_speeds(ours), _speeds(theirs))}
        row["equal_tokens"] = statistics.fmean(equal)
    return row


def _speeds(runs: list[_Run]) -> list[float]:
    return [run.tokens_per_second for run in runs]


def _figures(runs: list[_Run]) -> dict[str, Any]:
    peaks = [run.peak_bytes for run in runs]
    return {
        "tokens_per_second": measuring.spread(_speeds(runs)),
        "step_ms": measuring.spread([1000 * statistics.median(run.step_seconds) for run in runs]),
        "allocated_bytes": runs[-1].allocated_bytes,
        "peak_bytes": None if None in peaks else round(statistics.median(peaks)),
    }


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
        model, cache, lambda: sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)), prompt, new_tokens
    )  # fmt: skip


def _run_vllm(vllm: VllmPeer, ids: Tensor, new_tokens: int) -> _Run:
    run = vllm.run(ids.tolist(), new_tokens)
    return _Run(step_seconds=run.step_seconds, allocated_bytes=0, peak_bytes=None, new_ids=torch.tensor(run.new_ids))


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
    clock, peak = _Clock(), measuring.PeakMemory(model.device)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids) if mask is None else mask, past_key_values=cache, streamer=clock,
        do_sample=False, num_beams=1, min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0,
    )  # fmt: skip
    return _Run(
        step_seconds=tuple(after - before for before, after in pairwise(clock.times[1:])),
        allocated_bytes=held(), peak_bytes=peak.bytes(), new_ids=output[:, ids.shape[1] :],
    )  # fmt: skip


def _allowed(row: dict[str, Any], machine: measuring.Machine, model: FoldForCausalLM, point: Point) -> dict[str, Any]:
    """The roofline of a step in the middle of the answer."""
    layout, tokens = model.config.layout, point.prompt_tokens + point.new_tokens // 2
    kept = tokens / row["compression"]
    entries = sum(layer.num_kv_heads * _entry_bytes(model, layout, place) for place, layer in enumerate(layout.layers))
    allowed = measuring.step_allowed(
        machine, model, rows=point.batch, kv_bytes=point.batch * kept * entries, kept_mean=kept
    )
    return allowed | {"over_roofline": row["ours"]["step_ms"]["median"] / allowed["roofline_ms"]}


def _entry_bytes(model: FoldForCausalLM, layout: KVLayout, layer: int) -> int:
    """Of one key and value as a layer reads them from its owner."""
    bits = layout.bits_of(layout.owner_of(layer))
    return sum(bits.slot_bytes(layout.layers[layer].head_dim, model.dtype.itemsize))


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """A cache to be filled and measured."""

    layout: KVLayout
    """Method and storage."""
    compression: float | None = None
    """Of a learned method: tokens over entries, as a mean over heads. None = what its gates keep."""


@torch.inference_mode()
def bench_filled(
    ours: FoldForCausalLM, theirs: PreTrainedModel | None, sides: Sequence[Side], *, name: str, batch: int, tokens: int,
    new_tokens: int = 16, repeats: int = 3, text_T: Tensor | None = None, report: Report = silent,
) -> dict[str, Any]:  # fmt: skip
    """A result of kind `decode`: a row for each side, each with the roofline of its step.

    `tokens`: in the cache of every row when the steps begin. `text_T`: token ids that show what gates keep; learned methods
    need `tokens` of them. Raises `UserError` where the model reads fewer tokens, or a side can't be made.
    """
    steps = new_tokens * (repeats + 1)
    measuring.check_size(ours, "a filled cache and its steps", tokens + steps, repeats)
    machine, caches = measuring.measure_machine(ours.dtype), []
    for side in sides:
        report("filling caches", len(caches), len(sides))
        cache = ours.new_cache(rows=batch, time=side.layout.time_text(), bits=side.layout.bits_text())
        fill_cache(cache, _entries(ours, side, tokens, steps, text_T), tokens=tokens)
        caches.append(cache)
    begun = [_held(cache) for cache in caches]
    pairs = [(ours, cache) for cache in caches]
    pairs += [] if theirs is None else [(theirs, _their_cache(theirs, batch, tokens))]
    draw = torch.Generator().manual_seed(0)
    ids_B1 = torch.randint(0, ours.config.vocab_size, (batch, 1), generator=draw).to(ours.device)

    def step_ms(model: Any, cache: Any) -> float:
        times = [
            measuring.seconds(lambda: model(ids_B1, past_key_values=cache), ours.device) for _ in range(new_tokens)
        ]
        return 1e3 * sum(times) / new_tokens

    timed = [lambda _, model=model, cache=cache: step_ms(model, cache) for model, cache in pairs]
    runs = measuring.in_turns(timed, repeats, "decoding", report, warm_up=True)
    machine = max(machine, measuring.measure_machine(ours.dtype), key=lambda one: one.read_bytes_per_second)
    rows = []
    for side, cache, before, steps_ms in zip(sides, caches, begun, runs, strict=False):
        kept_OK = (before + _held(cache)) / 2  # of the middle of the run
        row = _filled_row(ours, machine, side, cache, kept_OK, steps_ms, tokens) | {"new_tokens": new_tokens}
        if rows:
            row["over_first"] = measuring.ratios(runs[0], steps_ms)
        if theirs is not None:
            row["theirs"] = {"tokens_per_second": _per_second(batch, runs[-1])}
            row["ratio"] = measuring.ratios(runs[-1], steps_ms)
        rows.append(row)
    for cache in caches:
        cache.free()
    context = "random keys and values, no prompt was read"
    return measuring.measured_on(ours, name, **machine.about()) | {"context": context, "repeats": repeats, "rows": rows}


def fill_cache(cache: FoldCache, entries_OK: Tensor, *, tokens: int) -> None:
    """Let every row of an empty cache have seen `tokens` tokens and hold so many entries of each owner and head (-1 = no such
    head), evenly spaced among them. Stream state stays that of an empty cache.
    """
    store, draw = cache.store, torch.Generator(cache.store.device).manual_seed(0)
    store.begin(cache.rows, [tokens] * len(cache.rows))
    rows = torch.tensor(cache.rows, dtype=torch.int64, device=store.device)
    for owner, entries_K in zip(cache.layout.owners, entries_OK, strict=True):
        group, index = store.place_of[owner]
        pool, heads = group.pool, group.num_kv_heads
        ids_BK = group.ids(rows)[index]
        order_KT = torch.arange(tokens, device=store.device).expand(heads, tokens)
        # Entry i of n stands at position i * tokens // n: those where the share of entries so far grows.
        count = entries_K[:heads, None].to(store.device)
        chosen_KT = (order_KT + 1) * count // tokens > order_KT * count // tokens
        for start in range(0, tokens, _FILL_TOKENS):
            part = slice(start, min(start + _FILL_TOKENS, tokens))
            shape = (len(rows), part.stop - part.start, heads, pool.page_class.head_dim)
            k, v = (torch.randn(shape, generator=draw, dtype=pool.dtype, device=store.device) for _ in range(2))
            position_BT = order_KT[:1, part].expand(len(rows), -1)
            chosen_BKT = chosen_KT[None, :, part].expand(len(rows), -1, -1)
            state = {name: torch.zeros(chosen_BKT.shape) for name in pool.slot_arrays}
            group.append(ids_BK, chosen_BKT, k, v, position_BT, state)
    store.commit(cache.rows, [tokens] * len(cache.rows))
    cache.columns = tokens


def _held(cache: FoldCache) -> Tensor:
    """Entries of each owner and head [O, K], a mean over rows."""
    return cache.kept_tokens.double().mean(dim=1).cpu()


def _entries(model: FoldForCausalLM, side: Side, tokens: int, steps: int, text_T: Tensor | None) -> Tensor:
    """Entries of each owner and head, int64 [O, K]. The tokens of the steps all stay, since what a filled cache holds is not
    marked: the compression that was asked for is that of the middle of the run.
    """
    layout = side.layout
    heads = max(layout.layers[owner].num_kv_heads for owner in layout.owners)
    methods = [layout.time_of(owner) for owner in layout.owners]
    if not any(method.trained for method in methods):
        return torch.tensor([[method.max_kept(tokens)] * heads for method in methods])
    if text_T is None or len(text_T) < tokens:
        raise UserError(f"'{layout.time_text()}': what gates keep shows in {tokens} tokens of text: give a longer text")
    cache = model.new_cache(rows=1, time=layout.time_text(), bits=layout.bits_text())
    model(text_T[None, :tokens].to(model.device), past_key_values=cache, logits_to_keep=1)
    kept_OK = cache.kept_tokens[:, 0].cpu()
    cache.free()
    if side.compression is None:
        return kept_OK
    return _scaled(kept_OK, tokens, max(1.0, (tokens + steps / 2) / side.compression - steps / 2))


def _scaled(kept_OK: Tensor, tokens: int, mean: float) -> Tensor:
    """The same spread over heads with another mean; no head has more entries than tokens."""
    least, most = 0.0, float(tokens)
    for _ in range(50):  # by halves, since what is cut at `tokens` makes the mean no multiple of the factor
        factor = (least + most) / 2
        scaled = (kept_OK * factor).round().clamp(1, tokens).long()
        if scaled.double().mean() > mean:
            most = factor
        else:
            least = factor
    return scaled


def _their_cache(model: PreTrainedModel, batch: int, tokens: int) -> DynamicCache:
    cache, config = DynamicCache(config=model.config), model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (batch, config.num_key_value_heads, tokens, head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)), layer)
    return cache


def _per_second(batch: int, steps_ms: Sequence[float]) -> dict[str, float]:
    return measuring.spread([1e3 * batch / step for step in steps_ms])


def _filled_row(
    model: FoldForCausalLM, machine: measuring.Machine, side: Side, cache: FoldCache, kept_OK: Tensor, steps_ms: Sequence[float],
    tokens: int,
) -> dict[str, Any]:  # fmt: skip
    layout, batch = side.layout, len(cache.rows)
    kv_bytes, kept_sum, streams = 0.0, 0.0, 0
    for layer in range(layout.num_layers):
        of_owner = kept_OK[layout.owners.index(layout.owner_of(layer))]
        of_owner = of_owner[of_owner >= 0]
        kv_bytes += batch * of_owner.sum().item() * _entry_bytes(model, layout, layer)
        kept_sum, streams = kept_sum + of_owner.sum().item(), streams + len(of_owner)
    allowed = measuring.step_allowed(machine, model, rows=batch, kv_bytes=kv_bytes, kept_mean=kept_sum / streams)
    step = measuring.spread(steps_ms)
    return {
        "point": f"{batch} x {tokens:,}, filled", "batch": batch, "context_tokens": tokens, "padded": False,
        **method_about(layout), "bits": layout.bits_text(),
        "compression": (tokens + cache.seen_tokens.double().mean().item()) / 2 * streams / kept_sum, "forced": side.compression,
        "ours": {
            "tokens_per_second": _per_second(batch, steps_ms), "step_ms": step, "allocated_bytes": cache.allocated_bytes,
            "peak_bytes": None,
        },
        **allowed, "over_roofline": step["median"] / allowed["roofline_ms"],
    }  # fmt: skip
