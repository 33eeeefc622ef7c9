"""How fast prompts are read into a cache under each method, in turns within one run, against what their FLOP allow.

Letters: B rows, T tokens.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvfold.bench.decode import spread
from kvfold.bench.roofline import attention_flop, linear_flop, measure_machine
from kvfold.errors import UserError
from kvfold.eval.progress import Report, silent
from kvfold.eval.reading import folded_cache, method_about, method_layouts
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.decoder import FoldForCausalLM


def bench_prefill(
    model: FoldForCausalLM, ids_BT: Tensor, *, name: str, methods: Sequence[str] = ("full",),
    call_tokens: Sequence[int] = (0,), repeats: int = 2, report: Report = silent,
) -> dict[str, Any]:  # fmt: skip
    """A result of kind `prefill`: a row for each size of a call and method, with the ratio to the first method.

    `call_tokens`: tokens a row of one call, 0 = all at once. `allowed_tokens_per_second` is what the FLOP of full attention
    allow at the peak of torch's products, measured beside: `share_of_allowed` = speed / that.
    """
    tokens = ids_BT.shape[1]
    if tokens > model.config.max_position_embeddings:
        raise UserError(
            f"{tokens} tokens: the model reads {model.config.max_position_embeddings} at most: ask for fewer"
        )
    if repeats < 1:
        raise UserError(f"{repeats} repeats: 1 or more are measured: ask for more")
    layouts, rows = method_layouts(model, methods), []
    with torch.inference_mode():  # compiles, and touches memory for the first time
        model.model(ids_BT[:1, : min(tokens, 64)].to(model.device), use_cache=False)
    peak = measure_machine(model.dtype)
    for size in call_tokens:
        runs: list[list[tuple[float, float]]] = [[] for _ in layouts]
        total = len(layouts) * repeats
        for number in range(total):
            turn, place = divmod(number, len(layouts))
            place = place if turn % 2 == 0 else len(layouts) - 1 - place
            report(f"calls of {size or tokens} tokens", number, total)
            runs[place].append(_read(model, layouts[place], ids_BT, size or tokens))
        report(f"calls of {size or tokens} tokens", total, total)
        after = measure_machine(model.dtype)
        peak = max(peak, after, key=lambda one: one.flops)
        rows += [
            _row(layout, mine, runs[0], ids_BT, size or tokens) for layout, mine in zip(layouts, runs, strict=True)
        ]
    allowed = ids_BT.numel() / (_flop(model, *ids_BT.shape) / peak.flops)
    for row in rows:
        row["allowed_tokens_per_second"] = allowed
        row["share_of_allowed"] = row["tokens_per_second"]["median"] / allowed
    return {
        "model": {"name": name, "parameters": model.num_parameters()},
        "environment": {
            "device": model.device.type, "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(), **peak.about(),
        },
        "repeats": repeats, "rows": rows,
    }  # fmt: skip


def _read(model: FoldForCausalLM, layout: KVLayout, ids_BT: Tensor, call_tokens: int) -> tuple[float, float]:
    """Seconds, and the mean of tokens over entries at the end."""
    with folded_cache(model, layout, ids_BT.shape[0]) as cache:
        start = time.perf_counter()
        for part in ids_BT.to(model.device).split(call_tokens, dim=1):
            logits = model(part, past_key_values=cache, logits_to_keep=1).logits
        logits.sum().item()  # a GPU is done only when somebody reads what it made
        seconds = time.perf_counter() - start
        kept = cache.kept_tokens
        return seconds, ids_BT.shape[1] / kept[kept >= 0].double().mean().item()


def _row(
    layout: KVLayout,
    mine: list[tuple[float, float]],
    first: list[tuple[float, float]],
    ids_BT: Tensor,
    call_tokens: int,
) -> dict[str, Any]:
    rows, tokens = ids_BT.shape
    row = {
        "batch": rows, "prompt_tokens": tokens, "call_tokens": call_tokens, **method_about(layout),
        "bits": layout.bits_text(), "compression": mine[-1][1],
        "tokens_per_second": spread([rows * tokens / seconds for seconds, _ in mine]),
    }  # fmt: skip
    if mine is not first:
        row["over_first"] = spread([other / own for (own, _), (other, _) in zip(mine, first, strict=True)])
    return row


def _flop(model: FoldForCausalLM, rows: int, tokens: int) -> float:
    """Of full attention; the logits of the last token alone are computed."""
    pairs = rows * tokens * (tokens + 1) / 2
    return linear_flop(model, tokens=rows * tokens, logits=rows) + attention_flop(model, pairs=pairs)
