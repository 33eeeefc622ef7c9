"""What a cache holds while text is read into it: bytes after every so many tokens, and at the end what each head kept.

Letters: B rows, T tokens.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from kvfold.cache.hf import FoldCache
from kvfold.eval.folding import calls, folded_cache, method_about, method_layouts
from kvfold.eval.progress import Report, silent
from kvfold.layout.kvlayout import KVLayout
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
