"""Decoding steps over caches that were filled with random keys and values instead of a prompt: long contexts in seconds.

What a step costs depends on how many entries each KV head holds, not on what stands in them. A learned method holds what its
gates kept of one row of text, scaled to the compression that is asked for; every row holds the same number of entries of
each head, in pages of its own. All sides take turns, round after round; ratios are taken within a round.
Letters: B rows, T tokens, O owners, K kv heads, D head dim.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvfold.bench.decode import spread
from kvfold.bench.roofline import Machine, measure_machine, step_allowed
from kvfold.cache.hf import FoldCache
from kvfold.errors import UserError
from kvfold.eval.progress import Report, silent
from kvfold.eval.reading import method_about
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.decoder import FoldForCausalLM

_FILL_TOKENS = 1024
"""Entries written at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """A cache to be measured."""

    layout: KVLayout
    """Method and storage."""
    compression: float | None = None
    """Of a learned method: tokens over entries, as a mean over heads. None = what its gates keep."""


@dataclass(kw_only=True, slots=True)
class _Filled:
    """A side with its cache, and its times."""

    side: Side | None
    """None: transformers."""
    step: Callable[[Tensor], Any]
    """One decoding step of all rows."""
    cache: Any
    begun_OK: Tensor | None = None
    """Entries of each owner and head when the steps begin."""
    seconds: list[list[float]] = field(default_factory=list)
    """Of each round, its steps."""

    def tokens_per_second(self, rows: int) -> list[float]:
        """Of each round."""
        return [rows * len(steps) / sum(steps) for steps in self.seconds]


@torch.inference_mode()
def bench_filled(
    ours: FoldForCausalLM, theirs: PreTrainedModel | None, sides: Sequence[Side], *, name: str, batch: int, tokens: int,
    new_tokens: int = 16, repeats: int = 3, text_T: Tensor | None = None, report: Report = silent,
) -> dict[str, Any]:  # fmt: skip
    """A result of kind `decode`: a row for each side, each with the roofline of its step.

    `tokens`: in the cache of every row when the steps begin. `text_T`: token ids that show what gates keep; learned methods
    need `tokens` of them. Raises `UserError` where the model reads fewer tokens, or a side can't be made.
    """
    steps = tokens + new_tokens * (repeats + 1)
    if steps > ours.config.max_position_embeddings:
        raise UserError(
            f"{tokens} tokens and {new_tokens * (repeats + 1)} steps: the model reads {ours.config.max_position_embeddings} "
            "at most: ask for fewer"
        )
    machine, filled = measure_machine(ours.dtype), []
    for side in sides:
        report("filling caches", len(filled), len(sides))
        filled.append(_ours(ours, side, batch, tokens, new_tokens * (repeats + 1), text_T))
    if theirs is not None:
        filled.append(_theirs(theirs, batch, tokens))
    ids_B1 = torch.randint(0, ours.config.vocab_size, (batch, 1), generator=torch.Generator().manual_seed(0))
    for turn in range(repeats + 1):
        for number, one in enumerate(filled):
            report("decoding", turn * len(filled) + number, (repeats + 1) * len(filled))
            seconds = [_seconds(lambda one=one: one.step(ids_B1.to(ours.device))) for _ in range(new_tokens)]
            if turn:
                one.seconds.append(seconds)
    report("decoding", 1, 1)
    machine_after = measure_machine(ours.dtype)
    machine = max(machine, machine_after, key=lambda one: one.read_bytes_per_second)
    peer = None if theirs is None else filled.pop()
    rows = [_row(ours, machine, one, filled[0], peer, batch, tokens, new_tokens) for one in filled]
    for one in filled:
        one.cache.free()
    return {
        "model": {"name": name, "parameters": ours.num_parameters()},
        "environment": {
            "device": ours.device.type, "dtype": str(ours.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
            **machine.about(),
        },
        "context": "random keys and values, no prompt was read", "repeats": repeats, "rows": rows,
    }  # fmt: skip


def fill_cache(cache: FoldCache, entries_OK: Tensor, *, tokens: int, seed: int = 0) -> None:
    """Let every row of an empty cache have seen `tokens` tokens and hold so many entries of each owner and head (-1 = no such
    head), evenly spaced among them. Stream state stays that of an empty cache.
    """
    store, draw = cache.store, torch.Generator(cache.store.device).manual_seed(seed)
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
            length = part.stop - part.start
            k, v = (
                torch.randn(
                    (len(rows), length, heads, pool.page_class.head_dim), generator=draw, dtype=pool.dtype,
                    device=store.device,
                ) for _ in range(2)
            )  # fmt: skip
            position_BT = order_KT[:1, part].expand(len(rows), -1)
            chosen_BKT = chosen_KT[None, :, part].expand(len(rows), -1, -1)
            state = {name: torch.zeros(chosen_BKT.shape) for name in pool.slot_arrays}
            group.append(ids_BK, chosen_BKT, k, v, position_BT, state)
    store.commit(cache.rows, [tokens] * len(cache.rows))
    cache.columns = tokens


def _ours(model: FoldForCausalLM, side: Side, batch: int, tokens: int, steps: int, text_T: Tensor | None) -> _Filled:
    cache = model.new_cache(rows=batch, time=side.layout.time_text(), bits=side.layout.bits_text())
    fill_cache(cache, _entries(model, side, tokens, steps, text_T), tokens=tokens)
    begun_OK = cache.kept_tokens.double().mean(dim=1).cpu()
    return _Filled(side=side, step=lambda ids: model(ids, past_key_values=cache), cache=cache, begun_OK=begun_OK)


def _entries(model: FoldForCausalLM, side: Side, tokens: int, steps: int, text_T: Tensor | None) -> Tensor:
    """Entries of each owner and head, int64 [O, K]. The tokens of the steps all stay, since what a filled cache holds is not
    marked: the compression that was asked for is that of the middle of the run.
    """
    layout = side.layout
    heads = max(layout.layers[owner].num_kv_heads for owner in layout.owners)
    methods = [layout.time_of(owner) for owner in layout.owners]
    if not any(method.trained for method in methods):
        if side.compression is not None:
            raise UserError(
                f"compression {side.compression} under '{layout.time_text()}': its own settings say what it keeps: "
                "leave the compression out"
            )
        kept = [[method.max_kept(tokens)] * heads for method in methods]
        return torch.tensor(kept)
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


def _theirs(model: PreTrainedModel, batch: int, tokens: int) -> _Filled:
    cache, config = DynamicCache(config=model.config), model.config
    heads, head_dim = config.num_key_value_heads, getattr(config, "head_dim", None)
    shape = (batch, heads, tokens, head_dim or config.hidden_size // config.num_attention_heads)
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)), layer)
    return _Filled(side=None, step=lambda ids: model(ids, past_key_values=cache), cache=cache)


def _row(
    model: FoldForCausalLM, machine: Machine, one: _Filled, first: _Filled, peer: _Filled | None, batch: int, tokens: int,
    new_tokens: int,
) -> dict[str, Any]:  # fmt: skip
    side, cache = one.side, one.cache
    # Of the middle of the run.
    kept_OK = (one.begun_OK + cache.kept_tokens.double().mean(dim=1).cpu()) / 2
    kv_bytes, kept_sum, streams = 0.0, 0.0, 0
    for layer in range(side.layout.num_layers):
        owner = side.layout.owner_of(layer)
        of_owner = kept_OK[side.layout.owners.index(owner)]
        of_owner = of_owner[of_owner >= 0]
        entry = sum(side.layout.bits_of(owner).slot_bytes(side.layout.layers[owner].head_dim, model.dtype.itemsize))
        kv_bytes += batch * of_owner.sum().item() * entry
        kept_sum, streams = kept_sum + of_owner.sum().item(), streams + len(of_owner)
    allowed = step_allowed(machine, model, rows=batch, kv_bytes=kv_bytes, kept_mean=kept_sum / streams)
    steps = spread([1e3 * sum(seconds) / len(seconds) for seconds in one.seconds])
    row = {
        "point": f"{batch} x {tokens:,}, filled", "batch": batch, "context_tokens": tokens, "new_tokens": new_tokens,
        "padded": False, **method_about(side.layout), "bits": side.layout.bits_text(),
        "compression": (tokens + cache.seen_tokens.double().mean().item()) / 2 * streams / kept_sum, "forced": side.compression,
        "ours": {
            "tokens_per_second": spread(one.tokens_per_second(batch)), "step_ms": steps,
            "allocated_bytes": cache.allocated_bytes, "peak_bytes": None,
        },
        **allowed, "over_roofline": steps["median"] / allowed["roofline_ms"],
    }  # fmt: skip
    if one is not first:
        row["over_first"] = _ratio(one, first, batch)
    if peer is not None:
        row["theirs"] = {"tokens_per_second": spread(peer.tokens_per_second(batch))}
        row["ratio"] = _ratio(one, peer, batch)
    return row


def _ratio(one: _Filled, other: _Filled, rows: int) -> dict[str, float]:
    pairs = zip(one.tokens_per_second(rows), other.tokens_per_second(rows), strict=True)
    return spread([mine / others for mine, others in pairs])


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
