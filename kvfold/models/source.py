"""What a model's source is, and whether it is whole: looked up before anything large is read. Checkpoints whose weights others
have quantised are read by transformers, and widened to plain weights as they are loaded.

kvfold runs on the widened weights: the checkpoint's values, exactly, in memory of the wanted dtype. What a checkpoint says of
quantised activations is left out (Differs: they would only lose accuracy here). Formats that transformers reads by kernels for
GPUs alone are refused by name.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CompressedTensorsConfig, FineGrainedFP8Config

from kvfold.errors import UserError, one_line
from kvfold.layout.hf_config import hub_config, read_json
from kvfold.models.config import FoldConfig
from kvfold.models.families import family_named

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
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json there: give the folder that holds a model's")
        _check_family(found, read_json(folder / "config.json"))
        _check_weights(folder)
    else:
        _check_family(found, hub_config(found.name))


def _check_family(found: Source, config: dict[str, Any]) -> None:
    if config.get("model_type") != FoldConfig.model_type:
        family_named(config.get("model_type"))
    check_quantisation(str(found), config)


def _check_weights(folder: Path) -> None:
    """Every safetensors file opens: a file cut short says so there, not after minutes of loading."""
    index = folder / _INDEX
    if (folder / _SINGLE).is_file():
        files = [_SINGLE]
    elif index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index}: it has no weight_map: fetch the checkpoint again")
        files = sorted(set(weight_map.values()))
    else:
        raise UserError(f"{folder}: no {_SINGLE} or {_INDEX} there: kvfold reads safetensors only: save it so")
    for name in files:
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{folder / name}: can't be read ({one_line(error)}): fetch the checkpoint again"
            ) from error


_PACKAGES = {"fp8": None, "compressed-tensors": "compressed_tensors", "torchao": "torchao"}
"""What is read -> the package that it takes besides transformers."""
_LEFTOVERS = ("weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "input_scale", "input_zero_point")
"""What compressed-tensors leaves beside a widened weight."""


def check_quantisation(source: str, config: Mapping[str, Any]) -> None:
    """Raise `UserError`, in one line, for a config.json whose weights are quantised in a form that can't be read here."""
    method = _method(config)
    if method is None:
        return
    if method not in _PACKAGES:
        raise UserError(
            f"{source}: its weights are quantised by {method}, which transformers reads with kernels of other packages: kvfold "
            f"reads plain weights, GGUF, {', '.join(_PACKAGES)}: use a checkpoint in one of these"
        )
    package = _PACKAGES[method]
    if package is not None and find_spec(package) is None:
        name = package.replace("_", "-")
        raise UserError(
            f"{source}: its weights are quantised by {method}, and {name} is not installed: run 'pip install {name}'"
        )


def reading_options(config: Any) -> dict[str, Any]:
    """Options of `from_pretrained` with which transformers widens the weights of a checkpoint with this config."""
    kind = {"fp8": FineGrainedFP8Config, "compressed-tensors": CompressedTensorsConfig}
    wanted = kind.get(_method(config.to_dict()))
    return {} if wanted is None else {"quantization_config": wanted(dequantize=True)}


def widened(config: Any, weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A state dict as transformers gave it with `reading_options`, without anything quantised; other checkpoints as they are."""
    method = _method(config.to_dict())
    if method == "compressed-tensors":
        return {name: weight for name, weight in weights.items() if not name.endswith(_LEFTOVERS)}
    if method == "torchao":
        return {name: _plain(weight).to(dtype) for name, weight in weights.items()}
    return weights


def _plain(weight: Tensor) -> Tensor:
    """torchao's weights are kinds of tensor of their own."""
    return weight if type(weight) in (Tensor, torch.nn.Parameter) else weight.dequantize()


def _method(config: Mapping[str, Any]) -> str | None:
    about = config.get("quantization_config")
    if not about:
        return None
    about = about if isinstance(about, Mapping) else about.to_dict()
    method = about.get("quant_method", "an unnamed method")
    return getattr(method, "value", method)
