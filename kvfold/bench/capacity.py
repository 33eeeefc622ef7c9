"""How many rows of a context fit into a budget, found by reading them in one after the other until the cache is full.

Letters: B rows, T tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvfold.cache.allocator import CacheFull
from kvfold.eval.progress import Report, silent
from kvfold.eval.reading import method_about, method_layouts
from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import PAGE_SLOTS, layout_bytes
from kvfold.models.decoder import FoldForCausalLM


def bench_capacity(
    model: FoldForCausalLM, ids_BT: Tensor, *, name: str, kv_bytes: int, methods: Sequence[str] = ("full",),
    most_rows: int = 256, report: Report = silent,
) -> dict[str, Any]:  # fmt: skip
    """A result of kind `capacity`: a row for each method, with the rows that fit into `kv_bytes` and what was planned.

    `ids_BT`: texts of one context each, taken in turn; `most_rows` ends a search that finds no end.
    """
    rows = []
    for layout in method_layouts(model, methods):
        rows.append(_row(model, layout, ids_BT, kv_bytes, most_rows, report))
        if len(rows) > 1 and rows[0]["rows"]:
            rows[-1]["over_first"] = rows[-1]["rows"] / rows[0]["rows"]
    return {
        "model": {"name": name, "parameters": model.num_parameters()},
        "environment": {
            "device": model.device.type, "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        },
        "kv_bytes": kv_bytes, "context_tokens": ids_BT.shape[1], "rows": rows,
    }  # fmt: skip


@torch.inference_mode()
def _row(
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
