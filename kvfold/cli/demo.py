"""`kvfold demo`: the whole road once."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from kvfold.cli.console import command_line, progress, say, show
from kvfold.cli.options import check_out, quiet_transformers


def demo(out: Annotated[Path, Option(help="The folder for result files and the page.")] = Path("demo-out")) -> None:
    """Everything on a small real model, in minutes: tables here, result files and a page with pictures in a folder."""
    from kvfold.demo import run_demo
    from kvfold.report import sheets

    def tables_of(kind: str, result: dict) -> None:
        found = {"quality": [sheets.quality_table], "decode": [sheets.decode_table]}.get(kind, [])
        show(*(table(result) for table in found), *([sheets.passkey_table(result)] if "passkey" in result else []))

    check_out(out / "index.html")
    quiet_transformers(bars=False)
    with progress() as report:
        page = run_demo(out, command_line(), say, report, tables_of)
    say("next: `make serve` (or `kvfold serve --demo`): chat with this model, and watch what each head keeps")
    typer.echo(f"the page: {page}")
