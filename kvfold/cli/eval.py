"""`kvfold eval`: perplexity, passkeys and tasks, measured in eval/; `kvfold inspect`: what heads keep of one text, read in
bench/reading.py; `kvfold report`: result files to a page; and `kvfold demo`: the whole road once.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from kvfold.cli.options import (
    Loading,
    Model,
    Output,
    Text,
    Times,
    check_out,
    command_line,
    model_name,
    progress,
    quiet_transformers,
    say,
    show,
)
from kvfold.data import SAMPLE, read_text_file
from kvfold.errors import UserError

if TYPE_CHECKING:
    from kvfold.eval.cells import Beside


@dataclass(frozen=True, kw_only=True, slots=True)
class Passkeys:
    """Keys to hide in filler text, and to ask for."""

    passkey: Annotated[bool, Option("--passkey", help="Also hide keys in filler text, and ask for them.")] = False
    passkey_tries: Annotated[int, Option(min=1, help="Keys at each depth.")] = 4
    passkey_length: Annotated[
        list[int] | None, Option(help="Tokens of that filler text; given several times: all. Default: --context.")
    ] = None

    def __post_init__(self):
        if self.passkey_length and not self.passkey:
            raise UserError("--passkey-length without --passkey: no key would be hidden: add --passkey")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tasks:
    """Tasks to score. Raises `UserError` for options that nothing would heed, and for tasks that can't be found."""

    tasks: Annotated[
        list[str] | None,
        Option(
            help="Tasks of lm-evaluation-harness, or .jsonl files of questions, with commas or given several times."
        ),
    ] = None
    task_folder: Annotated[Path | None, Option(help="A folder with more tasks, as lm-eval's YAML files.")] = None
    task_length: Annotated[
        list[int] | None, Option(help="Tokens of the prompts of synthetic tasks (RULER); given several times: all.")
    ] = None
    limit: Annotated[int | None, Option(min=1, help="Questions of a task, its first. Default: all.")] = None
    peers: Annotated[
        Literal["transformers", "none"],
        Option(help="transformers: its own model, scored by lm-eval's hf, beside ours in tasks."),
    ] = "none"

    @property
    def names(self) -> list[str]:
        """The tasks one by one."""
        return [name.strip() for some in self.tasks or [] for name in some.split(",") if name.strip()]

    def __post_init__(self):
        given = {"task-folder": self.task_folder, "task-length": self.task_length, "limit": self.limit}
        if self.names:
            from kvfold.eval.tasks import check_tasks

            check_tasks(self.names, self.task_folder)
        elif self.tasks:
            raise UserError(f"--tasks '{','.join(self.tasks)}': it names no task: write some, with commas between them")
        for option, value in (given | {"peers": self.peers != "none"}).items():
            if value and not self.names:
                raise UserError(f"--{option} without --tasks: no task would be scored: name some")


Texts = Annotated[
    list[str] | None,
    Option(help="A text, .jsonl or .gz file; given several times: all. Default: a novel, unless there are tasks."),
]
_COMPARE = "A row for another model: an adapter of this one, a MODEL of its vocabulary, or MODEL,ADAPTER."
Compare = Annotated[list[str] | None, Option("--compare", "--beside", help=_COMPARE)]


def evaluate(
    model: Model,
    text: Texts = None,
    time: Times = None,
    windows: Annotated[int, Option(help="Windows of each text, evenly spaced.")] = 32,
    context: Annotated[int, Option(help="Tokens of a window.")] = 1024,
    batch: Annotated[int, Option(help="Windows, or requests of tasks, read side by side.")] = 32,
    chunk: Annotated[int | None, Option(help="Tokens a call, where the method doesn't depend on it.")] = None,
    compare: Compare = None,
    fresh: Annotated[bool, Option("--fresh", help="Measure again what was measured before.")] = False,
    *,
    passkeys: Passkeys,
    tasks: Tasks,
    loading: Loading,
    output: Output,
) -> None:
    """Perplexity of text read through the cache, passkeys and tasks, under any methods, beside the unfolded model.
    Run again, it resumes where it stopped.

    Example: `kvfold eval my-model --text notes.txt --time h2o:128+128 --time tova:256 --out results/notes.json`
    """
    from kvfold.eval.cells import Cells, load_theirs, model_about, model_key
    from kvfold.eval.passkey import check_lengths, measure_passkey
    from kvfold.eval.perplexity import measure_quality
    from kvfold.eval.reading import Protocol
    from kvfold.eval.tasks import measure_tasks
    from kvfold.report.sheets import known_table, passkey_table

    _check_adapter(loading.adapter, tasks.peers)
    protocol = Protocol(windows=windows, context_tokens=context, batch=batch, call_tokens=chunk)
    others = _compared(compare or [], model, loading)
    weights, tokenizer = loading.load(model, times=time)
    methods = list(dict.fromkeys(time or ())) or [weights.config.layout.time_text()]
    texts = text or ([] if tasks.names else [SAMPLE])
    lengths = passkeys.passkey_length or (context,)
    if passkeys.passkey:
        check_lengths(weights, tokenizer, lengths)
    with progress() as report:
        settings = {
            "name": model_name(model), "beside": others, "cells": Cells(_cells(), fresh=fresh), "report": report,
        }  # fmt: skip
        if texts:
            result = measure_quality(weights, tokenizer, texts, methods, protocol=protocol, **settings)
        else:
            about = model_about(weights, model_key(weights, settings["name"]))
            result = {"protocol": {"limit": tasks.limit, "batch": batch}, **about, "rows": []}
        if passkeys.passkey:
            keys = {"lengths": lengths, "tries": passkeys.passkey_tries}
            result["passkey"] = measure_passkey(weights, tokenizer, methods, **keys, **settings)
        if tasks.names:
            theirs = partial(load_theirs, model, dtype=weights.dtype, device=weights.device)
            settings |= {"folder": tasks.task_folder, "lengths": tasks.task_length or (), "limit": tasks.limit}
            peer = None if tasks.peers == "none" else theirs
            rows = measure_tasks(weights, tokenizer, tasks.names, methods, peer=peer, rows=batch, **settings)
            result["tasks" if texts else "rows"] = rows
    tables = {known_table("quality"): texts, passkey_table: passkeys.passkey, known_table("tasks"): tasks.names}
    output.hand_over("quality" if texts else "tasks", result, *(table for table, asked in tables.items() if asked))


def _check_adapter(adapter: str | None, peers: str) -> None:
    """Refuse a peer that would lack it; tell what rows of an adapter are compared with."""
    if adapter is None:
        return
    if peers != "none":
        raise UserError(
            f"--peers with --adapter {adapter}: transformers would score the base alone: give it with --compare"
        )
    from kvfold.models.adapters import read_adapter

    if read_adapter(adapter)[0].lora is not None:
        say(
            f"note: {adapter} changes the model's weights, and rows are compared with the changed ones unfolded: --compare "
            f"{adapter} compares with the base"
        )


def _compared(texts: Sequence[str], source: str, loading: Loading) -> list["Beside"]:
    """Models to be opened later; what is no folder of either kind is refused now."""
    from kvfold.eval.cells import Beside, check_labels
    from kvfold.models.adapters import is_adapter, read_adapter
    from kvfold.models.load import load, load_config

    where = {"dtype": loading.dtype, "device": loading.device}

    def one(text: str) -> Beside:
        base, comma, last = text.rpartition(",")
        if not is_adapter(last):
            tokens = load_config(text).trained_tokens
            return Beside(label=model_name(text), open=lambda: load(text, **where), trained_tokens=tokens)
        tokens = read_adapter(last)[0].trained_tokens
        if comma and tokens is not None:
            tokens += load_config(base).trained_tokens or 0
        elif comma:
            load_config(base)  # whether it is there at all
        name = model_name(last)
        return Beside(label=name, open=lambda: load(base or source, adapter=last, **where), trained_tokens=tokens)

    others = [one(text) for text in texts]
    check_labels(others)
    return others


def _cells() -> Path:
    """Where finished measurements wait to be used again."""
    from kvfold.ops.native import cache_folder

    # A folder that was named is made when something is written there, not by a command that is refused.
    named = os.environ.get("KVFOLD_CACHE")
    return (Path(named) if named else cache_folder()) / "cells"


def report(
    results: Annotated[Path, Argument(metavar="RESULTS", help="A folder of result files, or one.")] = Path("results"),
    out: Annotated[Path, Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """One self-contained page of pictures and tables, from the files that eval, bench and demo write."""
    from kvfold.report.page import write_page

    check_out(out)
    typer.echo(write_page(results, out))


def inspect(
    model: Model,
    text: Text = None,
    time: Times = None,
    tokens: Annotated[int, Option(help="Tokens read, from the text's beginning.")] = 1024,
    head: Annotated[
        list[str] | None,
        Option(help="LAYER.HEAD whose tokens are told one by one; several times. Default: three, by what they keep."),
    ] = None,
    *,
    loading: Loading,
    output: Output,
) -> None:
    """What every layer and head keeps of one text, and which of its tokens; `kvfold report` draws it.

    Example: `kvfold inspect my-model --adapter my-adapter --text notes.txt --out results/notes-inside.json`
    """
    from kvfold.bench.reading import check_heads, read_document
    from kvfold.data import text_beginning
    from kvfold.report.sheets import known_table

    heads = [_head(one) for one in head or []]
    file = read_text_file(text or SAMPLE)
    weights, tokenizer = loading.load(model, times=time)
    check_heads(weights.config.layout, heads)
    ids, pieces = text_beginning(file, tokenizer, tokens=tokens)
    with progress() as report:
        result = read_document(
            weights, ids, pieces, time or [weights.config.layout.time_text()], name=model_name(model), text=file.name,
            heads=heads, report=report,
        )  # fmt: skip
    output.hand_over("document", result, known_table("document"))


def _head(text: str) -> tuple[int, int]:
    layer, dot, head = text.partition(".")
    if not (dot and layer.isdecimal() and head.isdecimal()):
        raise UserError(
            f"--head '{text}': it is a layer and one of its KV heads, counted from 0: write e.g. --head 3.1"
        )
    return int(layer), int(head)


def demo(out: Annotated[Path, Option(help="The folder for result files and the page.")] = Path("demo-out")) -> None:
    """Everything on a small real model, in minutes: tables here, result files and a page with pictures in a folder."""
    from kvfold.demo import run_demo
    from kvfold.report.sheets import known_table, passkey_table

    def tables_of(kind: str, result: dict) -> None:
        known = [known_table(kind)(result)] if kind in ("quality", "decode") else []
        show(*known, *([passkey_table(result)] if "passkey" in result else []))

    check_out(out / "index.html")
    quiet_transformers(bars=False)
    with progress() as report:
        page = run_demo(out, command_line(), say, report, tables_of)
    say("next: `make serve` (or `kvfold serve --demo`): chat with this model, and watch what each head keeps")
    typer.echo(f"the page: {page}")
