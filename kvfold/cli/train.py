"""`kvfold train`: a model from scratch. It is trained in train/."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from kvfold.cli.console import command_line, progress, say, show_json
from kvfold.cli.options import Device, Json, Output, Training, begin_training
from kvfold.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings(Training):
    """What a recipe says where no option does."""

    valid: Annotated[list[str] | None, Option(help="Held-out text. Default: the first part of the data.")] = None


def train(
    recipe: Annotated[
        str | None, Argument(metavar="RECIPE", help="A name that --list shows, or a .yaml file.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, Option(help="The folder to write; an unfinished run there is resumed. Default: the recipe's name.")
    ] = None,
    sweep_lr: Annotated[
        float | None,
        Option(help="Raise the learning rate by this factor until held-out perplexity stops improving, e.g. 1.5."),
    ] = None,
    list_: Annotated[bool, Option("--list", help="Show the recipes with their weights and KV bytes a token.")] = False,
    *,
    training: Settings,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a model from scratch, layers and heads as the recipe says. Run again, it resumes where it stopped.

    Example: `kvfold train mini-h128-mqa-cla2 --data notes.txt --out my-model`
    """
    if list_:
        _list(as_json)
        return
    if recipe is None:
        raise UserError("no recipe: give a name that `kvfold train --list` shows, or a .yaml file")
    facts = _run(recipe, out or Path(Path(recipe).stem), _settings(recipe, training), sweep_lr, device)
    if as_json:
        show_json({"kind": "pretraining", **facts})
    else:
        typer.echo(facts["out"])


def _settings(recipe: str, training: Settings) -> Any:
    from kvfold.train.design_space import PretrainSettings, is_file_name, read_recipe, recipe_of

    named = not is_file_name(recipe)
    values = recipe_of(recipe).settings.model_dump() if named else read_recipe(recipe, PretrainSettings)
    values = training.over(values, PretrainSettings, where="train")
    keys = PretrainSettings.model_fields.items()
    missing = [key for key, one in keys if one.is_required() and key not in values]
    if missing:
        raise UserError(f"recipe {recipe}: nothing says {', '.join(missing)}: add what a model's shape takes")
    return PretrainSettings(**values)


def _run(recipe: str, out: Path, settings: Any, factor: float | None, device: str | None) -> dict[str, Any]:
    from kvfold.train.run_folder import RunFolder, leads

    if leads():
        _say_plan(recipe, settings)
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


def _say_plan(recipe: str, settings: Any) -> None:
    say(
        f"{recipe}: {settings.num_parameters:,} weights, {settings.kv_bytes_per_token:,} bytes of KV cache a token at 16 bit; "
        f"{settings.total_steps:,} steps of {settings.step_tokens:,} tokens"
    )


def _list(as_json: bool) -> None:
    from kvfold.report.sheets import table_of
    from kvfold.train.design_space import recipes

    rows = [
        {"name": one.name, "parameters": one.settings.num_parameters,
         "kv_bytes_per_token": one.settings.kv_bytes_per_token, "settings": one.settings.model_dump()}
        for one in recipes().values()
    ]  # fmt: skip
    Output(as_json=as_json).hand_over("recipes", {"rows": rows}, table_of("Recipes", _RECIPE_COLUMNS))


_RECIPE_COLUMNS = {
    "recipe": "{name}",
    "layers": "{settings[num_layers]} {settings[layers]}",
    "heads": "{settings[num_heads]}",
    "KV heads": "{settings[num_kv_heads]}",
    "head dim": "{settings[head_dim]}",
    "weights": "{parameters:,}",
    "KV bytes a token": "{kv_bytes_per_token:,}",
    "tokens": "{settings[tokens]:,}",
    "learning rate": "{settings[learning_rate]:g}",
}
