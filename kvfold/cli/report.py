"""`kvfold report`: result files to a page; `kvfold inspect`: what heads keep of one text, read in bench/reading.py; and
`kvfold demo`: the whole road once.
"""

from pathlib import Path
from typing import Annotated

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
