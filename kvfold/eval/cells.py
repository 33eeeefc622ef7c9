"""Measurements that outlive the run: one small JSON file for each, found again by everything that could change it.

A cell that was measured is not measured again by the same versions on the same machine; a torn or foreign file counts as
none. Each says what it was made by (record.py), and goes with that into the rows of a result.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kvfold.data.whole_file import write_whole_file
from kvfold.layout.kvlayout import KVLayout
from kvfold.record import made, made_alike

_FORMAT = 1
_VOLATILE = ("trained_tokens", "transformers_version", "_name_or_path", "layout", "base_layout")
"""Parts of a config that don't change what the model computes, or stand in the key by themselves."""


class Cells:
    """Finished measurements in a folder; without a folder nothing is kept."""

    def __init__(self, folder: "str | Path | Cells | None", *, fresh: bool = False):
        """`fresh`: what lies there is measured again, and replaced."""
        if isinstance(folder, Cells):
            folder, fresh = folder._folder, folder._fresh
        self._folder, self._fresh = None if folder is None else Path(folder), fresh

    def read(self, name: str, key: Mapping[str, Any], of: str | None = None) -> dict[str, Any] | None:
        """The measurement under this name and key with its record, `made`, or None. `of`: a digest of what was read, where the
        key does not tell; a cell that was made of something else counts as none, and so does one that other versions made,
        another processor or another number of threads.
        """
        if self._folder is None or self._fresh:
            return None
        try:
            data = json.loads(self._path(name, key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        same = isinstance(data, dict) and data.get("format") == _FORMAT and data.get("key") == _plain(key)
        same = same and data.get("of", of) == of and isinstance(data.get("cell"), dict)
        if not (same and made_alike(data["cell"].get("made") or {}, made(torch.get_num_threads()))):
            return None
        return data["cell"]

    def write(
        self, name: str, key: Mapping[str, Any], cell: Mapping[str, Any], of: str | None = None
    ) -> dict[str, Any]:
        """Keep a measurement, and give it back with its record; the file is there whole or not at all."""
        cell = {**cell, "made": made(torch.get_num_threads())}
        if self._folder is not None:
            made_of = {} if of is None else {"of": of}
            text = json.dumps({"format": _FORMAT, "key": key, **made_of, "cell": cell}, indent=1)
            write_whole_file(self._path(name, key), text + "\n")
        return cell

    def _path(self, name: str, key: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(_plain(key), sort_keys=True).encode()).hexdigest()
        return self._folder / f"{re.sub(r'[^0-9A-Za-z]+', '-', name).strip('-')}-{digest[:12]}.json"


def model_key(model: nn.Module, name: str) -> dict[str, Any]:
    """What identifies a model among measurements: its name, config, device, dtype, and a SHA-256 of its weights."""
    return {"name": name, "fingerprint": fingerprint(model), "device": model.device.type, "dtype": str(model.dtype)}


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's config and weights. All weights are read once for each model, and again where they changed."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _VOLATILE}
    about = json.dumps(config, sort_keys=True, default=str)
    state = (about, *(_state(name, weight) for name, weight in model.named_parameters()))
    known = _FINGERPRINTS.get(model)
    if known is not None and known[0] == state:
        return known[1]
    digest = hashlib.sha256(about.encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(_raw(weight))
    _FINGERPRINTS[model] = state, digest.hexdigest()
    return digest.hexdigest()


_FINGERPRINTS: WeakKeyDictionary[nn.Module, tuple[tuple, str]] = WeakKeyDictionary()
"""Of models that are alive: what their weights looked like, and their fingerprint then."""
_PROBED = 16
"""Values of each weight that are compared, for changes that torch does not count (`weight.data`)."""


def _state(name: str, weight: Tensor) -> tuple:
    """What differs once a weight has changed: torch counts changes in place, new memory is elsewhere, and a few values."""
    flat = weight.detach().reshape(-1)
    probed = flat[:: max(1, flat.numel() // _PROBED)].tolist()
    version = None if weight.is_inference() else weight._version
    return name, tuple(weight.shape), weight.dtype, weight.data_ptr(), version, *map(str, probed)


def model_about(model: nn.Module, key: Mapping[str, Any]) -> dict[str, Any]:
    """What a result says of its model, `model`, and of where it ran, `environment`. `key`: its `model_key`."""
    return {
        "model": {"name": key["name"], "parameters": model.num_parameters(), "fingerprint": key["fingerprint"]},
        "environment": {
            "device": model.device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        },
    }


def ids_key(*ids: Iterable[int]) -> str:
    """A digest of token ids: the same text under another tokenizer is another measurement."""
    return hashlib.sha256(json.dumps([list(map(int, some)) for some in ids]).encode()).hexdigest()


def layout_key(layout: KVLayout) -> str:
    """A layout as a short text that differs wherever the layout does."""
    return hashlib.sha256(json.dumps(layout.to_json(), sort_keys=True).encode()).hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _plain(key: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(key))
