"""`kvfold eval`: parse, call, print. What it measures lives in eval/."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvfold.cli_model import (
    SAMPLE,
    Adapter,
    Bits,
    Device,
    Dtype,
    Gates,
    Json,
    Model,
    Out,
    Times,
    load_model,
    model_name,
)
from kvfold.console import check_out, clear_errors, hand_over, progress, say
from kvfold.errors import UserError

if TYPE_CHECKING:
    from kvfold.eval.beside import Beside

Text = Annotated[
    list[str] | None,
    typer.Option(
        help="A text, .jsonl or .gz file; given several times: all. Default: a novel, unless there are tasks."
    ),
]
Windows = Annotated[int, typer.Option(help="Windows of each text, evenly spaced.")]
Context = Annotated[int, typer.Option(help="Tokens of a window.")]
Batch = Annotated[int, typer.Option(help="Windows, or requests of tasks, read side by side.")]
Chunk = Annotated[int | None, typer.Option(help="Tokens a call, where the method doesn't depend on it.")]
Passkey = Annotated[bool, typer.Option("--passkey", help="Also hide keys in filler text, and ask for them.")]
PasskeyTries = Annotated[int, typer.Option(min=1, help="Keys at each depth.")]
PasskeyLengths = Annotated[
    list[int] | None,
    typer.Option("--passkey-length", help="Tokens of that filler text; given several times: all. Default: --context."),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        help="Tasks of lm-evaluation-harness, or .jsonl files of questions, with commas or given several times."
    ),
]
TaskFolder = Annotated[Path | None, typer.Option(help="A folder with more tasks, as lm-eval's YAML files.")]
TaskLengths = Annotated[
    list[int] | None,
    typer.Option("--task-length", help="Tokens of the prompts of synthetic tasks (RULER); given several times: all."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Questions of a task, its first. Default: all.")]
Besides = Annotated[
    list[str] | None,
    typer.Option(help="A row beside: an adapter of this model, another MODEL of its vocabulary, or MODEL,ADAPTER."),
]
Peers = Annotated[
    str, typer.Option(help="transformers: its own model, scored by lm-eval's hf, beside ours in tasks; or none.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure again what was measured before.")]


def add_eval(app: typer.Typer) -> None:
    """Put the command among the others."""
    example = "kvfold eval my-model --text notes.txt --time h2o:128+128 --time tova:256 --out results/notes.json"
    app.command("eval", epilog=f"Example: `{example}`")(evaluate)


@clear_errors
def evaluate(
    model: Model,
    text: Text = None,
    time: Times = None,
    windows: Windows = 32,
    context: Context = 1024,
    batch: Batch = 32,
    chunk: Chunk = None,
    passkey: Passkey = False,
    passkey_tries: PasskeyTries = 4,
    passkey_length: PasskeyLengths = None,
    tasks: Tasks = None,
    task_folder: TaskFolder = None,
    task_length: TaskLengths = None,
    limit: Limit = None,
    beside: Besides = None,
    peers: Peers = "none",
    fresh: Fresh = False,
    out: Out = None,
    bits: Bits = None,
    adapter: Adapter = None,
    gates: Gates = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Perplexity of text read through the cache, passkeys and tasks, under any methods, beside the unfolded model.
    Goes on where it stopped.
    """
    from kvfold.eval.cells import Cells
    from kvfold.eval.protocol import Protocol

    check_out(out)
    protocol = Protocol(windows=windows, context_tokens=context, batch=batch, call_tokens=chunk)
    names = [name.strip() for some in tasks or [] for name in some.split(",") if name.strip()]
    if tasks and not names:
        raise UserError(f"--tasks '{','.join(tasks)}': it names no task: write some, with commas between them")
    peer = _peer(peers, model, adapter)
    of_tasks = {"task-folder": task_folder, "task-length": task_length, "limit": limit, "peers": peer}
    _check_asked(names, passkey, passkey_length, of_tasks)
    asked = _Asked(
        methods=tuple(dict.fromkeys(time or ())), texts=tuple(text or ([] if names else [SAMPLE])), protocol=protocol,
        keys={"lengths": passkey_length or (context,), "tries": passkey_tries} if passkey else None, tasks=names,
        task_settings={"folder": task_folder, "lengths": task_length or (), "limit": limit, "rows": batch},
        peer=peer, beside=_beside(beside or [], model, dtype, device), cells=Cells(_cells(), fresh=fresh),
    )  # fmt: skip
    weights, tokenizer = load_model(model, None, bits, adapter, dtype, device, gates, time or ())
    _note_changed_base(adapter)
    kind, result, tables = _measure(weights, tokenizer, model_name(model), asked)
    hand_over(kind, result, tables, out=out, as_json=as_json)


def _peer(name: str, model: str, adapter: str | None) -> str | None:
    """What the other side of a comparison loads."""
    if name == "transformers" and adapter is not None:
        raise UserError(
            f"--peers with --adapter {adapter}: transformers would score the base alone: give it with --beside"
        )
    if name not in ("transformers", "none"):
        raise UserError(f"--peers '{name}': tasks are scored beside transformers or alone: write transformers or none")
    return model if name == "transformers" else None


def _note_changed_base(adapter: str | None) -> None:
    if adapter is None:
        return
    from kvfold.models.adapters import read_adapter

    if read_adapter(adapter)[0].lora is not None:
        say(
            f"note: {adapter} changes the model's weights, and rows are compared with the changed ones unfolded: --beside "
            f"{adapter} compares with the base"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """What is to be measured."""

    methods: tuple[str, ...]
    texts: tuple[str | Path, ...]
    protocol: Any
    keys: Mapping[str, Any] | None
    tasks: Sequence[str]
    task_settings: Mapping[str, Any]
    peer: str | None
    """What transformers is to load and lm-eval's hf to score."""
    beside: Sequence["Beside"]
    cells: Any
    """`eval.cells.Cells`."""


def _check_asked(
    names: Sequence[str], passkey: bool, passkey_length: list[int] | None, of_tasks: Mapping[str, Any]
) -> None:
    """Refuse options that nothing would heed, and tasks that can't be found, before anything large is loaded."""
    if passkey_length and not passkey:
        raise UserError("--passkey-length without --passkey: no key would be hidden: add --passkey")
    if names:
        from kvfold.eval.tasks import check_tasks

        check_tasks(names, of_tasks["task-folder"])
    else:
        for option, value in of_tasks.items():
            if value is not None and value != []:
                raise UserError(f"--{option} without --tasks: no task would be scored: name some")


def _measure(
    model: Any, tokenizer: Any, name: str, asked: _Asked
) -> tuple[str, dict[str, Any], list[Callable]]:  # fmt: skip
    """The kind of the result, the result, and the tables that show it. Everything is checked before anything is measured."""
    from kvfold.bench.peers import load_theirs
    from kvfold.eval.cells import model_about, model_key
    from kvfold.eval.passkey import check_lengths, measure_passkey, measure_passkey_beside
    from kvfold.eval.perplexity import measure_quality
    from kvfold.eval.tasks import measure_tasks, measure_tasks_beside
    from kvfold.report.tables import passkey_table, quality_table, tasks_table

    methods = asked.methods or (model.config.layout.time_text(),)
    if asked.keys is not None:
        check_lengths(model, tokenizer, asked.keys["lengths"])
    tables = [quality_table] if asked.texts else []
    with progress() as report:
        settings = {"cells": asked.cells, "report": report}
        named = settings | {"name": name}
        if asked.texts:
            result = measure_quality(
                model, tokenizer, asked.texts, methods, beside=asked.beside, protocol=asked.protocol, **named
            )
        else:
            about = {"limit": asked.task_settings["limit"], "batch": asked.protocol.batch}
            result = {"protocol": about, **model_about(model, model_key(model, name)), "rows": []}
        if asked.keys is not None:
            found = measure_passkey(model, tokenizer, methods, **asked.keys, **named)
            result["passkey"] = found + measure_passkey_beside(asked.beside, model, tokenizer, **asked.keys, **settings)
            tables.append(passkey_table)
        if asked.tasks:
            settings |= asked.task_settings
            theirs = (
                None if asked.peer is None else partial(load_theirs, asked.peer, dtype=model.dtype, device=model.device)
            )
            found = measure_tasks(model, tokenizer, asked.tasks, methods, name=name, peer=theirs, **settings)
            found += measure_tasks_beside(asked.beside, model, tokenizer, asked.tasks, **settings)
            result["tasks" if asked.texts else "rows"] = found
            tables.append(tasks_table)
    return "quality" if asked.texts else "tasks", result, tables


def _beside(texts: list[str], source: str, dtype: str | None, device: str | None) -> list["Beside"]:
    """Models to be opened later; what is no folder of either kind is refused now."""
    from kvfold.eval.beside import Beside, check_labels
    from kvfold.models.adapters import is_adapter, read_adapter
    from kvfold.models.load import load, load_config

    def one(text: str) -> Beside:
        base, comma, last = text.rpartition(",")
        if not is_adapter(last):
            tokens = load_config(text).trained_tokens
            return Beside(
                label=model_name(text), open=lambda: load(text, dtype=dtype, device=device), trained_tokens=tokens
            )
        tokens = read_adapter(last)[0].trained_tokens
        if comma and tokens is not None:
            tokens += load_config(base).trained_tokens or 0
        elif comma:
            load_config(base)  # whether it is there at all
        return Beside(
            label=model_name(last), open=lambda: load(base or source, adapter=last, dtype=dtype, device=device),
            trained_tokens=tokens,
        )  # fmt: skip

    others = [one(text) for text in texts]
    check_labels(others)
    return others


def _cells() -> Path:
    """Where finished measurements wait to be used again."""
    from kvfold.ops.native import cache_folder

    # A folder that was named is made when something is written there, not by a command that is refused.
    named = os.environ.get("KVFOLD_CACHE")
    return (Path(named) if named else cache_folder()) / "cells"
