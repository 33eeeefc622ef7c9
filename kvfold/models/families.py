"""How each family that the decoder knows maps to a FoldConfig, as plain data, and what is refused, by name; how its weights map
to ours and back; and what DMS checkpoints in the published format have beside them.

Weights keep transformers' names; only fused projections are cut apart. Tensors are handed over, not copied, so that a model
never lies in memory twice.
"""

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from kvfold.errors import UserError
from kvfold.layout.hf_config import read_sharing
from kvfold.methods.gates import GateConfig
from kvfold.models.config import FULL_ATTENTION, SLIDING_ATTENTION, FoldConfig

_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "dtype",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "mlp_bias",
)  # fmt: skip
"""Attributes that mean the same everywhere; a family that lacks one gets FoldConfig's default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What sets one family apart from Llama."""

    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Switches of FoldConfig that are the same for every member."""
    taken: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    """Our attribute -> theirs and the power it is raised to (1 = as it stands)."""
    windowed: Literal["never", "always", "typed"] = "never"
    """Which layers have `sliding_window`: none, all, or those that `layer_types` calls sliding."""
    partial_rotary: bool = False
    """Whether rotary positions may turn a part of each head only."""
    rope_flags: str | None = None
    """Their attribute that holds a false value for each layer without rotary positions."""
    alpha_rope: bool = False
    """Whether `alpha` of dynamic rotary positions is a factor of their base, whatever the length."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Their attribute, if it is set at all -> what can't be done with it."""


_BIASED = {"qkv_bias": ("attention_bias", 1), "o_bias": ("attention_bias", 1)}
_GEMMA = {"norm_offset": True}
_GEMMA_SCALES = {**_BIASED, "embedding_multiplier": ("hidden_size", 0.5)}
_GEMMA_SOFTCAPS = {
    "hidden_act": ("hidden_activation", 1),
    "attention_scale": ("query_pre_attn_scalar", -0.5),
    "final_logit_softcap": ("final_logit_softcapping", 1),
}
_BIDIRECTIONAL = {"use_bidirectional_attention": "attention to later tokens: kvfold folds causal decoders"}

FAMILIES: dict[str, Family] = {
    "gemma": Family(fixed=_GEMMA, taken=_GEMMA_SCALES, refused=_BIDIRECTIONAL),
    "gemma2": Family(
        fixed=_GEMMA | {"norm_placement": "sandwich"}, windowed="typed", refused=_BIDIRECTIONAL,
        taken=_GEMMA_SCALES | _GEMMA_SOFTCAPS | {"attention_softcap": ("attn_logit_softcapping", 1)},
    ),
    "gemma3_text": Family(
        fixed=_GEMMA | {"norm_placement": "sandwich", "qk_norm": "head"}, windowed="typed", refused=_BIDIRECTIONAL,
        taken=_GEMMA_SCALES | _GEMMA_SOFTCAPS,
    ),
    "granite": Family(taken=_BIASED | {
        "embedding_multiplier": ("embedding_multiplier", 1), "residual_multiplier": ("residual_multiplier", 1),
        "attention_scale": ("attention_multiplier", 1), "logit_scale": ("logits_scaling", -1),
    }),
    "hunyuan_v1_dense": Family(fixed={"qk_norm": "rotated"}, taken=_BIASED, alpha_rope=True),
    "llama": Family(taken=_BIASED),
    "mistral": Family(windowed="always"),
    "olmo2": Family(fixed={"norm_placement": "post", "qk_norm": "full"}, taken=_BIASED),
    "phi3": Family(windowed="always", partial_rotary=True),
    "qwen2": Family(fixed={"qkv_bias": True}, windowed="typed"),
    "qwen3": Family(fixed={"qk_norm": "head"}, taken=_BIASED, windowed="typed"),
    "smollm3": Family(taken=_BIASED, windowed="typed", rope_flags="no_rope_layers"),
}  # fmt: skip
"""transformers' model_type -> what its config means."""


def family_named(model_type: str | None) -> Family:
    """The family of a model_type. Raises `UserError` where the decoder doesn't know it."""
    if model_type not in FAMILIES:
        raise UserError(f"model family '{model_type}': kvfold has no decoder for it: it knows {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def fold_config(theirs: PreTrainedConfig) -> FoldConfig:
    """The FoldConfig of a transformers config: the plain layout, or who reads whom where the config says so in a grammar of
    hf_config.py. Raises `UserError` for what the decoder can't do.

    Differs: dropout, which some configs ask for in training, is left out.
    """
    family = family_named(theirs.model_type)
    for problem in _problems(family, theirs):
        raise UserError(f"{theirs.model_type} with {problem}: choose another checkpoint")
    values = {name: getattr(theirs, name) for name in _SHARED if hasattr(theirs, name)}
    for ours, (name, power) in family.taken.items():
        value = getattr(theirs, name)
        values[ours] = value if power == 1 else value**power
    if family.rope_flags is not None:
        flags = getattr(theirs, family.rope_flags)
        values["nope_layers"] = [layer for layer, rotated in enumerate(flags) if not rotated]
    values |= {**_windows(family, theirs), **family.fixed}
    config = FoldConfig(family=theirs.model_type, rope_parameters=_rope_parameters(family, theirs), **values)
    config.layout = read_sharing(theirs.to_dict(), config.layout)
    retrofitted = official_gates(theirs)
    if retrofitted is not None:
        gates, time = retrofitted
        config.gates, config.layout = gates.to_json(), config.layout.with_time(time)
    return config


def _rope_parameters(family: Family, theirs: PreTrainedConfig) -> dict[str, Any]:
    """Theirs, with an `alpha` worked into the base.

    Differs: transformers forgets it beyond `max_position_embeddings` and scales the plain base.
    """
    parameters = deepcopy(theirs.rope_parameters)
    if not family.alpha_rope or parameters.get("rope_type") != "dynamic" or not parameters.get("alpha"):
        return parameters
    base = parameters["rope_theta"] * parameters["alpha"] ** (theirs.head_dim / (theirs.head_dim - 2))
    return {"rope_type": "default", "rope_theta": base}


def _windows(family: Family, theirs: PreTrainedConfig) -> dict[str, Any]:
    window = getattr(theirs, "sliding_window", None)
    if family.windowed == "never" or window is None:
        # The types stay where rotary positions differ by type.
        return {"layer_types": getattr(theirs, "layer_types", None)} if _nested(theirs.rope_parameters) else {}
    if family.windowed == "always":
        return {"sliding_window": window}
    return {"sliding_window": window, "layer_types": list(theirs.layer_types)}


def _problems(family: Family, theirs: PreTrainedConfig) -> Iterator[str]:
    """In what a variant of a known family would be computed wrongly."""
    for attribute, reason in family.refused.items():
        if getattr(theirs, attribute, None):
            yield f"{attribute}={getattr(theirs, attribute)}: {reason}"
    foreign = set(getattr(theirs, "layer_types", None) or []) - {FULL_ATTENTION, SLIDING_ATTENTION}
    if foreign:
        yield f"layers of type {', '.join(sorted(foreign))}: only full and sliding attention are known"
    if theirs.is_heterogeneous:
        yield "per_layer_config: kvfold's layers differ in their KV only"
    rope = theirs.rope_parameters
    for parameters in rope.values() if _nested(rope) else [rope]:
        kind, part = parameters.get("rope_type", "default"), parameters.get("partial_rotary_factor", 1.0)
        if kind not in ("default", *ROPE_INIT_FUNCTIONS):
            yield f"rope_type '{kind}': transformers knows {', '.join(ROPE_INIT_FUNCTIONS)}"
        if kind in ("yarn", "longrope") and family.fixed.get("qk_norm") == "rotated":
            yield f"rope_type '{kind}': it scales heads before a norm that stands behind it"
        if part != 1.0 and not family.partial_rotary:
            partial = ", ".join(name for name, family in FAMILIES.items() if family.partial_rotary)
            yield f"partial_rotary_factor {part}: only {partial} turn a part of each head"


def _nested(rope_parameters: Mapping[str, Any]) -> bool:
    return all(isinstance(value, dict) for value in rope_parameters.values())


def fold_weights(config: FoldConfig, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict out of a state dict of `config.family`, which is emptied as it goes.

    Parts of a fused projection are copies: views of one storage would be saved and trained as one.
    """
    ours = {}
    for name in list(theirs):
        tensor, (stem, module, kind) = theirs.pop(name), _split_name(name)
        if module not in _FUSED:
            ours[name] = tensor
            continue
        parts = _FUSED[module]
        rows = [getattr(config, heads) * config.head_dim if heads else config.intermediate_size for _, heads in parts]
        for (part, _), piece in zip(parts, tensor.split(rows), strict=True):
            ours[f"{stem}.{part}.{kind}"] = piece.clone()
    return ours


def family_weights(ours: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The state dict of a family's own model, whose `names` say what it fuses, out of ours: `fold_weights` undone."""
    theirs = {}
    for name in names:
        stem, module, kind = _split_name(name)
        parts = [ours[f"{stem}.{part}.{kind}"] for part, _ in _FUSED.get(module, ())]
        theirs[name] = torch.cat(parts) if parts else ours[name]
    return theirs


_FUSED = {
    "qkv_proj": (("q_proj", "num_attention_heads"), *((one, "num_key_value_heads") for one in ("k_proj", "v_proj"))),
    "gate_up_proj": (("gate_proj", None), ("up_proj", None)),
}
"""A fused projection -> its parts from the top, and the attribute that counts a part's heads (None: the feed-forward)."""


def _split_name(name: str) -> tuple[str, str, str]:
    """`...self_attn.qkv_proj.weight` -> its stem, the module's own name, and weight or bias."""
    stem, _, kind = name.rpartition(".")
    return *stem.rpartition(".")[::2], kind


_DEFAULTS: dict[str, Any] = {
    "dms_alpha_scale": 100.0, "dms_initial_alpha_offset": 5.0, "dms_window_size": 512, "dms_separate_alpha": False,
    "dms_alpha_per": "head", "dms_tau": 0.1, "dms_disable_eviction": False,
}  # fmt: skip
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
    parts = {name: _split_name(name) for name in names}
    wanted = {
        name: f"{stem}.{_MODULES[module]}.{kind}" for name, (stem, module, kind) in parts.items() if module in _MODULES
    }
    if not wanted:
        return {}
    found = {}
    for file in _weight_files(source, options):
        with safe_open(file, framework="pt") as tensors:
            for name in wanted.keys() & set(tensors.keys()):
                found[wanted[name]] = tensors.get_tensor(name)
    return found


def _weight_files(source: str, options: dict[str, Any]) -> list[str | Path]:
    single = cached_file(source, "model.safetensors", _raise_exceptions_for_missing_entries=False, **options)
    if single is not None:
        return [single]
    index = cached_file(source, "model.safetensors.index.json", **options)
    return get_checkpoint_shard_files(source, index, **options)[0]
