"""Recipes: YAML files of settings, those that come with kvfold by name and others by path. No torch.

Any frozen dataclass of plain values can be filled from one: keys are its fields, and a key that it lacks is refused.
"""

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from kvfold.errors import UserError, one_line

Settings = TypeVar("Settings")


def recipe_names() -> list[str]:
    """Recipes that come with kvfold."""
    folder = resources.files("kvfold") / "assets" / "recipes"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def read_recipe(name: str, settings: type) -> dict[str, Any]:
    """The values of a recipe, checked against the fields of `settings`. Raises `UserError`, in one line, for a recipe that
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


def parse_assignments(texts: Sequence[str], settings: type) -> dict[str, Any]:
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


def checked_values(values: Mapping[str, Any], settings: type, *, where: str) -> dict[str, Any]:
    """The same values, each of the kind that its field has."""
    hints = typing.get_type_hints(settings)
    known = [one.name for one in fields(settings) if one.init]
    found = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where}: {_unknown('key', str(key), known)}")
        try:
            found[key] = _as_kind(value, hints[key])
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: {key} {value!r}: it is {_told(hints[key])}: correct it") from error
    return found


def _as_kind(value: Any, kind: Any) -> Any:
    """`value` as `kind`; raises where it is none. YAML reads 3e-5 as text, and 4 where 4.0 is meant."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in parts:
            return None
        return _as_kind(value, next(part for part in parts if part is not type(None)))
    if origin is typing.Literal:
        if value not in parts:
            raise ValueError
        return value
    if origin is tuple:
        return tuple(_as_kind(one, parts[0]) for one in ([value] if isinstance(value, str) else value))
    if kind is float and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float | str) and float(value).is_integer():
        return int(float(value))
    if type(value) is not kind:
        raise TypeError
    return value


def _told(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_told(part) for part in parts)
    if origin is typing.Literal:
        return " or ".join(map(str, parts))
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "a text", type(None): "empty"}
    return words.get(kind, "a list of texts")


def _unknown(what: str, name: str, known: Sequence[str]) -> UserError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return UserError(f"unknown {what} '{name}': the nearest is '{near[0]}': use one of {', '.join(known)}")
