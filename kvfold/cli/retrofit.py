"""`kvfold retrofit` and `kvfold calibrate`: a model is trained to compress its own cache, in train/, and an adapter's gates are
set to another compression, in train/calibrate.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from kvfold.cli.console import progress, say, show_json, waiting
from kvfold.cli.options import (
    Data,
    Device,
    Dtype,
    Json,
    Loading,
    Model,
    NewFolder,
    Source,
    Training,
    WeightsDtype,
    begin_training,
    model_name,
)
from kvfold.data import SAMPLE
from kvfold.errors import UserError, need_packages
from kvfold.layout.units import parse_count


@dataclass(frozen=True, kw_only=True, slots=True)
class Learns:
    """What is trained: one of the three, or what a recipe says."""

    adapter: Annotated[bool, Option("--adapter", help="Train gates beside the frozen model (DMS).")] = False
    lora: Annotated[int | None, Option(help="Train a low-rank addition of this rank.")] = None
    full: Annotated[bool, Option("--full", help="Train all weights.")] = False

    @property
    def settings(self) -> dict[str, Any]:
        """As fields of the run's settings."""
        flags = {"--adapter": self.adapter, "--lora": self.lora is not None, "--full": self.full}
        chosen = [flag for flag, is_given in flags.items() if is_given]
        if len(chosen) > 1:
            raise UserError(f"{' and '.join(chosen)}: one of them says what learns: give the others up")
        rank = {} if self.lora is None else {"rank": self.lora}
        return rank | {"trains": chosen[0].removeprefix("--")} if chosen else {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings(Training):
    """What a recipe says where no option does."""

    time: Annotated[
        str | None, Option(help="dmc[:W][+S] | dms[:W]. Default: the recipe's; none: plain uptraining.")
    ] = None
    compression: Annotated[float | None, Option(help="Times smaller, at the end of a sequence, window included.")] = (
        None
    )
    seq_len: Annotated[str | None, Option("--context", help="Tokens of a sequence, e.g. 1k.")] = None
    global_batch_size: Annotated[int | None, Option("--batch", help="Sequences of a step, over all processes.")] = None
    kl: Annotated[str | None, Option(help="reverse | forward | none. Default: reverse for dms, none for dmc.")] = None
    teacher: Annotated[str | None, Option(help="A model to distil from. Default: the source itself.")] = None
    warm_start: Annotated[bool | None, Option(help="First fit the gates to the attention that tokens receive.")] = None
    calibrate: Annotated[bool | None, Option(help="Shift the gates so that held-out text is compressed as asked.")] = (
        None
    )
    control: Annotated[
        bool | None, Option("--control", help="Train the same without compression, to compare with.")
    ] = None


def retrofit(
    source: Source,
    out: Annotated[Path, Argument(metavar="OUT", help="The folder to write; an unfinished run there is resumed.")],
    recipe: Annotated[str | None, Option(help="Settings by name, or a .yaml file; other options override it.")] = None,
    snapshot: Annotated[
        Path | None, Option(help="Write what the begun run's newest checkpoint is to this folder, and train nothing.")
    ] = None,
    *,
    learns: Learns,
    training: Settings,
    dtype: WeightsDtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a model to compress its own cache, or train on after a conversion. Run again, it resumes where it stopped.

    Example: `kvfold retrofit my-model my-adapter --recipe smollm2-dms-cpu --data notes.txt`
    """
    loading = Loading(dtype=dtype or "float32", device=device)
    facts = _run(source, out, _settings(recipe, learns, training), snapshot, loading)
    if "after" not in facts:
        return  # one of torchrun's other processes: the leading one measures, writes and tells
    if as_json:
        show_json({"kind": "retrofit", "out": str(snapshot or out), **facts})
    else:
        _show(facts)
        typer.echo(snapshot or out)


def _settings(recipe: str | None, learns: Learns, training: Settings) -> Any:
    from kvfold.train.design_space import read_recipe
    from kvfold.train.settings import RetrofitSettings

    values = {} if recipe is None else read_recipe(recipe, RetrofitSettings)
    values = training.over(values, RetrofitSettings, where="retrofit", **learns.settings)
    if "trains" not in values:
        raise UserError("nothing says what learns: give --adapter, --lora R, --full or a recipe")
    if "compression" in values and values.get("time") is None:
        raise UserError(
            "a compression without a method: plain uptraining compresses nothing: give --time dms or dmc too"
        )
    return RetrofitSettings(**values)


def _run(source: str, out: Path, settings: Any, snapshot: Path | None, loading: Loading) -> dict[str, Any]:
    from kvfold.train.run_folder import RunFolder, leads

    folder = RunFolder(out=out)
    if leads():  # others of torchrun's would meet it half begun
        folder.check(source, settings, loading.dtype)
    done = folder.finished()
    if done is not None:
        if snapshot is not None:
            raise UserError(f"{out}: the run is finished and this is its result: a snapshot is of one on its way")
        say(f"{out}: done already")
        return done
    if snapshot is not None:
        _check_snapshot(snapshot, folder)
    need_packages("peft", extra="train", what="training")
    from kvfold.eval.progress import watched_steps
    from kvfold.train.retrofit import Retrofit

    model, tokenizer = loading.load(source)
    teacher = None if settings.teacher is None else loading.load(settings.teacher)[0]
    about = begin_training(model.device, loading.dtype)
    _say_plan(settings, folder.done_steps, model)
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
        told += f", compression {settings.compression:g} at {settings.seq_len:,} tokens"
        told += f" ({nominal:.2f} by the gates alone)"
    say(told + (f"; going on after step {done:,}" if done else ""))


def _show(facts: dict[str, Any]) -> None:
    before, after = facts["before"], facts["after"]
    change = 100 * (after["perplexity"] / before["perplexity"] - 1)
    told = f"held-out perplexity {before['perplexity']:.2f} -> {after['perplexity']:.2f} ({change:+.1f} %)"
    say(told + f", compression {after['compression']:.2f} at {after['context_tokens']:,} tokens")


def calibrate(
    model: Model,
    adapter: Annotated[Path, Argument(metavar="ADAPTER", help="A folder that `kvfold retrofit` wrote.")],
    out: NewFolder,
    compression: Annotated[
        float | None,
        Option(
            help="Times smaller, at the end of a sequence, window included. Default: the gates stay, what they keep "
            "is measured anew."
        ),
    ] = None,
    data: Data = None,
    context: Annotated[str, Option(help="Tokens of a sequence, at whose end the compression holds.")] = "1024",
    sequences: Annotated[int, Option(min=1, help="Sequences to set the gates by.")] = 16,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """An adapter at another compression, without training, with what its gates keep per head, by which engines admit.

    Example: `kvfold calibrate my-model adapter-4x adapter-2x --compression 2`
    """
    from kvfold.models.checkpoint_files import check_folder
    from kvfold.train.calibrate import recalibrate, shifted_settings
    from kvfold.train.data import draw_text

    tokens = parse_count(context)
    settings = shifted_settings(adapter, compression=compression, seq_len=tokens)
    check_folder(out)
    weights, tokenizer = Loading(adapter=str(adapter), dtype=dtype, device=device).load(model)
    with waiting("drawing text"):
        text = draw_text(
            data or [str(SAMPLE)], tokenizer, tokens=sequences * tokens,
            seq_len=tokens, seed=0, spared=1,
        )  # fmt: skip
    with progress() as report:
        facts = recalibrate(weights, adapter, out, text.train, settings, report=report)
    if as_json:
        show_json({"kind": "calibrate", "out": str(out), **facts})
    else:
        told = f"kept ratios of {facts['sequences']} sequences up to {tokens:,} tokens"
        if settings is not None:
            shift = f"compression {facts['before']:.2f} -> {facts['after']:.2f} at {tokens:,} tokens"
            told = f"{shift}; gates shifted by {facts['shift']:+.3f}; {told}"
        say(told)
        typer.echo(out)
