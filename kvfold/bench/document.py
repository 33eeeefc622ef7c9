"""What a cache holds while text is read into it: its bytes and what each head kept; and of one document, how much each head
holds as it comes in and what became of every token at its end.

All of it is read off the cache: how many entries a head has, and at which positions they stand. What gates said is not asked.
Letters: B rows, T tokens, O owners, K kv heads.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvfold.cache.hf import FoldCache
from kvfold.errors import UserError
from kvfold.eval.progress import Report, silent
from kvfold.eval.reading import calls, entry_bytes, folded_cache, kept_shares, method_about, method_layouts
from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.base import Method
from kvfold.models.decoder import FoldForCausalLM

EVERY_TOKENS = 16
"""Tokens between two looks at the cache."""


def measure_held(
    model: FoldForCausalLM, ids_BT: Tensor, methods: Sequence[str], *, name: str, report: Report = silent
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A result of kind `memory` and one of kind `kept`, from reading the same rows under each method.

    `methods` are `--time` texts. Kept tokens and their ages are means over the rows.
    """
    layouts = method_layouts(model, methods)
    memory, kept = [], []
    for layout in layouts:
        about = method_about(layout)
        with folded_cache(model, layout, ids_BT.shape[0]) as cache:
            tokens, held = [0], [cache.allocated_bytes]
            for seen in looks(model, cache, ids_BT.to(model.device), layout, f"memory, {about['method']}", report):
                tokens.append(seen)
                held.append(cache.allocated_bytes)
            memory.append({**about, "tokens": tokens, "allocated_bytes": held})
            kept.append(about | _kept(cache, layout, ids_BT.shape[1]))
    about_model = {"name": name, "parameters": model.num_parameters()}
    return {"model": about_model, "batch": ids_BT.shape[0], "rows": memory}, {"model": about_model, "rows": kept}


def looks(
    model: FoldForCausalLM, cache: FoldCache, ids_BT: Tensor, layout: KVLayout, what: str, report: Report
) -> Iterator[int]:
    """Feed all tokens as the method is meant to be fed; gives the tokens seen each time the cache is to be looked at."""
    total = ids_BT.shape[1]
    for start, seen in calls(layout, total, EVERY_TOKENS):
        model.model(ids_BT[:, start:seen], past_key_values=cache, use_cache=True)
        report(what, seen, total)
        if seen % EVERY_TOKENS == 0 or seen == total:
            yield seen


def _kept(cache: FoldCache, layout: KVLayout, seen: int) -> dict[str, Any]:
    """Tokens kept by each owner and head and, of methods that drop, how old they are."""
    counts = cache.kept_tokens.double().mean(dim=1).tolist()
    data = {
        "seen_tokens": seen,
        "owners": list(layout.owners),
        "kept": [[count for count in heads if count >= 0] for heads in counts],
    }
    if not any(layout.time_of(owner).lossy for owner in layout.owners):
        return data
    ages = [[_mean_age(rows, head, seen) for head in range(len(rows[0]))] for rows in cache.kept_positions]
    return data | {"score": ages, "value_name": "mean age of the kept tokens"}


def _mean_age(positions: list[list[list[int]]], head: int, seen: int) -> float:
    """Steps since the kept tokens of one head came, mean over the rows' tokens."""
    found = [position for heads in positions for position in heads[head]]
    return seen - 1 - sum(found) / len(found)


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
    if len(ids_T) > model.config.max_position_embeddings:
        raise UserError(
            f"{len(ids_T):,} tokens: the model reads {model.config.max_position_embeddings:,} at most: ask for fewer"
        )
    check_heads(model.config.layout, heads)
    found = [_read(model, ids_T, layout, report) for layout in layouts]
    if not heads:
        first = next((one for one, layout in zip(found, layouts, strict=True) if _is_lossy(layout)), found[0])
        heads = chosen_heads(first["owners"], first["kept"])
    for row, layout in zip(found, layouts, strict=True):
        positions = row.pop("positions")
        row["heads"] = [
            {"layer": layer, "head": head, **_told(positions[(layer, head)], len(ids_T), layout.time_of(layer))}
            for layer, head in heads
        ]
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


def _told(positions: list[int], tokens: int, spec: Method) -> dict[str, Any]:
    return {"kept_tokens": len(positions), "states": token_states(positions, tokens, spec)}


@torch.no_grad()
def _read(model: FoldForCausalLM, ids_T: Tensor, layout: KVLayout, report: Report) -> dict[str, Any]:
    """A row, but for its heads, and `positions`: those held at the end by each (owner, head)."""
    about = method_about(layout)
    growth: dict[str, list[float]] = {name: [0] for name in ("tokens", *_SPREAD)}
    weights = entry_bytes(layout, model.dtype.itemsize, model.device)
    with folded_cache(model, layout, 1) as cache:
        for seen in looks(model, cache, ids_T.to(model.device)[None], layout, f"reading, {about['method']}", report):
            counts = cache.kept_tokens[:, 0]
            found = torch.quantile(counts[counts >= 0].double(), _quantiles(model.device)).tolist()
            mean = counts[counts >= 0].double().mean().item()
            for name, value in zip(growth, (seen, mean, *found), strict=True):
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


_SPREAD = ("mean", "least", "lower", "median", "upper", "most")
"""Of the tokens kept, over all heads: besides the mean the five quartiles."""


def _quantiles(device: torch.device) -> Tensor:
    return torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64, device=device)
