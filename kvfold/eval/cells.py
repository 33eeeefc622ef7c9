"""Measurements that outlive the run: one small JSON file for each, found again by everything that could change it.

A cell that was measured is not measured again by the same versions on the same machine; a torn or foreign file counts as
none. Each says what it was made by (record.py), and goes with that into the rows of a result.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kvfold.errors import UserError, one_line
from kvfold.eval.reading import method_about
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.load import quiet
from kvfold.models.source import find_source
from kvfold.record import made, made_alike, write_whole_file


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """A model to be measured beside another."""

    label: str
    """What its rows are called."""
    open: Callable[[], FoldForCausalLM]
    """Loads it."""
    trained_tokens: int | None = None
    """Tokens it was trained on to become what it is; None = not known."""


def check_labels(beside: Sequence[Beside]) -> None:
    """Raises `UserError` where two models would have the same name."""
    twice, count = Counter(other.label for other in beside).most_common(1)[0] if beside else ("", 0)
    if count > 1:
        raise UserError(f"two models beside are called '{twice}': a row's name is its folder's: rename one of the two")


@contextmanager
def opened(other: Beside, first: FoldForCausalLM) -> Iterator[FoldForCausalLM]:
    """The other model. Raises `UserError` where it does not read the first one's tokens."""
    model = other.open()
    if model.config.vocab_size != first.config.vocab_size:
        raise UserError(
            f"{other.label}: its vocabulary has {model.config.vocab_size:,} tokens and the model's "
            f"{first.config.vocab_size:,}: put models with the same tokenizer beside each other"
        )
    yield model


def method_beside(other: Beside, layout: KVLayout) -> str:
    """The method of another model's row: its own, and whose it is."""
    return f"{layout.time_text()} of {other.label}"


def about_beside(other: Beside, layout: KVLayout) -> dict[str, object]:
    """As `method_about`; a model that drops nothing goes by its own name."""
    about = method_about(layout)
    folds = layout != layout.base()
    return {
        "method": method_beside(other, layout),
        "title": about["title"] if folds else other.label,
        "trained": True,
        "model": other.label,
        "trained_tokens": other.trained_tokens,
        "layers": layout.layers_text(),
    }


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
        if not isinstance(data, dict) or not isinstance(cell := data.get("cell"), dict):
            return None
        same = (data.get("format"), data.get("key"), data.get("of", of)) == (_FORMAT, _plain(key), of)
        return cell if same and made_alike(cell.get("made") or {}, made(torch.get_num_threads())) else None

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

    def measured(
        self, name: str, key: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]], of: str | None = None
    ) -> dict[str, Any]:
        """What lies there, or else what is measured now."""
        return self.read(name, key, of) or self.write(name, key, measure(), of)

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
    about = {"name": key["name"], "parameters": model.num_parameters(), "fingerprint": key["fingerprint"]}
    dtype, threads = str(model.dtype).removeprefix("torch."), torch.get_num_threads()
    return {"model": about, "environment": {"device": model.device.type, "dtype": dtype, "threads": threads}}


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


def load_theirs(source: str | Path, *, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """The other side of a comparison: transformers' model of a folder, hub name or .gguf file, with SDPA attention, in eval
    mode. Raises `UserError` for a kvfold checkpoint, which plain transformers has no class for.
    """
    found = find_source(source)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(found.name, **found.options)
            if config.model_type == FoldConfig.model_type:
                raise UserError(
                    f"{found}: a kvfold checkpoint, which transformers has no class for: give the one it was made from"
                )
            model = AutoModelForCausalLM.from_pretrained(
                found.name, dtype=dtype, attn_implementation="sdpa", **found.options
            )
    except OSError as error:
        raise UserError(
            f"{found}: transformers can't read it ({one_line(error)}): fetch the checkpoint again"
        ) from error
    return model.to(device).eval()
