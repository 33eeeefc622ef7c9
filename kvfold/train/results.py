"""Writing what training leaves: an adapter's folder, or a whole model's. Files appear under their names when they are whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GenerationMixin

from kvfold.models.adapters import ABOUT, WEIGHTS, AdapterAbout, Base
from kvfold.models.decoder import FoldForCausalLM
from kvfold.train.settings import RetrofitSettings
from kvfold.train.student import GATE_MODULES, lora_layers

_LAST = {ABOUT: 1, "config.json": 1}
"""A folder is loaded by these, so they come last."""


def write_trained(
    model: FoldForCausalLM,
    tokenizer: Any,
    settings: RetrofitSettings,
    base: Base,
    folder: Path,
    *,
    card: str | None = None,
    tokens: int | None = None,
) -> None:
    """The adapter or the whole model in `folder`, with the card where there is one; what else lies there stays. `tokens`:
    trained on, where that is known.
    """
    with _staged(folder, card) as staged:
        if settings.trains == "full":
            before = model.config.trained_tokens
            if tokens is not None:
                model.config.trained_tokens = (before or 0) + tokens
            _write_model(model, tokenizer, staged)
            model.config.trained_tokens = before  # a snapshot is not the end
        else:
            _write_adapter(model, base, staged, tokens)


def write_model(model: FoldForCausalLM, tokenizer: Any, folder: Path, *, card: str) -> None:
    """A model's folder, with its card; what else lies there stays."""
    with _staged(folder, card) as staged:
        _write_model(model, tokenizer, staged)


@contextmanager
def _staged(folder: Path, card: str | None) -> Iterator[Path]:
    """A folder to write in, whose files then take their places."""
    staged = folder / ".partial-result"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
        if card is not None:
            (staged / "README.md").write_text(card, encoding="utf-8")
        for file in sorted(staged.iterdir(), key=lambda path: (_LAST.get(path.name, 0), path.name)):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def is_written(folder: Path, settings: RetrofitSettings) -> bool:
    """Whether the result is there."""
    return (folder / ("config.json" if settings.trains == "full" else ABOUT)).is_file()


def _write_model(model: FoldForCausalLM | GenerationMixin, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _write_adapter(model: FoldForCausalLM, base: Base, folder: Path, tokens: int | None) -> None:
    weights = {
        name: weight for name, weight in model.named_parameters() if name.split(".")[-2] in GATE_MODULES
    }  # fmt: skip
    layers = lora_layers(model)
    scales = {layer.scaling["default"] for layer in layers.values()}
    assert len(scales) <= 1
    for name, layer in layers.items():
        weights[f"{name}.lora_A"], weights[f"{name}.lora_B"] = (
            layer.lora_A["default"].weight,
            layer.lora_B["default"].weight,
        )
    config = model.config
    learned = config.gates is not None
    about = AdapterAbout(
        base=base, time=config.layout.time_text() if learned else None, gates=config.gates,
        lora={"scale": scales.pop()} if scales else None, trained_tokens=tokens,
        kept_ratios=config.kept_ratios if learned else None,
    )  # fmt: skip
    saved = {
        name: weight.detach().to(device="cpu", dtype=torch.float32).contiguous() for name, weight in weights.items()
    }
    if not saved:
        # The format needs a tensor: gates of a frozen channel have none.
        raise RuntimeError("nothing was trained that an adapter could hold")
    save_file(saved, folder / WEIGHTS)
    (folder / ABOUT).write_text(about.to_text(), encoding="utf-8")
