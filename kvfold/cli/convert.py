"""`kvfold plan`: what a cache costs, before anything is made; the planner is layout/planner.py. `kvfold convert`: a checkpoint
with fewer KV heads or shared layers; it is made in convert/.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from kvfold.cli.options import (
    LAYERS,
    METHODS,
    Bits,
    Device,
    Heads,
    Json,
    NewFolder,
    Output,
    Source,
    progress,
    quiet_transformers,
    say,
    tell,
    waiting,
)
from kvfold.data import SAMPLE
from kvfold.errors import UserError
from kvfold.layout.planner import parse_count, parse_size

if TYPE_CHECKING:
    from kvfold.convert.conversion import Conversion
    from kvfold.models.config import FoldConfig

_WINDOW_TOKENS = 1024
"""Tokens of a calibration window, where the model reads as many."""


def plan(
    model: Annotated[str, Argument(metavar="MODEL", help="A folder, a config.json, a bundled name or a hub name.")],
    layers: Annotated[str | None, Option(help=LAYERS)] = None,
    heads: Heads = None,
    time: Annotated[str | None, Option(help=f"{METHODS} (the most they may hold).")] = None,
    compression: Annotated[
        float | None, Option(help="What dmc's or dms's gates reach, delay included. Default: none fires.")
    ] = None,
    bits: Bits = None,
    memory: Annotated[str | None, Option(help="The device's, e.g. 80GB or 16GiB: adds what fits beside the weights.")] = None,
    kv_memory: Annotated[str | None, Option(help="What the cache alone may take: adds what fits.")] = None,
    context: Annotated[str, Option(help="Tokens of a row, e.g. 4096 or 32k.")] = "4k",
    batch: Annotated[int, Option(help="Rows.")] = 1,
    as_json: Json = False,
) -> None:  # fmt: skip
    """What the cache of a model costs, and what each axis saves, alone and together. Needs no weights.

    Example: `kvfold plan llama-3.1-8b --layers cla2 --time h2o:512+512 --memory 24GB --context 32k --batch 4`
    """
    from kvfold.layout.planner import plan_rows
    from kvfold.report.sheets import known_table

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
    Output(as_json=as_json).hand_over("plan", result, lambda _: heading, known_table("plan"))


def _memory_of_cache(model: str, memory: str | None, kv_memory: str | None) -> tuple[int | None, str]:
    """Bytes that the cache may take, and how a heading says so. Of a device's memory the weights are subtracted."""
    from kvfold.layout.planner import weight_bytes
    from kvfold.report.results import size

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


def convert(
    source: Source,
    out: NewFolder,
    layers: Annotated[str | None, Option(help=f"{LAYERS} | best:N, measured.")] = None,
    heads: Heads = None,
    init: Annotated[str, Option(help="mean | drop | fitted: what shared layers start from.")] = "mean",
    calibration: Annotated[
        list[Path] | None, Option(help="Text to fit on; several times: a share of each. Default: a novel.")
    ] = None,
    tokens: Annotated[str, Option(help="Tokens of calibration text, e.g. 24k.")] = "24k",
    pair_heads: Annotated[bool, Option("--pair-heads", help="Merge the heads most alike, instead of neighbours.")] = False,
    target: Annotated[
        str,
        Option("--for", help="kvfold | vllm, where its plugin can serve it | transformers, where only heads changed."),
    ] = "kvfold",
    time: Annotated[str | None, Option(help="What the new checkpoint keeps along time. Default: the source's.")] = None,
    bits: Bits = None,
    dtype: Annotated[str | None, Option(help="float32 | bfloat16 | float16. Default: the source's own.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """A model with fewer KV heads or with shared layers, as a checkpoint of its own.

    Example: `kvfold convert my-model my-model-cla2 --layers cla2 --init fitted`
    """
    from kvfold.convert.conversion import Conversion, new_config
    from kvfold.convert.conversion import convert as run
    from kvfold.layout.patterns import best_of
    from kvfold.models.load import check_folder, load_config

    quiet_transformers()
    wanted = Conversion(
        layers=layers, heads=heads, init=init, pair_heads=pair_heads, time=time, bits=bits, target=target
    )
    check_folder(out)
    before, owners = load_config(source), best_of(layers)
    _check(before, wanted, owners)
    ids = None
    if init == "fitted" or owners is not None:
        ids = _calibration(source, calibration or [SAMPLE], parse_count(tokens), before)
    elif calibration:
        raise UserError(
            f"calibration text with init '{init}': only 'fitted' and 'best:N' read any: use --init fitted or leave it out"
        )
    with progress() as report:
        if owners is not None:
            wanted = _with_choice(source, out, wanted, owners, ids, device, report)
        run(source, out, wanted, config=before, calibration_WT=ids, dtype=dtype, device=device, report=report)
    if owners is not None:
        # What was measured of layers goes with the model that came of it.
        for file in _costs_folder(out).iterdir():
            shutil.move(file, Path(os.path.expanduser(out)) / file.name)
        _costs_folder(out).rmdir()
    summary = _summary(before, new_config(before, wanted), out, init)
    changed = [f"{name}: {old} -> {new}" for name, (old, new) in summary["changed"].items()]
    tell({"kind": "convert", **summary}, as_json, *changed, out=summary["out"])


def _check(before: "FoldConfig", wanted: "Conversion", owners: int | None) -> None:
    """Raises `UserError` for what can't be done, before anything takes long."""
    from kvfold.convert.chosen_layers import check_choice
    from kvfold.convert.conversion import check_target, new_config

    if owners is None:
        check_target(new_config(before, wanted), wanted.target)
        return
    if wanted.target == "transformers":
        raise UserError(
            f"layers '{wanted.layers}' for transformers: it has no words for shared layers: leave one of the two out"
        )
    check_target(new_config(before, replace(wanted, layers=None)), wanted.target)
    check_choice(before, owners)


def _with_choice(
    source: str, out: Path, wanted: "Conversion", owners: int, ids: Any, device: str | None, report: Any
) -> "Conversion":
    """With the layers that may share at the least cost; what was measured waits beside `out` until that is written."""
    from kvfold.convert.chosen_layers import chosen_layers
    from kvfold.models.load import load

    model = load(source, dtype="float32", device=device)
    return replace(wanted, layers=chosen_layers(model, ids, owners, folder=_costs_folder(out), report=report))


def _costs_folder(out: Path) -> Path:
    out = Path(os.path.expanduser(out))
    return out.with_name(f".{out.name}.layers")


def _calibration(source: str, files: list[Path], tokens: int, config: "FoldConfig") -> Any:
    from kvfold.convert.conversion import calibration_windows
    from kvfold.models.load import load_tokenizer

    context = min(_WINDOW_TOKENS, config.max_position_embeddings)
    with waiting("reading the calibration text"):
        return calibration_windows(load_tokenizer(source), files, tokens=tokens, context_tokens=context)


def _summary(before: "FoldConfig", after: "FoldConfig", out: Path, init: str) -> dict[str, Any]:
    """What changed, old and new; with a note where little of the model is left."""
    from kvfold.layout.planner import plan

    old, new = before.layout, after.layout
    if init != "fitted" and len(new.owners) < len(old.owners):
        say(f"note: '{init}' leaves little of the model until it is trained on: --init fitted keeps far more")
    lines = {
        "layers": (old.layers_text(), new.layers_text()),
        "owners": (len(old.owners), len(new.owners)),
        "KV heads": (old.layers[0].num_kv_heads, new.layers[0].num_kv_heads),
        "time": (old.time_text(), new.time_text()),
        "KV bytes a token": (plan(before).bytes_per_token, plan(after).bytes_per_token),
    }
    return {"out": str(out), "changed": {name: list(pair) for name, pair in lines.items() if pair[0] != pair[1]}}
