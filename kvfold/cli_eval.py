"""`kvfold eval`: parse, call, print. What it does lives in the room `eval`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvfold.cli_model import Adapter, Bits, Device, Dtype, Json, Model, Out, Times, load_model, model_name
from kvfold.console import check_out, clear_errors, hand_over, progress

if TYPE_CHECKING:
    from kvfold.eval.beside import Beside

Texts = Annotated[
    list[str] | None, typer.Option(help="A text, .jsonl or .gz file; given several times: all. Default: a novel.")
]
Besides = Annotated[
    list[str] | None,
    typer.Option(help="A row beside: an adapter of this model, another MODEL of its vocabulary, or MODEL,ADAPTER."),
]


def add_eval(app: typer.Typer) -> None:
    """Put the command among the others."""
    example = (
        "Example: `kvfold eval my-model --text notes.txt --time h2o:128+128 --time tova:256 --out results/notes.json`"
    )
    app.command("eval", epilog=example)(evaluate)


@clear_errors
def evaluate(
    model: Model,
    text: Texts = None,
    time: Times = None,
    windows: Annotated[int, typer.Option(help="Windows of each text, evenly spaced.")] = 32,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    batch: Annotated[int, typer.Option(help="Windows read side by side.")] = 32,
    chunk: Annotated[int | None, typer.Option(help="Tokens a call, where the method doesn't depend on it.")] = None,
    passkey: Annotated[
        bool, typer.Option("--passkey", help="Also hide keys in filler text of that length, and ask for them.")
    ] = False,
    passkey_tries: Annotated[int, typer.Option(min=1, help="Keys at each depth.")] = 4,
    beside: Besides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what was measured before.")] = False,
    out: Out = None,
    bits: Bits = None,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Perplexity of text read through the cache, under any methods, beside the unfolded model. Goes on where it stopped."""
    from kvfold.eval.passkey import measure_passkey, measure_passkey_beside, passkey_prompt
    from kvfold.eval.perplexity import measure_quality
    from kvfold.eval.protocol import Protocol
    from kvfold.report.tables import passkey_table, quality_table

    sample = Path(__file__).with_name("sample") / "persuasion.txt"
    check_out(out)
    protocol = Protocol(windows=windows, context_tokens=context, batch=batch, call_tokens=chunk)
    others = _beside(beside or [], model, dtype, device)
    weights, tokenizer = load_model(model, None, bits, adapter, dtype, device)
    if passkey:
        passkey_prompt(tokenizer, "12345", context, 0.5)  # refuses a context that is too short, before all the rest
    with progress() as report:
        result = measure_quality(
            weights, tokenizer, text or [sample], time or [weights.config.layout.time_text()], name=model_name(model),
            beside=others, protocol=protocol, cells=_cells(fresh), report=report,
        )  # fmt: skip
        if passkey:
            methods = list(dict.fromkeys(row["method"] for row in result["rows"] if "model" not in row))
            asked = {"lengths": (context,), "tries": passkey_tries, "cells": _cells(fresh), "report": report}
            result["passkey"] = [
                *measure_passkey(weights, tokenizer, methods, name=model_name(model), **asked),
                *measure_passkey_beside(others, weights, tokenizer, **asked),
            ]
    hand_over("quality", result, [quality_table, *([passkey_table] if passkey else [])], out=out, as_json=as_json)


def _beside(texts: list[str], source: str, dtype: str | None, device: str | None) -> list["Beside"]:
    """Models to be opened later; what is no folder of either kind is refused now."""
    from kvfold.eval.beside import Beside, check_labels
    from kvfold.models.adapters import is_adapter, read_adapter
    from kvfold.models.load import load, load_config

    def one(text: str) -> Beside:
        base, comma, last = text.rpartition(",")
        if not is_adapter(last):
            load_config(text)
            return Beside(label=model_name(text), open=lambda: load(text, dtype=dtype, device=device))
        read_adapter(last)
        if comma:
            load_config(base)
        return Beside(
            label=model_name(last), open=lambda: load(base or source, adapter=last, dtype=dtype, device=device)
        )

    others = [one(text) for text in texts]
    check_labels(others)
    return others


def _cells(fresh: bool) -> Path | None:
    """Where finished measurements wait to be used again; None to forget them."""
    return None if fresh else Path(os.environ.get("KVFOLD_CACHE") or Path.home() / ".cache" / "kvfold") / "cells"
