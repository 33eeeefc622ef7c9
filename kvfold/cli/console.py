"""Where words, tables and JSON go, and how a command ends when something is wrong.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 a failure while running, 2 bad usage or bad input, which
is a `UserError` or typer's own.
"""

import functools
import json
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

import typer
from rich.console import Console, RenderableType
from safetensors import SafetensorError

from kvfold.errors import UserError, is_out_of_memory, raised_in_kvfold

debug = ContextVar("debug", default=False)
"""Whether the command line began with `--debug`."""
UNBOUNDED_COLUMNS = 160
"""Width of what goes to a file or another program."""


def clear_errors(command: Callable) -> Callable:
    """Whatever goes wrong ends in one line on stderr and an exit code; `kvfold --debug` shows the traceback before it."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():
                # Our own warnings are notes to the reader; other packages' are meant for us.
                warnings.simplefilter("ignore")
                warnings.filterwarnings("default", module=r"kvfold\.")
                warnings.showwarning = lambda message, *_: say(f"note: {message}")
                command(*args, **kwargs)
        except (BrokenPipeError, *_TYPERS_OWN):
            # Whoever reads our output has seen enough, or typer says the line and the code.
            raise
        except KeyboardInterrupt as error:
            say("stopped")
            raise typer.Exit(1) from error
        except Exception as error:
            if debug.get():
                say("".join(traceback.format_exception(error)).rstrip("\n"))
            say(_told(error))
            raise typer.Exit(2 if isinstance(error, UserError) else 1) from error

    return guarded


def _told(error: Exception) -> str:
    """The one line."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return f"error: {text}"
    if is_out_of_memory(error):
        return (
            f"failed: out of memory ({text or type(error).__name__}): make the batch, the context or the cache smaller"
        )
    # A failure of a command that is right explains itself: a disk, a file, and what our own code raises as one.
    if isinstance(error, OSError | SafetensorError) or (isinstance(error, RuntimeError) and raised_in_kvfold(error)):
        return f"failed: {text or type(error).__name__}"
    hint = "" if debug.get() else ": `kvfold --debug ...` shows where"
    return f"failed: {type(error).__name__}: {text or 'no more is known'}{hint}"


_TYPERS_OWN = (typer.Exit, typer.Abort)


def say(line: str) -> None:
    """One line to the reader, however long, on stderr."""
    Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print(line)


def waiting(what: str) -> Any:
    """A sign of life on stderr while something is done, where stderr is a terminal; to be used in a `with`."""
    return Console(stderr=True).status(what)


def progress() -> Any:
    """Bars on stderr for whatever takes a while, or where it is no terminal a line a minute; to be used in a `with`."""
    from kvfold.eval.progress import progress_bars, progress_lines

    return progress_bars() if Console(stderr=True).is_interactive else nullcontext(progress_lines(say))


def show(*parts: RenderableType) -> None:
    """Lines and tables on stdout."""
    console = Console(width=None if sys.stdout.isatty() else UNBOUNDED_COLUMNS, highlight=False, markup=False)
    for part in parts:
        console.print(part)


def show_json(data: Any) -> None:
    """One JSON value on stdout; numbers that are not finite, for which JSON has no word, become null."""
    typer.echo(json.dumps(json.loads(json.dumps(data), parse_constant=lambda _: None)))


def command_line() -> str:
    """What was typed, to be typed again."""
    return shlex.join(["kvfold", *sys.argv[1:]])
