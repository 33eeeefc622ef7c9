"""What fitting has done so far, in a folder: one file of weights for each finished layer, so that it goes on where it was."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvfold.models.decoder import FoldForCausalLM


class FitState:
    """The finished layers of one fit. A folder of another model, text or setting is begun anew. `None`: nothing is kept."""

    def __init__(self, folder: Path | None, fingerprint: str):
        self._folder, self._fingerprint = folder, fingerprint

    def read(self, layer: int) -> dict[str, Tensor] | None:
        """The weights that this layer's turn changed; None where it isn't finished, or was for something else."""
        if self._folder is None:
            return None
        try:
            with safe_open(self._path(layer), framework="pt") as file:
                if (file.metadata() or {}).get("fingerprint") != self._fingerprint:
                    return None
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        except (OSError, SafetensorError):
            return None

    def write(self, layer: int, weights: Mapping[str, Tensor]) -> None:
        """Keep what this layer's turn changed; found whole or not at all."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._path(layer).with_suffix(".partial")
        tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        save_file(tensors, partial, metadata={"fingerprint": self._fingerprint})
        os.replace(partial, self._path(layer))

    def _path(self, layer: int) -> Path:
        return self._folder / f"layer-{layer:04d}.safetensors"


def fingerprint_of(original: FoldForCausalLM, converted: FoldForCausalLM, ids_WT: Tensor, options: object) -> str:
    """What decides a fit's result: weights (by their sums), both layouts, the text, the options."""
    digest = hashlib.sha256(ids_WT.to(torch.int64).cpu().numpy().tobytes())
    for model in (original, converted):
        digest.update(repr(model.config.layout.to_json()).encode())
        for name, weight in model.state_dict().items():
            digest.update(f"{name} {weight.double().sum().item()!r}".encode())
    digest.update(repr(options).encode())
    return digest.hexdigest()
