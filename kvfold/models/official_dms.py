"""Reading DMS checkpoints in the published format: its config keys, and the two modules that it adds to each attention.

The rest of such a checkpoint is the family's own, and is read like any other.
"""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from kvfold.methods.gates import GateConfig

_DEFAULTS = {
    "dms_alpha_scale": 100.0,
    "dms_initial_alpha_offset": 5.0,
    "dms_window_size": 512,
    "dms_separate_alpha": False,
    "dms_alpha_per": "head",
    "dms_tau": 0.1,
    "dms_disable_eviction": False,
}
"""What the official config class takes for keys that it doesn't write."""
_MODULES = {"dms_proj_alpha": "fold_proj", "dms_proj_alpha_norm": "fold_norm"}
"""Theirs and ours."""


def official_gates(theirs: PreTrainedConfig) -> tuple[GateConfig, str] | None:
    """The gates and the method's text form that a config of the official format describes; None for any other config.

    Source: arXiv 2506.05345; the format of its public code.
    Differs: decisions in fp32.
    """
    keys = [key for key in vars(theirs) if key.startswith("dms_")]
    if not keys and not any("DMS" in name for name in getattr(theirs, "architectures", None) or []):
        return None
    values = {key: getattr(theirs, key, default) for key, default in _DEFAULTS.items()}
    gates = GateConfig(
        method="dms", source="adapter" if values["dms_separate_alpha"] else "channel", reads="next",
        per=values["dms_alpha_per"], scale=values["dms_alpha_scale"], offset=values["dms_initial_alpha_offset"],
        tau=values["dms_tau"],
    )  # fmt: skip
    return gates, "full" if values["dms_disable_eviction"] else f"dms:{values['dms_window_size']}"


def official_weights(source: str, options: dict[str, Any], names: list[str]) -> dict[str, Tensor]:
    """Of the weights that the family itself doesn't know, those of DMS, under our names. `source`: a folder or a hub name."""
    wanted = {name: ours for name in names if (ours := _renamed(name)) is not None}
    if not wanted:
        return {}
    found = {}
    for file in _weight_files(source, options):
        with safe_open(file, framework="pt") as tensors:
            for name in wanted.keys() & set(tensors.keys()):
                found[wanted[name]] = tensors.get_tensor(name)
    return found


def _renamed(name: str) -> str | None:
    stem, _, kind = name.rpartition(".")
    head, _, module = stem.rpartition(".")
    return f"{head}.{_MODULES[module]}.{kind}" if module in _MODULES else None


def _weight_files(source: str, options: dict[str, Any]) -> list[str | Path]:
    single = cached_file(source, "model.safetensors", _raise_exceptions_for_missing_entries=False, **options)
    if single is not None:
        return [single]
    index = cached_file(source, "model.safetensors.index.json", **options)
    return get_checkpoint_shard_files(source, index, **options)[0]
