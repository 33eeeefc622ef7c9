"""`kvfold plan`: what a cache costs. The planner is layout/planner.py."""

from typing import Annotated

from typer import Argument, Option

from kvfold.cli.options import LAYERS, METHODS, Bits, Heads, Json, Output
from kvfold.errors import UserError


def plan(
    model: Annotated[str, Argument(metavar="MODEL", help="A folder, a config.json, a bundled name or a hub name.")],
    layers: Annotated[str | None, Option(help=LAYERS)] = None,
    heads: Heads = None,
    time: Annotated[str | None, Option(help=f"{METHODS} (the most they may hold).")] = None,
    compression: Annotated[
        float | None, Option(help="What the gates of dmc or dms reach, delay included. Default: they never fire.")
    ] = None,
    bits: Bits = None,
    memory: Annotated[
        str | None, Option(help="The device's, e.g. 80GB or 16GiB: adds what fits beside the weights.")
    ] = None,
    kv_memory: Annotated[str | None, Option(help="What the cache alone may take: adds what fits.")] = None,
    context: Annotated[str, Option(help="Tokens of a row, e.g. 4096 or 32k.")] = "4k",
    batch: Annotated[int, Option(help="Rows.")] = 1,
    as_json: Json = False,
) -> None:
    """What the cache of a model costs, and what each axis saves, alone and together. Needs no weights.

    Example: `kvfold plan llama-3.1-8b --layers cla2 --time h2o:512+512 --memory 24GB --context 32k --batch 4`
    """
    from kvfold.layout.planner import parse_count, plan_rows
    from kvfold.report.sheets import plan_table

    tokens = parse_count(context)
    memory_bytes, fits_in = _memory_of_cache(model, memory, kv_memory)
    rows = plan_rows(
        model, context_tokens=tokens, rows=batch, memory_bytes=memory_bytes,
        time=time, bits=bits, layers=layers, heads=heads, compression=compression,
    )  # fmt: skip
    shown = [
        {
            "name": row.name, "bytes_per_token": row.bytes_per_token, "bytes": row.context_bytes, "max_rows": row.max_rows,
            "max_context_tokens": row.max_context_tokens, "compression": row.compression,
            "layers": row.layout.layers_text(), "time": row.layout.time_text(), "bits": row.layout.bits_text(),
        }
        for row in rows
    ]  # fmt: skip
    result = {"model": {"name": model}, "context_tokens": tokens, "batch": batch, "rows": shown}
    if compression is not None:
        result["learned_compression"] = compression
    heading = f"{model}: {batch:,} row{'s' * (batch > 1)} of {tokens:,} tokens{fits_in}"
    if compression is None and any(spec.trained for row in rows for spec in row.layout.time):
        heading += "; where gates decide, the most it may hold: --compression says what they reach"
    Output(as_json=as_json).hand_over("plan", result, lambda _: heading, plan_table)


def _memory_of_cache(model: str, memory: str | None, kv_memory: str | None) -> tuple[int | None, str]:
    """Bytes that the cache may take, and how a heading says so. Of a device's memory the weights are subtracted."""
    from kvfold.layout.planner import parse_size, weight_bytes
    from kvfold.report.numbers import size

    if memory is not None and kv_memory is not None:
        raise UserError("--memory and --kv-memory: one is the device's, the other the cache's alone: give one of them")
    if kv_memory is not None:
        return parse_size(kv_memory), f" in {kv_memory} of cache"
    if memory is None:
        return None, ""
    whole, weights = parse_size(memory), weight_bytes(model)
    if weights is None:
        raise UserError(f"--memory {memory}: {model}'s config does not tell what its weights weigh: give --kv-memory")
    if weights >= whole:
        raise UserError(f"--memory {memory}: the weights of {model} take {size(weights)}: name a larger device")
    return whole - weights, f" in {memory} less {size(weights)} of weights"
