"""`kvfold report`: result files to a page."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from kvfold.cli.options import check_out


def report(
    results: Annotated[Path, Argument(metavar="RESULTS", help="A folder of result files, or one.")] = Path("results"),
    out: Annotated[Path, Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """One self-contained page of pictures and tables, from the files that eval, bench and demo write."""
    from kvfold.report.page import write_page

    check_out(out)
    typer.echo(write_page(results, out))
