"""`kvfold train`: parse, call, print. What it does lives in the room `train`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kvfold.cli_model import Data, Device, Json, Rate, Set, note_idle_gpu
from kvfold.console import check_packages, clear_errors, command_line, progress, quieten, say, show, show_json
from kvfold.errors import UserError

Recipe = Annotated[
    str | None, typer.Argument(metavar="RECIPE", help="A name that --list shows, or a .yaml file.", show_default=False)
]
Out = Annotated[
    Path | None, typer.Option(help="The folder to write; one that was begun is gone on with. Default: the name.")
]
Valid = Annotated[list[str] | None, typer.Option(help="Held-out text. Default: the first part of the data.")]
Tokens = Annotated[str | None, typer.Option(help="Tokens to train on, e.g. 1M.")]
Seed = Annotated[int | None, typer.Option(help="Of new weights and the order of sequences.")]
Sweep = Annotated[
    float | None,
    typer.Option(help="Raise the learning rate by this factor until held-out perplexity stops improving, e.g. 1.5."),
]
List = Annotated[bool, typer.Option("--list", help="Show the recipes with their weights and KV bytes a token.")]


def add_train(app: typer.Typer) -> None:
    """Put the command among the others."""
    app.command("train", epilog="Example: `kvfold train mini-h128-mqa-cla2 --data notes.txt --out my-model`")(train)


@clear_errors
def train(
    recipe: Recipe = None,
    out: Out = None,
    data: Data = None,
    valid: Valid = None,
    tokens: Tokens = None,
    learning_rate: Rate = None,
    seed: Seed = None,
    sweep_lr: Sweep = None,
    set_: Set = None,
    list_: List = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a model from scratch, layers and heads as the recipe says. Started again, it goes on where it stopped."""
    if list_:
        _list(as_json)
        return
    if recipe is None:
        raise UserError("no recipe: give a name that `kvfold train --list` shows, or a .yaml file")
    from kvfold.layout.units import parse_count

    given = {
        "data": data, "valid": valid, "tokens": None if tokens is None else parse_count(tokens),
        "learning_rate": learning_rate, "seed": seed,
    }  # fmt: skip
    settings = _settings(recipe, {key: value for key, value in given.items() if value is not None}, set_ or [])
    facts = _run(recipe, out or Path(Path(recipe).stem), settings, sweep_lr, device)
    if as_json:
        show_json({"kind": "pretraining", **facts})
    else:
        typer.echo(facts["out"])


def _settings(recipe: str, given: dict[str, Any], assigned: list[str]) -> Any:
    """The recipe's, then what was given, then what was set."""
    from dataclasses import MISSING, asdict, fields

    from kvfold.train.design_space import recipe_of
    from kvfold.train.pretrain_settings import PretrainSettings
    from kvfold.train.recipes import checked_values, is_file_name, parse_assignments, read_recipe

    named = not is_file_name(recipe)
    values = asdict(recipe_of(recipe).settings) if named else read_recipe(recipe, PretrainSettings)
    values |= checked_values(given, PretrainSettings, where="train") | parse_assignments(assigned, PretrainSettings)
    missing = [one.name for one in fields(PretrainSettings) if one.default is MISSING and one.name not in values]
    if missing:
        raise UserError(f"recipe {recipe}: nothing says {', '.join(missing)}: add what a model's shape takes")
    if not values.get("data"):
        raise UserError("no data to train on: give --data FILES")
    return PretrainSettings(**values)


def _run(recipe: str, out: Path, settings: Any, factor: float | None, device: str | None) -> dict[str, Any]:
    check_packages("accelerate")
    from kvfold.ops.denormals import flush_denormals
    from kvfold.train.run_folder import RunFolder, leads

    if leads():
        _say_plan(recipe, settings)

    folder, name = RunFolder(out=out), recipe if factor is None else f"{recipe} --sweep-lr {factor:g}"
    if factor is not None:
        from kvfold.train.sweep import rates

        rates(settings.learning_rate, factor)
    if leads():  # the others would meet it half begun
        folder.check(name, settings)
    done = folder.read("result")
    if done is not None and (out / "config.json").is_file():
        say(f"{out}: done already")
        return done
    quieten()
    flush_denormals()
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

    from kvfold import __version__
    from kvfold.record import cpu_name, git_commit
    from kvfold.train.pretrain import Pretrain
    from kvfold.train.retrofit import device_name
    from kvfold.train.watch import watched_steps

    where = torch.device(device or "cpu")
    note_idle_gpu(where)
    about = {
        "command": command_line(), "version": __version__, "git_commit": git_commit(),
        "hardware": device_name(where, cpu_name()),
    }  # fmt: skip

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
    from kvfold.train.pretrain import begin
    from kvfold.train.pretrain_card import pretrain_card
    from kvfold.train.run_folder import leads
    from kvfold.train.sweep import copy_result, sweep

    if leads():
        with progress() as report:
            begin(folder, name, settings, folder.training, report=report)
    rows, best = sweep(settings, factor, folder.out, train_one, say=say if leads() else lambda line: None)
    if not leads():
        return [{}]
    facts = next(row for row in rows if row["note"] == "best")
    card = pretrain_card(settings.with_rate(facts["learning_rate"]), facts, folder.out)
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
    from dataclasses import asdict

    from rich.table import Table

    from kvfold.train.design_space import recipes

    rows = [
        {"name": one.name, "parameters": one.settings.num_parameters,
         "kv_bytes_per_token": one.settings.kv_bytes_per_token, "settings": asdict(one.settings)}
        for one in recipes().values()
    ]  # fmt: skip
    if as_json:
        show_json({"kind": "recipes", "rows": rows})
        return
    table = Table("recipe", "layers", "heads", "KV heads", "head dim", box=None)
    for title in ("weights", "KV bytes a token", "tokens", "learning rate"):
        table.add_column(title, justify="right")
    for row in rows:
        it = row["settings"]
        table.add_row(
            row["name"], f"{it['num_layers']} {it['layers']}", str(it["num_heads"]), str(it["num_kv_heads"]),
            str(it["head_dim"]), f"{row['parameters']:,}", f"{row['kv_bytes_per_token']:,}", f"{it['tokens']:,}",
            f"{it['learning_rate']:g}",
        )  # fmt: skip
    show(table)
