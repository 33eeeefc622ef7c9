"""From our model back to its family's own, for plain transformers: possible wherever the family's config can say it all.

The reverse of families.py, checked by going there and back.
"""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kvfold.errors import UserError, one_line
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.families import family_named, family_weights, fold_config

_OURS_ALONE = (
    "trained_tokens",
    "freed_layers",
    "layout",
    "base_layout",
    "architectures",
    "transformers_version",
    "_name_or_path",
)
"""What a config says of itself that going there and back need not keep."""


def check_exportable(config: FoldConfig) -> None:
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
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"for transformers: {reason}, which only kvfold can run: leave it out, or write for kvfold")


def family_config(config: FoldConfig) -> PreTrainedConfig:
    """The transformers config of our family that means what ours means. Raises `UserError` where there is none."""
    check_exportable(config)
    family = family_named(config.family)
    values = {name: getattr(config, name) for name in config.to_dict() if hasattr(config, name)}
    values = {name: value for name, value in values.items() if name not in (*_OURS_ALONE, "family", "model_type")}
    heads = config.layout.layers[0].num_kv_heads
    theirs: dict[str, Any] = {**values, "num_key_value_heads": heads}
    for ours, (name, power) in family.taken.items():
        value = getattr(config, ours)
        theirs[name] = value if power == 1 else _rounded(value ** (1.0 / power))
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
    if isinstance(ours, float) and isinstance(theirs, float):
        return abs(ours - theirs) <= 1e-9 * abs(theirs)
    return ours == theirs


def _rounded(value: float) -> float | int:
    """A power and its root leave a whole number a little beside itself."""
    whole = round(value)
    return whole if abs(value - whole) < 1e-6 * max(1.0, abs(value)) else value
