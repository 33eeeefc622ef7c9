"""`kvfold eval`: parse, call, print. What it measures lives in eval/."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvfold.cli_options import Adapter, Bits, Device, Dtype, Json, Model, Out, Times
from kvfold.console import check_out, clear_errors, hand_over, load_model, name_of, progress

_SAMPLE = Path(__file__).with_name("sample") / "persuasion.txt"

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
    fresh: Fresh = False,
    out: Out = None,
    bits: Bits = None,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Perplexity of text read through the cache, passkeys and tasks, under any methods, beside the unfolded model.
    Goes on where it stopped.
    """
    from kvfold.eval.protocol import Protocol

    check_out(out)
    protocol = Protocol(windows=windows, context_tokens=context, batch=batch, call_tokens=chunk)
    names = [name.strip() for some in tasks or [] for name in some.split(",") if name.strip()]
    if tasks and not names:
        raise ValueError(f"--tasks '{','.join(tasks)}': it names no task: write some, with commas between them")
    _check_asked(
        names, passkey, passkey_length, {"task-folder": task_folder, "task-length": task_length, "limit": limit}
    )
    weights, tokenizer = load_model(model, None, bits, adapter, dtype, device)
    methods = list(dict.fromkeys(time or [weights.config.layout.time_text()]))
    texts = text or ([] if names else [_SAMPLE])
    asked = {"folder": task_folder, "lengths": task_length or (), "limit": limit}
    keys = {"lengths": passkey_length or (context,), "tries": passkey_tries} if passkey else None
    kind, result, tables = _measure(
        weights, tokenizer, name_of(model), methods, texts, protocol, keys, (names, asked), None if fresh else _cells()
    )
    hand_over(kind, result, tables, out=out, as_json=as_json)


def _check_asked(
    names: Sequence[str], passkey: bool, passkey_length: list[int] | None, of_tasks: Mapping[str, Any]
) -> None:
    """Refuse options that nothing would heed, and tasks that can't be found, before anything large is loaded."""
    if passkey_length and not passkey:
        raise ValueError("--passkey-length without --passkey: no key would be hidden: add --passkey")
    if names:
        from kvfold.eval.tasks import check_tasks

        check_tasks(names, of_tasks["task-folder"])
    else:
        for option, value in of_tasks.items():
            if value is not None and value != []:
                raise ValueError(f"--{option} without --tasks: no task would be scored: name some")


def _measure(
    model: Any, tokenizer: Any, name: str, methods: Sequence[str], texts: Sequence[str | Path], protocol: Any,
    keys: Mapping[str, Any] | None, tasks: tuple[Sequence[str], Mapping[str, Any]], cells: Path | None,
) -> tuple[str, dict[str, Any], list[Callable]]:  # fmt: skip
    """The kind of the result, the result, and the tables that show it. Everything is checked before anything is measured."""
    from kvfold.eval.cells import model_about, model_key
    from kvfold.eval.passkey import check_lengths, measure_passkey
    from kvfold.eval.perplexity import measure_quality
    from kvfold.eval.tasks import measure_tasks
    from kvfold.report.tables import passkey_table, quality_table, tasks_table

    names, asked = tasks
    if keys is not None:
        check_lengths(model, tokenizer, keys["lengths"])
    tables = [quality_table] if texts else []
    with progress() as report:
        settings = {"name": name, "cells": cells, "report": report}
        if texts:
            result = measure_quality(model, tokenizer, texts, methods, protocol=protocol, **settings)
        else:
            about = {"limit": asked["limit"], "batch": protocol.batch}
            result = {"protocol": about, **model_about(model, model_key(model, name)), "rows": []}
        if keys is not None:
            result["passkey"] = measure_passkey(model, tokenizer, methods, **keys, **settings)
            tables.append(passkey_table)
        if names:
            found = measure_tasks(model, tokenizer, names, methods, rows=protocol.batch, **asked, **settings)
            result["tasks" if texts else "rows"] = found
            tables.append(tasks_table)
    return "quality" if texts else "tasks", result, tables


def _cells() -> Path:
    """Where finished measurements wait to be used again."""
    return Path(os.environ.get("KVFOLD_CACHE") or Path.home() / ".cache" / "kvfold") / "cells"
