"""What happens while text is read into a cache: how fast it goes under each method against what its FLOP allow; how many rows
of a context fit in a budget; bytes and kept tokens; and of one document, how much each head holds as it comes in and what became
of every token at its end.

All of the latter is read off the cache: how many entries a head has, and at which positions they stand. What gates said is not
asked. Letters: B rows, T tokens, O owners, K kv heads.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from kvfold.bench import measuring
from kvfold.cache.allocator import CacheFull
from kvfold.cache.hf import FoldCache
from kvfold.errors import UserError
from kvfold.eval.progress import Report, silent
from kvfold.eval.reading import calls, entry_bytes, folded_cache, kept_shares, method_about, method_layouts
from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import PAGE_SLOTS, layout_bytes
from kvfold.methods.base import Method
from kvfold.models.decoder import FoldForCausalLM


def bench_prefill(
    model: FoldForCausalLM, ids_BT: Tensor, *, name: str, methods: Sequence[str] = ("full",),
    call_tokens: Sequence[int] = (0,), repeats: int = 2, report: Report = silent,
) -> dict[str, Any]:  # fmt: skip
    """A result of kind `prefill`: a row for each size of a call and method, with the ratio to the first method.

    `call_tokens`: tokens a row of one call, 0 = all at once. `allowed_tokens_per_second` is what the FLOP of full attention
    allow at the peak of torch's products, measured beside: `share_of_allowed` = speed / that.
    """
    batch, tokens = ids_BT.shape
    measuring.check_size(model, "prompts", tokens, repeats)
    layouts, rows = method_layouts(model, methods), []
    with torch.inference_mode():  # compiles, and touches memory for the first time
        model.model(ids_BT[:1, : min(tokens, 64)].to(model.device), use_cache=False)
    peak = measuring.measure_machine(model.dtype)
    for size in (size or tokens for size in call_tokens):
        sides = [lambda _, layout=layout, size=size: _read_prompts(model, layout, ids_BT, size) for layout in layouts]
        runs = measuring.in_turns(sides, repeats, f"calls of {size} tokens", report, turning=True)
        peak = max(peak, measuring.measure_machine(model.dtype), key=lambda one: one.flops)
        speeds = [[batch * tokens / taken for taken, _ in mine] for mine in runs]
        for layout, mine, own in zip(layouts, runs, speeds, strict=True):
            row = {
                "batch": batch, "prompt_tokens": tokens, "call_tokens": size, **method_about(layout),
                "bits": layout.bits_text(), "compression": mine[-1][1], "tokens_per_second": measuring.spread(own),
            }  # fmt: skip
            rows.append(row if own is speeds[0] else row | {"over_first": measuring.ratios(own, speeds[0])})
    # Of full attention; the logits of the last token alone are computed.
    flop = measuring.linear_flop(model, tokens=batch * tokens, logits=batch)
    flop += measuring.attention_flop(model, pairs=batch * tokens * (tokens + 1) / 2)
    allowed = batch * tokens / (flop / peak.flops)
    for row in rows:
        row["allowed_tokens_per_second"] = allowed
        row["share_of_allowed"] = row["tokens_per_second"]["median"] / allowed
    return measuring.measured_on(model, name, **peak.about()) | {"repeats": repeats, "rows": rows}


def _read_prompts(model: FoldForCausalLM, layout: KVLayout, ids_BT: Tensor, call_tokens: int) -> tuple[float, float]:
    """Seconds, and the mean of tokens over entries at the end."""
    with folded_cache(model, layout, ids_BT.shape[0]) as cache:

        def read() -> None:
            for part in ids_BT.to(model.device).split(call_tokens, dim=1):
                model(part, past_key_values=cache, logits_to_keep=1)

        taken, kept = measuring.seconds(read, model.device), cache.kept_tokens
        return taken, ids_BT.shape[1] / kept[kept >= 0].double().mean().item()


def bench_capacity(
    model: FoldForCausalLM, ids_BT: Tensor, *, name: str, kv_bytes: int, methods: Sequence[str] = ("full",),
    most_rows: int = 256, report: Report = silent,
) -> dict[str, Any]:  # fmt: skip
    """A result of kind `capacity`: a row for each method, with the rows that fit into `kv_bytes`, found by reading them in one
    after the other until the cache is full, and what was planned.

    `ids_BT`: texts of one context each, taken in turn; `most_rows` ends a search that finds no end.
    """
    rows = []
    for layout in method_layouts(model, methods):
        rows.append(_rows_that_fit(model, layout, ids_BT, kv_bytes, most_rows, report))
        if len(rows) > 1 and rows[0]["rows"]:
            rows[-1]["over_first"] = rows[-1]["rows"] / rows[0]["rows"]
    return measuring.measured_on(model, name) | {"kv_bytes": kv_bytes, "context_tokens": ids_BT.shape[1], "rows": rows}


@torch.inference_mode()
def _rows_that_fit(
    model: FoldForCausalLM, layout: KVLayout, ids_BT: Tensor, kv_bytes: int, most_rows: int, report: Report
) -> dict[str, Any]:
    about, caches, kept = method_about(layout), [], []
    empty = model.new_cache(rows=0, time=layout.time_text(), bits=layout.bits_text(), memory_bytes=kv_bytes)
    while len(caches) < most_rows:
        report(about["method"], len(caches), most_rows)
        cache = empty.copy()  # draws from the same store
        try:
            model(ids_BT[len(caches) % len(ids_BT)][None].to(model.device), past_key_values=cache, logits_to_keep=1)
        except CacheFull:
            break
        caches.append(cache)
        kept.append(cache.kept_tokens[cache.kept_tokens >= 0].double().mean().item())
    report(about["method"], 1, 1)
    tokens, allocated = ids_BT.shape[1], empty.allocated_bytes
    for cache in caches:
        cache.free()
    compression = tokens * len(kept) / sum(kept) if kept else None
    learned = compression if any(layout.time_of(owner).trained for owner in layout.owners) else None
    planned = layout_bytes(layout, [tokens], model.dtype.itemsize, PAGE_SLOTS, learned)
    return {
        **about, "bits": layout.bits_text(), "rows": len(caches), "stopped": len(caches) == most_rows,
        "allocated_bytes": allocated, "compression": compression, "planned_rows": kv_bytes // planned,
    }  # fmt: skip


_EVERY_TOKENS = 16
"""Tokens between two looks at the cache."""


def measure_held(
    model: FoldForCausalLM, ids_BT: Tensor, methods: Sequence[str], *, name: str, report: Report = silent
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A result of kind `memory` and one of kind `kept`, from reading the same rows under each method.

    `methods` are `--time` texts. Kept tokens and their ages are means over the rows.
    """
    memory, kept = [], []
    for layout in method_layouts(model, methods):
        about = method_about(layout)
        with folded_cache(model, layout, ids_BT.shape[0]) as cache:
            tokens, held = [0], [cache.allocated_bytes]
            for seen in _looks(model, cache, ids_BT.to(model.device), layout, f"memory, {about['method']}", report):
                tokens.append(seen)
                held.append(cache.allocated_bytes)
            memory.append({**about, "tokens": tokens, "allocated_bytes": held})
            kept.append(about | _kept(cache, layout, ids_BT.shape[1]))
    about_model = {"name": name, "parameters": model.num_parameters()}
    return {"model": about_model, "batch": ids_BT.shape[0], "rows": memory}, {"model": about_model, "rows": kept}


def _looks(
    model: FoldForCausalLM, cache: FoldCache, ids_BT: Tensor, layout: KVLayout, what: str, report: Report
) -> Iterator[int]:
    """Feed all tokens as the method is meant to be fed; gives the tokens seen each time the cache is to be looked at."""
    total = ids_BT.shape[1]
    for start, seen in calls(layout, total, _EVERY_TOKENS):
        model.model(ids_BT[:, start:seen], past_key_values=cache, use_cache=True)
        report(what, seen, total)
        if seen % _EVERY_TOKENS == 0 or seen == total:
            yield seen


def _kept(cache: FoldCache, layout: KVLayout, seen: int) -> dict[str, Any]:
    """Tokens kept by each owner and head and, of methods that drop, their age: steps since they came, mean over the rows."""
    counts = cache.kept_tokens.double().mean(dim=1).tolist()
    kept = [[count for count in heads if count >= 0] for heads in counts]
    data = {"seen_tokens": seen, "owners": list(layout.owners), "kept": kept}
    if not _is_lossy(layout):
        return data
    ages = [[seen - 1 - fmean(chain(*head)) for head in zip(*rows, strict=True)] for rows in cache.kept_positions]
    return data | {"score": ages, "value_name": "mean age of the kept tokens"}


KEPT, GONE, MERGED, WAITING = "kgmw"
"""What became of a token: it has an entry, or its position is that of the entry it was merged into last; nothing is left of
it; it is part of the entry of a token after it; it has an entry that no decision can free yet (DMS's delay)."""

Head = tuple[int, int]
"""A layer that owns a cache, and one of its KV heads."""


def read_document(
    model: FoldForCausalLM, ids_T: Tensor, pieces: Sequence[str], methods: Sequence[str], *, name: str, text: str,
    heads: Sequence[Head] = (), report: Report = silent,
) -> dict[str, Any]:  # fmt: skip
    """A result of kind `document`: the tokens' text, and a row for each method (`--time` texts).

    `pieces`: the characters of each token. `heads`: those whose tokens are told one by one, the same under every method; none
    = three that the first method which drops anything chooses, those that keep least, the median and most.
    Raises `UserError` for more tokens than the model reads, a head that is not there, or a method that can't be run.
    """
    layouts = method_layouts(model, methods)
    measuring.check_size(model, "a text", len(ids_T))
    check_heads(model.config.layout, heads)
    found = [_read(model, ids_T, layout, report) for layout in layouts]
    if not heads:
        first = next((one for one, layout in zip(found, layouts, strict=True) if _is_lossy(layout)), found[0])
        heads = chosen_heads(first["owners"], first["kept"])
    for row, layout in zip(found, layouts, strict=True):
        positions = row.pop("positions")
        row["heads"] = [
            {"layer": layer, "head": head, "kept_tokens": len(held := positions[layer, head]),
             "states": token_states(held, len(ids_T), layout.time_of(layer))}
            for layer, head in heads
        ]  # fmt: skip
    about_model = {"name": name, "parameters": model.num_parameters()}
    return {"model": about_model, "text": text, "tokens": list(pieces), "rows": found}


def check_heads(layout: KVLayout, heads: Sequence[Head]) -> None:
    """Refuse heads that own no cache."""
    for layer, head in heads:
        if layer not in layout.owners or not 0 <= head < layout.layers[layer].num_kv_heads:
            owners = ", ".join(map(str, layout.owners))
            raise UserError(
                f"head {layer}.{head}: there is no cache of that head: layers that have one are {owners}, their KV heads count "
                f"from 0: write e.g. {layout.owners[0]}.0"
            )


def chosen_heads(owners: Sequence[int], kept: Sequence[Sequence[int]]) -> list[Head]:
    """The heads that keep least, the median and most; of equal ones the lowest, the middle and the highest."""
    ranked = sorted(
        (count, owner, head) for owner, line in zip(owners, kept, strict=True) for head, count in enumerate(line)
    )
    places = sorted({0, (len(ranked) - 1) // 2, len(ranked) - 1})
    return [ranked[place][1:] for place in places]


def token_states(positions: Sequence[int], tokens: int, spec: Method) -> str:
    """A letter for each token, from the positions that one head holds after `tokens` tokens: see `KEPT` and the others.

    An entry of DMC stands at the position of its newest token and holds what came since the entry before it, at most the
    newest `window` tokens of these.
    """
    held = set(positions)
    states = [KEPT if token in held else GONE for token in range(tokens)]
    if spec.eviction_delay is not None:
        first = tokens - spec.always_kept(tokens)
        states[first:] = [WAITING if state == KEPT else state for state in states[first:]]
    elif spec.merges_tokens:
        start = 0
        for newest in sorted(held):
            oldest = start if spec.merge_window is None else max(start, newest + 1 - spec.merge_window)
            states[oldest:newest] = MERGED * (newest - oldest)
            start = newest + 1
    return "".join(states)


def _is_lossy(layout: KVLayout) -> bool:
    return any(layout.time_of(owner).lossy for owner in layout.owners)


@torch.no_grad()
def _read(model: FoldForCausalLM, ids_T: Tensor, layout: KVLayout, report: Report) -> dict[str, Any]:
    """A row, but for its heads, and `positions`: those held at the end by each (owner, head)."""
    about = method_about(layout)
    growth: dict[str, list[float]] = {name: [0] for name in ("tokens", *_SPREAD)}
    weights = entry_bytes(layout, model.dtype.itemsize, model.device)
    with folded_cache(model, layout, 1) as cache:
        for seen in _looks(model, cache, ids_T.to(model.device)[None], layout, f"reading, {about['method']}", report):
            counts = cache.kept_tokens[:, 0]
            counts = counts[counts >= 0].double()
            found = torch.quantile(counts, torch.tensor(_QUARTILES).to(counts)).tolist()
            for name, value in zip(growth, (seen, counts.mean().item(), *found), strict=True):
                growth[name].append(value)
        kept = [[count for count in line if count >= 0] for line in cache.kept_tokens[:, 0].tolist()]
        share = kept_shares(cache, weights).item()
        positions = {
            (owner, head): held
            for owner, rows in zip(layout.owners, cache.kept_positions, strict=True)
            for head, held in enumerate(rows[0])
        }
    return {
        **about, "seen_tokens": len(ids_T), "owners": list(layout.owners), "kept": kept, "compression": 1 / share,
        "over_time": growth, "positions": positions,
    }  # fmt: skip


_SPREAD, _QUARTILES = ("mean", "least", "lower", "median", "upper", "most"), (0, 0.25, 0.5, 0.75, 1)
"""Of the tokens kept, over all heads: besides the mean the five quartiles."""
