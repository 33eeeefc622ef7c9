"""The options that commands share, each declared once; those that always come together are a group, of which a command takes one
parameter. Also what every command does with them: open a model, hand over a result.
"""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

from rich.console import RenderableType
from typer import Argument, Option

from kvfold.cli.console import command_line, say, show, show_json, waiting
from kvfold.errors import UserError

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
Dtype = Annotated[
    str | None, Option(help="float32 | bfloat16 | float16. Default: float32 on a CPU, else the checkpoint's.")
]
WeightsDtype = Annotated[
    str | None, Option("--dtype", help="float32 | bfloat16 | float16, of the weights. Default: float32.")
]
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
        from kvfold.layout.units import parse_count
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

    @wraps(command)
    def gathering(**options: Any) -> None:
        for name, group in groups.items():
            options[name] = group(**{field.name: options.pop(field.name) for field in fields(group)})
        command(**options)

    def parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    parameters = []
    for name, plain in signature.parameters.items():
        if name in groups:
            parameters += [parameter(field.name, field.default, field.type) for field in fields(groups[name])]
        else:
            parameters.append(parameter(name, plain.default, plain.annotation))
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
        gguf_reading.tqdm = partial(gguf_reading.tqdm, disable=True)
    if not bars:
        theirs.disable_progress_bar()


def model_name(source: str) -> str:
    """What a model is called in results: the last part of its path or hub name."""
    return Path(source).resolve().name.removesuffix(".gguf") if Path(source).exists() else source


def begin_training(device: Any, dtype: str = "float32") -> dict[str, Any]:
    """Set up what every training run needs, and say by what it is made."""
    import torch

    from kvfold import __version__
    from kvfold.ops.denormals import flush_denormals
    from kvfold.record import cpu_name, git_commit, made
    from kvfold.train.retrofit import device_name

    quiet_transformers(bars=False)
    flush_denormals()
    if device.type == "cpu" and torch.cuda.is_available():
        say("note: training on the CPU, though there is a GPU: --device cuda takes it")
    hardware = device_name(device, cpu_name())
    about = {"command": command_line(), "version": __version__, "git_commit": git_commit(), "hardware": hardware}
    return about | {"made": made(torch.get_num_threads(), dtype)}
