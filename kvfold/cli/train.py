"""`kvfold train`: a model from scratch. `kvfold retrofit`: a model is trained to compress its own cache. Both are done in train/.
`kvfold calibrate`: an adapter's gates are set to another compression, in train/calibrate.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from kvfold.cli.options import (
    Data,
    Device,
    Dtype,
    Json,
    Loading,
    Model,
    NewFolder,
    Output,
    Source,
    Training,
    WeightsDtype,
    begin_training,
    command_line,
    model_name,
    progress,
    say,
    tell,
    waiting,
)
from kvfold.data import SAMPLE
from kvfold.errors import UserError, need_packages
from kvfold.layout.planner import parse_count


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretraining(Training):
    """Settings of `train`."""

    valid: Annotated[list[str] | None, Option(help="Held-out text. Default: the first part of the data.")] = None


def train(
    recipe: Annotated[
        str | None, Argument(metavar="RECIPE", help="A name that --list shows, or a .yaml file.", show_default=False)
    ] = None,
    out: Annotated[Path | None, Option(help="The folder to write; a begun run is resumed. Default: the recipe's name.")] = None,
    sweep_lr: Annotated[
        float | None,
        Option(help="Raise the learning rate by this factor until held-out perplexity stops improving, e.g. 1.5."),
    ] = None,
    list_: Annotated[bool, Option("--list", help="Show the recipes with their weights and KV bytes a token.")] = False,
    *,
    training: Pretraining,
    device: Device = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Train a model from scratch, layers and heads as the recipe says. Run again, it resumes where it stopped.

    Example: `kvfold train mini-h128-mqa-cla2 --data notes.txt --out my-model`
    """
    if list_:
        _list(as_json)
        return
    if recipe is None:
        raise UserError("no recipe: give a name that `kvfold train --list` shows, or a .yaml file")
    facts = _pretrained(recipe, out or Path(Path(recipe).stem), _pretrain_settings(recipe, training), sweep_lr, device)
    tell({"kind": "pretraining", **facts}, as_json, out=facts["out"])


def _pretrain_settings(recipe: str, training: Pretraining) -> Any:
    from kvfold.train.design_space import PretrainSettings, is_file_name, read_recipe, recipe_of

    named = not is_file_name(recipe)
    values = recipe_of(recipe).settings.model_dump() if named else read_recipe(recipe, PretrainSettings)
    values = training.over(values, PretrainSettings, where="train")
    keys = PretrainSettings.model_fields.items()
    missing = [key for key, one in keys if one.is_required() and key not in values]
    if missing:
        raise UserError(f"recipe {recipe}: nothing says {', '.join(missing)}: add what a model's shape takes")
    return PretrainSettings(**values)


def _pretrained(recipe: str, out: Path, settings: Any, factor: float | None, device: str | None) -> dict[str, Any]:
    from kvfold.train.run_folder import RunFolder, leads

    if leads():
        say(
            f"{recipe}: {settings.num_parameters:,} weights, {settings.kv_bytes_per_token:,} bytes of KV cache a token at 16 bit"
            f"; {settings.total_steps:,} steps of {settings.step_tokens:,} tokens"
        )
    folder, name = RunFolder(out=out), recipe if factor is None else f"{recipe} --sweep-lr {factor:g}"
    if factor is not None:
        from kvfold.train.pretrain import rates

        rates(settings.learning_rate, factor)
    if leads():  # the others would meet it half begun
        folder.check(name, settings)
    done = folder.read("result")
    if done is not None and (out / "config.json").is_file():
        say(f"{out}: done already")
        return done
    train_one = _trainer_of(recipe, device, text=folder.training)
    rows = [train_one(settings, folder)] if factor is None else _swept(name, settings, factor, folder, train_one)
    if not rows[0]:  # another process writes
        return {"out": str(out)}
    found = {"out": str(out), "recipe": recipe, "rows": rows}
    _write_result(out, found)
    folder.write("result", found)
    return found


def _trainer_of(recipe: str, device: str | None, *, text: Path) -> Any:
    """What trains one model in its folder; `text` is the folder of the packed text."""
    import torch

    from kvfold.eval.progress import watched_steps
    from kvfold.train.pretrain import Pretrain

    where = torch.device(device or "cpu")
    about = begin_training(where)

    def train_one(settings: Any, folder: Any) -> dict[str, Any]:
        if (done := folder.finished()) is not None:
            return done
        with progress() as report, watched_steps(settings.total_steps, folder.done_steps, say) as on_step:
            return Pretrain(
                recipe=recipe, settings=settings, folder=folder, text=text, device=where, about=about, report=report,
                on_step=on_step,
            ).run()  # fmt: skip

    return train_one


def _swept(name: str, settings: Any, factor: float, folder: Any, train_one: Any) -> list[dict[str, Any]]:
    """The runs of a sweep; the best one's files become the result."""
    from kvfold.train.pretrain import begin, copy_result, pretrain_card, sweep
    from kvfold.train.run_folder import leads

    if not leads():
        sweep(settings, factor, folder.out, train_one, say=lambda line: None)
        return [{}]
    with folder.locked():
        with progress() as report:
            begin(folder, name, settings, folder.training, report=report)
        rows, best = sweep(settings, factor, folder.out, train_one, say=say)
        facts = next(row for row in rows if row["note"] == "best")
        card = pretrain_card(settings.with_values(learning_rate=facts["learning_rate"]), facts, folder.out)
        copy_result(best, folder.out, card=card)
    say(f"the best: {best}")
    return rows


def _write_result(out: Path, found: dict[str, Any]) -> None:
    from kvfold.record import write_result

    best = next((row for row in found["rows"] if row.get("note") == "best"), found["rows"][0])
    model = {"name": found["recipe"], "parameters": best["parameters"]}
    write_result(out / "results" / "pretraining.json", "pretraining", {"model": model, **found}, command_line())
    if len(found["rows"]) == 1:
        say(f"held-out perplexity {best['validation_perplexity']:.2f} on {best['validation_tokens']:,} tokens")


def _list(as_json: bool) -> None:
    from kvfold.report.sheets import known_table
    from kvfold.train.design_space import recipes

    rows = [
        {"name": one.name, "parameters": one.settings.num_parameters,
         "kv_bytes_per_token": one.settings.kv_bytes_per_token, "settings": one.settings.model_dump()}
        for one in recipes().values()
    ]  # fmt: skip
    Output(as_json=as_json).hand_over("recipes", {"rows": rows}, known_table("recipes"))


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
class Retrofitting(Training):
    """Settings of `retrofit`."""

    time: Annotated[
        str | None, Option(help="dmc[:W][+S] | dms[:W] | fold[:W]. Default: the recipe's; none: plain uptraining.")
    ] = None
    start: Annotated[str | None, Option(help="An adapter whose gates to go on from, or to take over (fold).")] = None
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
        Path | None, Option(help="Write the begun run's newest checkpoint to this folder, and train nothing.")
    ] = None,
    *,
    learns: Learns,
    training: Retrofitting,
    dtype: WeightsDtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a model to compress its own cache, or train on after a conversion. Run again, it resumes where it stopped.

    Example: `kvfold retrofit my-model my-adapter --recipe smollm2-dms-cpu --data notes.txt`
    """
    loading = Loading(dtype=dtype or "float32", device=device)
    facts = _retrofitted(source, out, _retrofit_settings(recipe, learns, training), snapshot, loading)
    if "after" not in facts:
        return  # one of torchrun's other processes: the leading one measures, writes and tells
    before, after = facts["before"], facts["after"]
    change = 100 * (after["perplexity"] / before["perplexity"] - 1)
    told = f"held-out perplexity {before['perplexity']:.2f} -> {after['perplexity']:.2f} ({change:+.1f} %)"
    told += f", compression {after['compression']:.2f} at {after['context_tokens']:,} tokens"
    tell({"kind": "retrofit", "out": str(snapshot or out), **facts}, as_json, told, out=snapshot or out)


def _retrofit_settings(recipe: str | None, learns: Learns, training: Retrofitting) -> Any:
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
    settings = RetrofitSettings(**values)
    if training.compression is not None and settings.gated and settings.spec.gate_form.gates_of:
        raise UserError(
            f"a compression with {settings.spec.name}: its gates stay as they are: leave it out, and calibrate the adapter"
        )
    return settings


def _retrofitted(source: str, out: Path, settings: Any, snapshot: Path | None, loading: Loading) -> dict[str, Any]:
    from kvfold.models.load import check_folder
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
        check_folder(snapshot)
        if folder.checkpoint is None:
            raise UserError(f"{out}: no checkpoint there yet: wait for the first, or look at save_steps")
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


def _say_plan(settings: Any, done: int, model: Any) -> None:
    from kvfold.train.student import retention_of

    stages = settings.stages
    told = f"{stages.total:,} steps of {settings.step_tokens:,} tokens"
    if settings.trains_gates:
        nominal = retention_of(model, settings).nominal_for(settings.compression)
        told += f", compression {settings.compression:g} at {settings.seq_len:,} tokens"
        told += f" ({nominal:.2f} by the gates alone)"
    say(told + (f"; going on after step {done:,}" if done else ""))


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
    from kvfold.models.load import check_folder
    from kvfold.train.calibrate import recalibrate, shifted_settings
    from kvfold.train.data import draw_text

    tokens = parse_count(context)
    settings = shifted_settings(adapter, compression=compression, seq_len=tokens)
    check_folder(out)
    weights, tokenizer = Loading(adapter=str(adapter), dtype=dtype, device=device).load(model)
    with waiting("drawing text"):
        text = draw_text(data or [str(SAMPLE)], tokenizer, tokens=sequences * tokens, seq_len=tokens, seed=0, spared=1)
    with progress() as report:
        facts = recalibrate(weights, adapter, out, text.train, settings, report=report)
    told = f"kept ratios of {facts['sequences']} sequences up to {tokens:,} tokens"
    if settings is not None:
        shift = f"compression {facts['before']:.2f} -> {facts['after']:.2f} at {tokens:,} tokens"
        told = f"{shift}; gates shifted by {facts['shift']:+.3f}; {told}"
    tell({"kind": "calibrate", "out": str(out), **facts}, as_json, told, out=out)
