"""What a model's source is, and whether it is whole: looked up before anything large is read."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from kvfold.errors import UserError, one_line
from kvfold.models.config import FoldConfig
from kvfold.models.families import family_named
from kvfold.models.quantised_weights import check_quantisation

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A folder, a hub name, or one GGUF file in a folder."""

    name: str
    """Folder or hub name."""
    gguf: str | None = None
    """The GGUF file in the folder."""

    def __str__(self) -> str:
        return self.name if self.gguf is None else str(Path(self.name, self.gguf))

    @property
    def options(self) -> dict[str, str]:
        """transformers' options beside the name."""
        return {} if self.gguf is None else {"gguf_file": self.gguf}


def find_source(source: str | Path) -> Source:
    """What `source` names. A hub name is one or two words; raises `UserError` where a path leads nowhere."""
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return Source(name=str(path))
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path}: a single file is read as GGUF only: give the model's folder")
        return Source(name=str(path.parent), gguf=path.name)
    named = isinstance(source, str) and len(path.parts) in (1, 2) and not source.startswith((".", "/", "~"))
    if not named or path.suffix == ".gguf":
        raise UserError(f"{source}: there is no such file or folder: correct the path")
    return Source(name=str(source))


def check_source(found: Source) -> None:
    """Raise `UserError`, in one line, for a model of an unknown family or with files that can't be read."""
    if found.gguf is not None:
        return
    folder = Path(found.name)
    if folder.is_dir():
        _check_family(found, _read_json(folder / "config.json"))
        _check_weights(folder)
    else:
        _check_family(found, _hub_config(found))


def _check_family(found: Source, config: dict[str, Any]) -> None:
    if config.get("model_type") != FoldConfig.model_type:
        family_named(config.get("model_type"))
    check_quantisation(str(found), config)


def _hub_config(found: Source) -> dict[str, Any]:
    try:
        return PreTrainedConfig.get_config_dict(found.name)[0]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{found}: no folder here, and no model of that name on the hub ({one_line(error)}): correct the name"
        ) from error


def _check_weights(folder: Path) -> None:
    """Every safetensors file opens: a file cut short says so there, not after minutes of loading."""
    index = folder / _INDEX
    if (folder / _SINGLE).is_file():
        files = [_SINGLE]
    elif index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index}: it has no weight_map: fetch the checkpoint again")
        files = sorted(set(weight_map.values()))
    else:
        raise UserError(
            f"{folder}: no {_SINGLE} or {_INDEX} there: kvfold reads safetensors only: save the model as safetensors"
        )
    for name in files:
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{folder / name}: it can't be read ({one_line(error)}): fetch the checkpoint again"
            ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path.parent}: no {path.name} there: a model's folder has one: give the folder that holds it"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: it is not JSON ({one_line(error)}): fetch the checkpoint again") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: it holds a {type(data).__name__}, not an object: fetch the checkpoint again")
    return data
