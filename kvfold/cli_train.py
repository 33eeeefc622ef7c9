"""`kvfold retrofit`: parse, call, print. What it does lives in the room `train`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kvfold.cli_model import Data, Device, Json, Rate, Set, model_name, note_idle_gpu
from kvfold.console import check_packages, clear_errors, command_line, progress, quieten, say, show_json, waiting
from kvfold.errors import UserError

Recipe = Annotated[str | None, typer.Option(help="Settings by name, or a .yaml file; other options override it.")]
Time = Annotated[str | None, typer.Option(help="dmc[:W][+S] | dms[:W]. Default: the recipe's; none: plain uptraining.")]
Compression = Annotated[float | None, typer.Option(help="Times smaller, at the end of a sequence, window included.")]
ByAdapter = Annotated[bool, typer.Option("--adapter", help="Train gates beside the frozen model (DMS).")]
ByLora = Annotated[int | None, typer.Option("--lora", help="Train a low-rank addition of this rank.")]
ByFull = Annotated[bool, typer.Option("--full", help="Train all weights.")]
Tokens = Annotated[
    str | None, typer.Option(help="Tokens to train on, e.g. 250k; the recipe's stages are scaled to it.")
]
Context = Annotated[str | None, typer.Option(help="Tokens of a sequence, e.g. 1k.")]
Batch = Annotated[int | None, typer.Option(help="Sequences of a step, over all processes.")]
Kl = Annotated[str | None, typer.Option(help="reverse | forward | none. Default: reverse for dms, none for dmc.")]
Teacher = Annotated[str | None, typer.Option(help="A model to distil from. Default: the source itself.")]
WarmStart = Annotated[bool | None, typer.Option(help="First fit the gates to the attention that tokens receive.")]
Calibrate = Annotated[bool | None, typer.Option(help="Shift the gates so that held-out text is compressed as asked.")]
Control = Annotated[bool, typer.Option("--control", help="Train the same without compression, to compare with.")]
Seed = Annotated[int | None, typer.Option(help="Of text, noise and new weights.")]
Snapshot = Annotated[
    Path | None, typer.Option(help="Write what the begun run's newest checkpoint is to this folder, and train nothing.")
]
Dtype = Annotated[str | None, typer.Option(help="float32 | bfloat16 | float16, of the weights. Default: float32.")]


def add_retrofit(app: typer.Typer) -> None:
    """Put the command among the others."""
    app.command(
        "retrofit", epilog="Example: `kvfold retrofit my-model my-adapter --recipe smollm2-dms-cpu --data notes.txt`"
    )(retrofit)


@clear_errors
def retrofit(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A folder, a .gguf file or a hub name.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder to write; one that was begun is gone on with.")
    ],
    recipe: Recipe = None,
    time: Time = None,
    compression: Compression = None,
    adapter: ByAdapter = False,
    lora: ByLora = None,
    full: ByFull = False,
    data: Data = None,
    tokens: Tokens = None,
    context: Context = None,
    batch: Batch = None,
    learning_rate: Rate = None,
    kl: Kl = None,
    teacher: Teacher = None,
    warm_start: WarmStart = None,
    calibrate: Calibrate = None,
    control: Control = False,
    snapshot: Snapshot = None,
    seed: Seed = None,
    set_: Set = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a model to compress its own cache, or train on after a conversion. Started again, it goes on where it stopped."""
    given = {
        "time": time, "compression": compression, **_trains(adapter, lora, full), "data": data, "tokens": _count(tokens),
        "sequence_tokens": _count(context), "batch_sequences": batch, "learning_rate": learning_rate, "kl": kl,
        "teacher": teacher, "warm_start": warm_start, "calibrate": calibrate, "control": control or None, "seed": seed,
    }  # fmt: skip
    settings = _settings(recipe, {key: value for key, value in given.items() if value is not None}, set_ or [])
    facts = _run(source, out, settings, snapshot, dtype=dtype, device=device)
    if "after" not in facts:
        return  # one of torchrun's other processes: the leading one measures, writes and tells
    if as_json:
        show_json({"kind": "retrofit", "out": str(snapshot or out), **facts})
    else:
        _show(facts)
        typer.echo(snapshot or out)


def _trains(adapter: bool, lora: int | None, full: bool) -> dict[str, Any]:
    chosen = [
        name for name, one in (("--adapter", adapter), ("--lora", lora is not None), ("--full", full)) if one
    ]  # fmt: skip
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)}: one of them says what learns: give the others up")
    if not chosen:
        return {}
    return {"trains": chosen[0].removeprefix("--"), "rank": lora}


def _count(text: str | None) -> int | None:
    from kvfold.layout.units import parse_count

    return None if text is None else parse_count(text)


def _settings(recipe: str | None, given: dict[str, Any], assigned: list[str]) -> Any:
    """The recipe's, then what was given, then what was set."""
    from kvfold.train.recipes import checked_values, parse_assignments, read_recipe
    from kvfold.train.settings import RetrofitSettings

    values = {} if recipe is None else read_recipe(recipe, RetrofitSettings)
    values |= checked_values(given, RetrofitSettings, where="retrofit") | parse_assignments(assigned, RetrofitSettings)
    if "trains" not in values:
        raise UserError("nothing says what learns: give --adapter, --lora R, --full or a recipe")
    if "compression" in values and values.get("time") is None:
        raise UserError(
            "a compression without a method: plain uptraining compresses nothing: give --time dms or dmc too"
        )
    if not values.get("data"):
        raise UserError("no data to train on: give --data FILES")
    return RetrofitSettings(**values)


def _run(
    source: str, out: Path, settings: Any, snapshot: Path | None, *, dtype: str | None, device: str | None
) -> dict[str, Any]:
    from kvfold.train.results import is_written
    from kvfold.train.run_folder import RunFolder, leads

    folder = RunFolder(out=out)
    if leads():  # others of torchrun's would meet it half begun
        folder.check(source, settings, dtype or "float32")
    done = folder.read("done")
    if done is not None and is_written(out, settings):
        if snapshot is not None:
            raise UserError(f"{out}: the run is finished and this is its result: a snapshot is of one on its way")
        say(f"{out}: done already")
        return done
    if snapshot is not None:
        _check_snapshot(snapshot, folder)
    check_packages("accelerate", "peft")
    from kvfold import __version__
    from kvfold.models.load import load, load_tokenizer
    from kvfold.ops.denormals import flush_denormals
    from kvfold.record import cpu_name, git_commit
    from kvfold.train.retrofit import Retrofit, device_name
    from kvfold.train.watch import watched_steps

    quieten()
    flush_denormals()
    with waiting(f"loading {source}"):
        model, tokenizer = load(source, dtype=dtype or "float32", device=device), load_tokenizer(source)
        teacher = None if settings.teacher is None else load(settings.teacher, dtype=dtype or "float32", device=device)
    note_idle_gpu(model.device)
    _say_plan(settings, folder.done_steps, model)
    about = {
        "command": command_line(), "version": __version__, "git_commit": git_commit(),
        "hardware": device_name(model.device, cpu_name()),
    }  # fmt: skip
    with progress() as report, watched_steps(settings.stages.total, folder.done_steps, say) as on_step:
        return Retrofit(
            model=model, tokenizer=tokenizer, source=source, name=model_name(source), settings=settings, folder=folder,
            teacher=teacher, about=about, snapshot=snapshot, report=report, on_step=on_step,
        ).run()  # fmt: skip


def _check_snapshot(snapshot: Path, folder: Any) -> None:
    from kvfold.models.checkpoint_files import check_folder

    check_folder(snapshot)
    if folder.checkpoint is None:
        raise UserError(f"{folder.out}: no checkpoint there yet: wait for the first, or look at save_steps")


def _say_plan(settings: Any, done: int, model: Any) -> None:
    from kvfold.train.student import retention_of

    stages = settings.stages
    told = f"{stages.total:,} steps of {settings.step_tokens:,} tokens"
    if settings.compresses:
        nominal = retention_of(model, settings).nominal_for(settings.compression)
        told += f", compression {settings.compression:g} at {settings.sequence_tokens:,} tokens"
        told += f" ({nominal:.2f} by the gates alone)"
    say(told + (f"; going on after step {done:,}" if done else ""))


def _show(facts: dict[str, Any]) -> None:
    before, after = facts["before"], facts["after"]
    change = 100 * (after["perplexity"] / before["perplexity"] - 1)
    told = f"held-out perplexity {before['perplexity']:.2f} -> {after['perplexity']:.2f} ({change:+.1f} %)"
    say(told + f", compression {after['compression']:.2f} at {after['context_tokens']:,} tokens")
