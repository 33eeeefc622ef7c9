"""Recipes: YAML files of settings, those that come with kvfold by name and others by path. No torch."""

import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from kvfold.errors import UserError, one_line
from kvfold.train.settings import TrainSettings


def recipe_names() -> list[str]:
    """Recipes that come with kvfold."""
    folder = resources.files("kvfold") / "assets" / "recipes"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def read_recipe(name: str, settings: type[TrainSettings]) -> dict[str, Any]:
    """The values of a recipe, checked against the keys of `settings`. Raises `UserError`, in one line, for a recipe that
    is missing or no YAML, an unknown key (with the nearest known one), or a value of the wrong kind.
    """
    import yaml

    path = Path(name)
    if is_file_name(name):
        if not path.is_file():
            raise UserError(f"{name}: there is no such file: correct the path")
        text = path.read_text(encoding="utf-8")
    elif name in recipe_names():
        text = (resources.files("kvfold") / "assets" / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise _unknown("recipe", name, recipe_names())
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"recipe {name}: not YAML ({one_line(error)}): correct it") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {name}: it holds no keys: write e.g. 'time: dms:128'")
    return checked_values(values, settings, where=f"recipe {name}")


def is_file_name(name: str) -> bool:
    """Whether a recipe is named by its file and not one that comes with kvfold."""
    return Path(name).suffix in (".yaml", ".yml")


def parse_assignments(texts: Sequence[str], settings: type[TrainSettings]) -> dict[str, Any]:
    """The values of `--set key=value` texts, checked like a recipe's."""
    import yaml

    found = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            raise UserError(f"--set '{text}': it is a key and a value: write e.g. --set learning_rate=3e-5")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--set '{text}': the value can't be read: write e.g. --set learning_rate=3e-5") from error
    return checked_values(found, settings, where="--set")


def checked_values(values: Mapping[str, Any], settings: type[TrainSettings], *, where: str) -> dict[str, Any]:
    """The same values, each of the kind that its key has, under the names that keys have now."""
    checked = {}
    for name, value in values.items():
        key = settings.key_of(str(name))
        if key is None:
            raise UserError(f"{where}: {_unknown('key', str(name), list(settings.model_fields))}")
        try:
            checked[key] = settings.value_of(key, value)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    return checked


def _unknown(what: str, name: str, known: Sequence[str]) -> UserError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return UserError(f"unknown {what} '{name}': the nearest is '{near[0]}': use one of {', '.join(known)}")
