"""`kvfold convert`: a checkpoint with fewer KV heads or shared layers. It is made in convert/."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from kvfold.cli.console import progress, say, show_json, waiting
from kvfold.cli.options import LAYERS, Bits, Device, Heads, Json, NewFolder, Source, quiet_transformers
from kvfold.data import SAMPLE
from kvfold.errors import UserError
from kvfold.layout.planner import parse_count

if TYPE_CHECKING:
    from kvfold.convert.conversion import Conversion
    from kvfold.models.config import FoldConfig

_WINDOW_TOKENS = 1024
"""Tokens of a calibration window, where the model reads as many."""


def convert(
    source: Source,
    out: NewFolder,
    layers: Annotated[str | None, Option(help=f"{LAYERS} | best:N, measured.")] = None,
    heads: Heads = None,
    init: Annotated[str, Option(help="mean | drop | fitted: what shared layers start from.")] = "mean",
    calibration: Annotated[
        list[Path] | None, Option(help="Text to fit on; given several times: a share of each. Default: a novel.")
    ] = None,
    tokens: Annotated[str, Option(help="Tokens of calibration text, e.g. 24k.")] = "24k",
    pair_heads: Annotated[
        bool, Option("--pair-heads", help="Merge the heads most alike, instead of neighbours.")
    ] = False,
    target: Annotated[
        str,
        Option("--for", help="kvfold | vllm, where its plugin can serve it | transformers, where only heads changed."),
    ] = "kvfold",
    time: Annotated[str | None, Option(help="What the new checkpoint keeps along time. Default: the source's.")] = None,
    bits: Bits = None,
    dtype: Annotated[str | None, Option(help="float32 | bfloat16 | float16. Default: the source's own.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
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
        _keep_costs(out)
    _tell(_summary(before, new_config(before, wanted), out, init), as_json)


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


def _keep_costs(out: Path) -> None:
    """What was measured of layers goes with the model that came of it."""
    folder = _costs_folder(out)
    for file in folder.iterdir():
        shutil.move(file, Path(os.path.expanduser(out)) / file.name)
    folder.rmdir()


def _calibration(source: str, files: list[Path], tokens: int, config: "FoldConfig") -> Any:
    from kvfold.convert.conversion import calibration_windows
    from kvfold.models.load import load_tokenizer

    context = min(_WINDOW_TOKENS, config.max_position_embeddings)
    with waiting("reading the calibration text"):
        return calibration_windows(load_tokenizer(source), files, tokens=tokens, context_tokens=context)


def _tell(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_json({"kind": "convert", **result})
        return
    for name, (old, new) in result["changed"].items():
        say(f"{name}: {old} -> {new}")
    typer.echo(result["out"])


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
