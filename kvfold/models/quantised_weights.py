"""Checkpoints whose weights others have quantised: read by transformers, and widened to plain weights as they are loaded.

kvfold runs on the widened weights: the checkpoint's values, exactly, in memory of the wanted dtype. What a checkpoint says of
quantised activations is left out (Differs: they would only lose accuracy here). Formats that transformers reads by kernels
for GPUs alone are refused by name.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import CompressedTensorsConfig, FineGrainedFP8Config

from kvfold.errors import UserError

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
