"""What all commands share: their options, each declared once (those that always come together are a group, of which a command
takes one parameter); opening a model, handing over a result; where words, tables and JSON go, and how a command ends when
something is wrong.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 a failure while running, 2 bad usage or bad input, which
is a `UserError` or typer's own.
"""

import functools
import inspect
import json
import logging
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from safetensors import SafetensorError
from typer import Argument, Option

from kvfold.errors import UserError, is_out_of_memory, raised_in_kvfold

METHODS = "full | window:W+S | h2o:R+Y | tova:N, in tokens or percent; trained: dmc[:W][+S] | dms[:W] | fold[:W]"
LAYERS = "Which layers share: cla2 | cla2-keep-ends | trailing:N | yoco | 0_0_2_2..."
Model = Annotated[str, Argument(metavar="MODEL", help="A folder, a .gguf file or a hub name.")]
Source = Annotated[str, Argument(metavar="SOURCE", help="A folder, a .gguf file or a hub name.")]
NewFolder = Annotated[Path, Argument(metavar="OUT", help="The folder to write; a new or an empty one.")]
Time = Annotated[str | None, Option(help=f"{METHODS}. Default: the checkpoint's own.")]
Times = Annotated[list[str] | None, Option("--time", help=f"{METHODS}; given several times: a row each.")]
Bits = Annotated[
    str | None,
    Option(help="How kept entries are stored: model | fp8 | int8 | int4, or keys and values apart, as int8,int4."),
]
Heads = Annotated[int | None, Option(help="KV heads of a layer; divides the source's.")]
Adapter = Annotated[str | None, Option(help="A folder that `kvfold retrofit` wrote.")]
_DTYPES = "float32 | bfloat16 | float16"
Dtype = Annotated[str | None, Option(help=f"{_DTYPES}. Default: float32 on a CPU, else the checkpoint's.")]
WeightsDtype = Annotated[str | None, Option("--dtype", help=f"{_DTYPES}, of the weights. Default: float32.")]
Device = Annotated[str | None, Option(help="cpu | cuda. Default: cpu.")]
KvMemory = Annotated[str, Option(help="Bytes of the cache, never exceeded.")]
Text = Annotated[Path | None, Option(help="A text, .jsonl or .gz file that tokens are taken from. Default: a novel.")]
Repeats = Annotated[int, Option(help="Rounds; all sides take turns.")]
Data = Annotated[list[str] | None, Option(help="Text, .jsonl, .gz, .parquet, or a hub name; several times: all.")]
Out = Annotated[Path | None, Option(help="Write the result to this JSON file.")]
Json = Annotated[bool, Option("--json", help="Print JSON and nothing else on stdout.")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Loading:
    """How a model is loaded."""

    bits: Bits = None
    adapter: Adapter = None
    gates: Annotated[
        str | None, Option(help="channel: a learned method reads its published freed channel, as it stands.")
    ] = None
    dtype: Dtype = None
    device: Device = None

    def load(self, source: str, *, time: str | None = None, times: Sequence[str] | None = None) -> tuple[Any, Any]:
        """The model and its tokenizer, with a sign of life meanwhile. `times`: methods that it will be measured under; one that
        is learned says what `gates` are for.
        """
        from kvfold.methods.registry import parse_time
        from kvfold.models.load import load, load_tokenizer

        quiet_transformers()
        if self.gates is not None and time is None:
            learned = [one for one in times or () if ";" not in one and parse_time(one).trained]
            time = learned[0] if learned else None
        chosen = {one.name: getattr(self, one.name) for one in fields(self)}
        with waiting(f"loading {source}"):
            return load(source, time=time, **chosen), load_tokenizer(source)


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """Settings of every training run, named as the fields of its settings are; a command adds its own."""

    data: Data = None
    tokens: Annotated[
        str | None, Option(help="Tokens to train on, e.g. 250k; the recipe's stages are scaled to it.")
    ] = None
    learning_rate: Annotated[float | None, Option(help="Peak learning rate.")] = None
    seed: Annotated[int | None, Option(help="Random seed of new weights, noise and the order of text.")] = None
    set_: Annotated[list[str] | None, Option("--set", help="Any key of a recipe, as key=value; several times.")] = None

    def over(self, recipe: Mapping[str, Any], settings: type, *, where: str, **more: Any) -> dict[str, Any]:
        """A recipe's values, then those of options that were given and `more`, then those of `--set`. Checked as the fields of
        `settings`, see train/design_space.py.
        """
        from kvfold.layout.planner import parse_count
        from kvfold.train.design_space import checked_values, parse_assignments

        given = {name: value for name, value in asdict(self).items() if value is not None and name != "set_"} | more
        given |= {name: parse_count(given[name]) for name in ("tokens", "seq_len") if name in given}
        assigned = parse_assignments(self.set_ or (), settings)
        values = {**recipe, **checked_values(given, settings, where=where), **assigned}
        if not values.get("data"):
            raise UserError("no data to train on: give --data FILES")
        return values


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """Where a result goes. Raises `UserError` for a place where no file can be, before anything is measured."""

    out: Out = None
    as_json: Json = False

    def __post_init__(self):
        check_out(self.out)

    def hand_over(self, kind: str, result: Mapping[str, Any], *tables: Callable[[Mapping], RenderableType]) -> None:
        """Write a result where it was asked for, and show it as JSON or as tables."""
        from kvfold.record import recorded, write_result

        if kind not in ("plan", "recipes"):  # nothing was measured for these
            result = recorded(result)
        if self.out is not None:
            write_result(self.out, kind, result, command_line())
        if self.as_json:
            show_json({"kind": kind, **result})
        else:
            show(*(table(result) for table in tables))


def with_groups(command: Callable) -> Callable:
    """The same for typer, which knows single options only: the fields of each group in the place of its parameter."""
    signature = inspect.signature(command)
    groups = {name: it.annotation for name, it in signature.parameters.items() if is_dataclass(it.annotation)}

    @functools.wraps(command)
    def gathering(**options: Any) -> None:
        for name, group in groups.items():
            options[name] = group(**{field.name: options.pop(field.name) for field in fields(group)})
        command(**options)

    found = []
    for name, plain in signature.parameters.items():
        if name in groups:
            found += [(field.name, field.default, field.type) for field in fields(groups[name])]
        else:
            found.append((name, plain.default, plain.annotation))
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, kind, default=value, annotation=of) for name, value, of in found]
    gathering.__signature__ = signature.replace(parameters=parameters)
    gathering.__annotations__ = {each.name: each.annotation for each in parameters}
    return gathering


def check_out(out: Path | None) -> None:
    """Refuse a place where no file can be, before anything is measured."""
    if out is not None and (out.is_dir() or any(parent.is_file() for parent in out.parents)):
        raise UserError(f"{out}: no file can be written there: name a file in a folder, one that is there or not yet")


def quiet_transformers(*, bars: bool = True) -> None:
    """Other packages' log lines are for programmers. `bars`: progress bars stay, as for downloads; that of a .gguf file, which
    is read from the disk and asks none of the settings, never does.
    """
    from transformers import modeling_gguf_pytorch_utils as gguf_reading
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    if hasattr(gguf_reading, "tqdm"):
        gguf_reading.tqdm = functools.partial(gguf_reading.tqdm, disable=True)
    if not bars:
        theirs.disable_progress_bar()


def model_name(source: str) -> str:
    """What a model is called in results: the last part of its path or hub name."""
    return Path(source).resolve().name.removesuffix(".gguf") if Path(source).exists() else source


def begin_training(device: Any, dtype: str = "float32") -> dict[str, Any]:
    """Set up what every training run needs, and say by what it is made."""
    import torch

    from kvfold import __version__
    from kvfold.ops.native import flush_denormals
    from kvfold.record import cpu_name, git_commit, made
    from kvfold.train.retrofit import device_name

    quiet_transformers(bars=False)
    flush_denormals()
    if device.type == "cpu" and torch.cuda.is_available():
        say("note: training on the CPU, though there is a GPU: --device cuda takes it")
    hardware = device_name(device, cpu_name())
    about = {"command": command_line(), "version": __version__, "git_commit": git_commit(), "hardware": hardware}
    return about | {"made": made(torch.get_num_threads(), dtype)}


debug_mode = ContextVar("debug_mode", default=False)
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
        except (BrokenPipeError, typer.Exit, typer.Abort):
            # Whoever reads our output has seen enough, or typer says the line and the code.
            raise
        except KeyboardInterrupt as error:
            say("stopped")
            raise typer.Exit(1) from error
        except Exception as error:
            if debug_mode.get():
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
        why = text or type(error).__name__
        return f"failed: out of memory ({why}): make the batch, the context or the cache smaller"
    # A failure of a command that is right explains itself: a disk, a file, and what our own code raises as one.
    if isinstance(error, OSError | SafetensorError) or (isinstance(error, RuntimeError) and raised_in_kvfold(error)):
        return f"failed: {text or type(error).__name__}"
    hint = "" if debug_mode.get() else ": `kvfold --debug ...` shows where"
    return f"failed: {type(error).__name__}: {text or 'no more is known'}{hint}"


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
    from kvfold.record import finite

    typer.echo(json.dumps(finite(data)))


def tell(facts: Mapping[str, Any], as_json: bool, *lines: str, out: object = None) -> None:
    """How a command that writes files ends: with its facts as JSON, or with lines and, on stdout, the place that it wrote."""
    if as_json:
        show_json(facts)
        return
    for line in lines:
        say(line)
    if out is not None:
        typer.echo(out)


def command_line() -> str:
    """What was typed, to be typed again."""
    return shlex.join(["kvfold", *sys.argv[1:]])
