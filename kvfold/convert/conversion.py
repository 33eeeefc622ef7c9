"""Converting a model to another layout: fewer KV heads, shared layers. Loading, checking and writing around what heads.py and
fitted.py do to the weights, the text that these are fitted on; and from our model back to its family's own, for plain
transformers, wherever the family's config can say it all: the reverse of families.py and weights.py, checked by going there
and back.

Letters: W windows of calibration text, T tokens of a window.
"""

import os
import shutil
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kvfold.convert.fitted import Fit, fit
from kvfold.convert.heads import average_groups, drop_readers, like_heads_together, merge_heads, reorder_heads
from kvfold.data import read_text_file, text_windows
from kvfold.errors import UserError, one_line, unknown_name
from kvfold.eval.progress import Report, silent
from kvfold.integrations import vllm
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.families import family_named, family_weights, fold_config
from kvfold.models.load import check_folder, load, load_config, write_model
from kvfold.models.source import find_source


def calibration_windows(tokenizer: Any, files: Sequence[Path], *, tokens: int, context_tokens: int) -> Tensor:
    """Token ids [W, T] of about `tokens` tokens, an equal share of windows from each file, evenly spaced over it.

    Raises `UserError` where that is less than a window.
    """
    windows = tokens // context_tokens
    if windows < 1:
        raise UserError(
            f"{tokens} tokens of calibration text: a window has {context_tokens}, and 1 window is the least: ask for more"
        )
    shares = [len(range(place, windows, len(files))) for place in range(len(files))]
    sizes = [
        (path, {"windows": share, "context_tokens": context_tokens}) for path, share in zip(files, shares, strict=True)
    ]
    read = [(read_text_file(path), size) for path, size in sizes if size["windows"]]
    return torch.cat([text_windows(text, tokenizer, **size).ids_WT for text, size in read])


_OURS_ALONE = (
    *("trained_tokens", "freed_layers", "layout", "base_layout"),
    *("architectures", "transformers_version", "_name_or_path"),
)
"""What a config says of itself that going there and back need not keep."""


def _check_exportable(config: FoldConfig) -> None:
    """Raise `UserError`, in one line, for a model that no config of its family describes."""
    layout = config.layout
    reasons = {
        f"it shares layers ({layout.layers_text()})": len(layout.owners) < layout.num_layers,
        "its layers have different numbers of KV heads": len({layer.num_kv_heads for layer in layout.layers}) > 1,
        f"it folds along time ({layout.time_text()})": layout.time != layout.base().time,
        f"its bits are {layout.bits_text()}": layout.bits != layout.base().bits,
        "its gates have weights of their own": config.gates is not None,
        "its keys and values have a norm of their own": config.kv_norm,
        "a channel of it is freed": config.channel_freed,
    }
    if told := next((reason for reason, holds in reasons.items() if holds), None):
        raise UserError(f"for transformers: {told}, which only kvfold can run: leave it out, or write for kvfold")


def family_config(config: FoldConfig) -> PreTrainedConfig:
    """The transformers config of our family that means what ours means. Raises `UserError` where there is none."""
    _check_exportable(config)
    family = family_named(config.family)
    names = set(config.to_dict()) - {*_OURS_ALONE, "family", "model_type"}
    heads = config.layout.layers[0].num_kv_heads
    theirs = {name: getattr(config, name) for name in names if hasattr(config, name)} | {"num_key_value_heads": heads}
    for ours, (name, power) in family.taken.items():
        value = getattr(config, ours)
        if power != 1:  # a power and its root leave a whole number a little beside itself
            value = value ** (1.0 / power)
            value = round(value) if abs(value - round(value)) < 1e-6 * max(1.0, abs(value)) else value
        theirs[name] = value
    if family.windowed == "always":
        # One window for all needs no list of types, which these families don't know.
        theirs.pop("layer_types", None)
    if family.windowed == "typed":
        theirs["use_sliding_window"] = config.sliding_window is not None
    if family.rope_flags is not None:
        theirs[family.rope_flags] = [int(layer not in config.nope_layers) for layer in range(config.num_hidden_layers)]
    try:
        found = CONFIG_MAPPING[config.family](**theirs)
        again = fold_config(found)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"for transformers: {config.family} can't say this config ({one_line(error)}): write for kvfold"
        ) from error
    differing = _differing(config, again, heads)
    if differing:
        raise UserError(f"for transformers: {config.family} can't say {', '.join(differing)}: write for kvfold")
    return found


def export_model(model: FoldForCausalLM) -> PreTrainedModel:
    """The family's own model with the same weights, which are handed over, not copied."""
    config = family_config(model.config)
    config.dtype = model.dtype
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    weights = family_weights(dict(model.state_dict()), theirs.state_dict().keys())
    theirs.load_state_dict(weights, assign=True)
    theirs.tie_weights()
    theirs.generation_config = model.generation_config
    return theirs.eval()


def _differing(config: FoldConfig, again: FoldConfig, heads: int) -> list[str]:
    ours, theirs = config.to_dict() | {"num_key_value_heads": heads}, again.to_dict()
    names = [name for name in theirs if name not in _OURS_ALONE and not _same(ours.get(name), theirs[name])]
    return names + (["the layout"] if again.layout.layers != config.layout.layers else [])


def _same(ours: Any, theirs: Any) -> bool:
    both = isinstance(ours, float) and isinstance(theirs, float)
    return abs(ours - theirs) <= 1e-9 * abs(theirs) if both else ours == theirs


INITS = ("mean", "drop", "fitted")
TARGETS = ("kvfold", "transformers", "vllm")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What a model is to become."""

    layers: str | None = None
    """The owner map as a `--layers` text; None = as it is."""
    heads: int | None = None
    """KV heads of each layer; None = as they are."""
    init: str = "mean"
    """What shared layers start from: `mean` or `drop`; `fitted` refits what is left on calibration text."""
    pair_heads: bool = False
    """Merge the KV heads that are most alike, instead of neighbours."""
    time: str | None = None
    """A `--time` text for the new layout."""
    bits: str | None = None
    """A `--bits` text for the new layout."""
    target: str = "kvfold"
    """Who will run what is written; for vLLM it is kvfold's own checkpoint, which the plugin there reads."""

    def __post_init__(self) -> None:
        for what, value, known in (("init", self.init, INITS), ("target", self.target, TARGETS)):
            if value not in known:
                raise unknown_name(what, value, known)


def convert(
    source: str | Path, out: str | Path, wanted: Conversion, *, config: FoldConfig | None = None,
    calibration_WT: Tensor | None = None, options: Fit | None = None, dtype: str | None = None,
    device: str | None = None, report: Report = silent,
) -> FoldForCausalLM:  # fmt: skip
    """Write `source` in another layout to the new folder `out`, and give the model that was written.

    `config`: the source's, where it was read already. `calibration_WT`: token ids for `fitted`. dtype None = the checkpoint's
    own. A `fitted` that was interrupted goes on after the last finished layer when it is started again. Raises `UserError`,
    in one line, before any weight is read for what can't be done.
    """
    out, found = Path(os.path.expanduser(out)), find_source(source)
    check_folder(out)
    config = new_config(config or load_config(source), wanted)
    check_target(config, wanted.target)
    if wanted.init == "fitted" and calibration_WT is None:
        raise UserError("init 'fitted': it needs text to fit on: give calibration text, or use 'mean' or 'drop'")
    stored = dtype or str(config.dtype or torch.float32).removeprefix("torch.")
    if stored not in DTYPES:
        raise unknown_name("dtype", stored, DTYPES)
    fitted = wanted.init == "fitted"
    model = load(source, dtype="float32" if fitted else stored, device=device)
    folder = out.with_name(f".{out.name}.fitting")
    if fitted and wanted.pair_heads and wanted.heads is not None:
        # Fitting holds a head against the original's in the same place.
        pair_heads(model, wanted.heads)
    converted = converted_model(model, config, wanted)
    if fitted:
        fit(model, converted, calibration_WT, options=options, folder=folder, report=report)
        converted.config.trained_tokens = (config.trained_tokens or 0) + calibration_WT.numel()
    del model
    converted = converted.to(getattr(torch, stored))
    write_model(export_model(converted) if wanted.target == "transformers" else converted, out, found)
    shutil.rmtree(folder, ignore_errors=True)
    return converted


def new_config(config: FoldConfig, wanted: Conversion) -> FoldConfig:
    """The config of the converted model. Raises `UserError` where its layers, heads or specs don't fit."""
    old = config.layout
    new = old if wanted.heads is None else old.with_heads(wanted.heads)
    new = new if wanted.layers is None else KVLayout.parse(wanted.layers, new)
    if new.layers != old.layers:
        _refuse_gates(config)
        _refuse_lost_specs(old, new)
    new = new if wanted.time is None else new.with_time(wanted.time)
    new = new if wanted.bits is None else new.with_bits(wanted.bits)
    found = deepcopy(config)
    found.layout, found.base_layout = new, config.base_layout
    heads = {layer.num_kv_heads for layer in new.layers}
    found.num_key_value_heads = heads.pop() if len(heads) == 1 else config.num_key_value_heads
    return found


def check_target(config: FoldConfig, target: str) -> None:
    """Raise `UserError`, in one line, for a model that the target can't run."""
    if target == "transformers":
        family_config(config)
    if target == "vllm" and (reason := vllm.explain_model(config)) is not None:
        raise UserError(f"for vllm: {reason}")


def pair_heads(model: FoldForCausalLM, num_kv_heads: int) -> None:
    """Put like KV heads side by side, in place, for merging them into so many; the model computes what it computed."""
    weights = dict(model.state_dict())
    for owner in model.config.layout.owners:
        order = like_heads_together(model.config, weights, owner, num_kv_heads)
        reorder_heads(model.config, weights, owner, order)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()


def converted_model(model: FoldForCausalLM, config: FoldConfig, wanted: Conversion) -> FoldForCausalLM:
    """A model of the new config: heads merged, layers shared. What doesn't change is the old model's own tensors."""
    weights = dict(model.state_dict())
    if wanted.heads is not None:
        merge_heads(model.config, weights, wanted.heads, pair=wanted.pair_heads)
    if wanted.init == "mean":
        average_groups(config, weights, config.layout)
    drop_readers(weights, config.layout)
    config = deepcopy(config)
    config.dtype = model.dtype
    with torch.device("meta"):
        new = FoldForCausalLM(config)
    new.load_state_dict(weights, assign=True)
    new.tie_weights()
    new.generation_config = model.generation_config
    return new.eval()


def _refuse_gates(config: FoldConfig) -> None:
    learned = sorted({spec.name for spec in config.layout.time if spec.trained})
    if config.gates is not None or learned:
        raise UserError(
            f"a model with learned {' and '.join(learned) or 'gates'}: merged heads or layers would mix its decisions: "
            "convert the model it was made from, and retrofit that"
        )


def _refuse_lost_specs(old: KVLayout, new: KVLayout) -> None:
    """An owner that becomes a reader takes over what its group does; where it had another spec, the user must choose."""
    for owner in old.owners:
        heir = new.owner_of(owner)
        for what, kept, taken in (
            ("time", old.time[old.index_of(owner)], new.time[new.index_of(heir)]),
            ("bits", old.bits_of(owner), new.bits_of(heir)),
        ):
            if kept != taken:
                raise UserError(
                    f"layer {owner} has {what} '{kept.format()}' of its own but would read layer {heir}, which has "
                    f"'{taken.format()}': a group has one: give the source one {what} for both, or share other layers"
                )
