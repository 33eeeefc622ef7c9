"""From a raw config.json to what a plan needs: the model's own layout, its dtype, its context; the grammars in which other
projects write down which layers share KV; and models that can be planned for by name.

A config is read as plain JSON, never through transformers: a plan needs no torch, and works for configs that the installed
transformers refuses. What a config leaves out takes the value that transformers gives that model type. Figures of known models
are those of their own config.json, and for the CLA family those of arXiv 2405.12981, tables 1 to 3.
"""

import json
import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from kvfold.errors import UserError, unknown_name
from kvfold.layout.kvlayout import NO_ROPE, ROPE, KVLayout
from kvfold.layout.patterns import named_map, owner_map

_FLOAT16, _NOT_SLIDING = {"dtype": "float16"}, {"use_sliding_window": False}
_KEYS = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
         "max_position_embeddings", "intermediate_size", "vocab_size", "tie_word_embeddings")  # fmt: skip
_MODELS: dict[str, tuple] = {
    "llama-2-7b": ("llama", 32, 4096, 32, 32, 128, 4096, 11008, 32000, False, _FLOAT16),
    "llama-2-13b": ("llama", 40, 5120, 40, 40, 128, 4096, 13824, 32000, False, _FLOAT16),
    "llama-2-70b": ("llama", 80, 8192, 64, 8, 128, 4096, 28672, 32000, False, _FLOAT16),
    "llama-3.1-8b": ("llama", 32, 4096, 32, 8, 128, 131072, 14336, 128256, False, {}),
    "llama-3.1-70b": ("llama", 80, 8192, 64, 8, 128, 131072, 28672, 128256, False, {}),
    "llama-3.2-1b": ("llama", 16, 2048, 32, 8, 64, 131072, 8192, 128256, True, {}),
    "mistral-7b": ("mistral", 32, 4096, 32, 8, 128, 32768, 14336, 32768, False, {"sliding_window": None}),
    "mistral-7b-v0.1": ("mistral", 32, 4096, 32, 8, 128, 32768, 14336, 32000, False, {"sliding_window": 4096}),
    "qwen2.5-0.5b": ("qwen2", 24, 896, 14, 2, 64, 32768, 4864, 151936, True, _NOT_SLIDING),
    "qwen3-0.6b": ("qwen3", 28, 1024, 16, 8, 128, 40960, 3072, 151936, True, _NOT_SLIDING),
    "qwen3-1.7b": ("qwen3", 28, 2048, 16, 8, 128, 40960, 6144, 151936, True, _NOT_SLIDING),
    "qwen3-8b": ("qwen3", 36, 4096, 32, 8, 128, 40960, 12288, 151936, False, _NOT_SLIDING),
    "qwen3-32b": ("qwen3", 64, 5120, 64, 8, 128, 40960, 25600, 151936, False, _NOT_SLIDING),
    "gemma-2-2b": ("gemma2", 26, 2304, 8, 4, 256, 8192, 9216, 256000, True, {"sliding_window": 4096}),
    "gemma-3-1b": ("gemma3_text", 26, 1152, 4, 1, 256, 32768, 6912, 262144, True,
                   {"sliding_window": 512, "sliding_window_pattern": 6}),
    "smollm2-135m": ("llama", 30, 576, 9, 3, 64, 8192, 1536, 49152, True, {}),
    "smollm2-360m": ("llama", 32, 960, 15, 5, 64, 8192, 2560, 49152, True, {}),
    "smollm2-1.7b": ("llama", 24, 2048, 32, 32, 64, 8192, 8192, 49152, True, {}),
    "tinyllama-1.1b": ("llama", 22, 2048, 32, 4, 64, 2048, 5632, 32000, False, {}),
}  # fmt: skip
"""Values of `_KEYS` by name, and what only some models have."""

_CLA_SIZES = {"1b": (20, 2048, 5472), "3b": (32, 3072, 8192)}
"""Layers, hidden size, inner size of the MLP."""
_CLA_ROWS = {
    "1b": "128/16/16/full 128/16/4/full 128/16/2/full 128/16/1/full 64/32/1/full 46/45/1/full 32/64/1/full "
    "512/4/1/cla2 256/8/1/cla2 128/16/1/cla2 90/22/1/cla2 64/32/1/cla2 "
    "256/8/4/cla2 128/16/4/cla2 128/16/2/cla2 128/16/1/cla3 128/16/1/cla4 "
    "128/16/1/cla2-keep-ends 128/16/1/cla2-dense-front 128/16/1/cla2-dense-back",
    "3b": "128/24/1/full 128/24/1/cla2 64/48/1/full 64/48/1/cla2 32/96/1/full",
}
"""Head dim, query heads, KV heads and who shares, in the order of the paper's table 1."""


def _config(values: Sequence[Any], more: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(_KEYS, values, strict=False)) | {"dtype": "bfloat16"} | more


def _cla_model(size: str, row: str) -> tuple[str, dict[str, Any]]:
    """Name, as in `cla-1b-h128-mqa-cla2`, and raw config; who reads whom stands in it as `kv_source_layers`."""
    *numbers, pattern = row.split("/")
    head_dim, num_heads, num_kv_heads = map(int, numbers)
    attention = {1: "mqa", num_heads: "mha"}.get(num_kv_heads, f"gqa{num_kv_heads}")
    sharing = "" if pattern == "full" else f"-{pattern}"
    num_layers, hidden, inner = _CLA_SIZES[size]
    values = ("llama", num_layers, hidden, num_heads, num_kv_heads, head_dim, 2048, inner)
    config = _config(values, {"kv_source_layers": list(named_map(pattern, num_layers))})
    return f"cla-{size}-h{head_dim}-{attention}{sharing}", config


KNOWN_MODELS: dict[str, dict[str, Any]] = {
    **{name: _config(values, more) for name, (*values, more) in _MODELS.items()},
    **dict(_cla_model(size, row) for size, rows in _CLA_ROWS.items() for row in rows.split()),
}
"""Raw configs by bundled name."""


Config = Mapping[str, Any]

_SHARING_KEYS = ("kv_source_layers", "num_kv_shared_layers", "layer_types", "sharing_pattern", "use_cla")
"""In what grammars projects say which layers share KV, see `_named_owners`."""

_GEMMA = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096}
_QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {"num_key_value_heads": 8},
    "qwen2": _QWEN,
    "qwen2_moe": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "qwen3_moe": {"use_sliding_window": False, "num_key_value_heads": 4},
    "smollm3": {"use_sliding_window": False, "num_key_value_heads": 4, "no_rope_layer_interval": 4},
    "gemma": {"num_attention_heads": 16, "head_dim": 256},
    "gemma2": {**_GEMMA, "sliding_window_pattern": 2},
    "gemma3_text": {**_GEMMA, "sliding_window_pattern": 6, "max_position_embeddings": 131072},
    "gemma3n_text": {**_GEMMA, "num_key_value_heads": 2, "sliding_window": 512, "sliding_window_pattern": 5,
                     "num_kv_shared_layers": 15},
    "gemma4_text": {**_GEMMA, "sliding_window": 512, "sliding_window_pattern": 6, "global_head_dim": 512},
    "ministral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "cohere2": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "olmo3": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "gpt_oss": {"num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "sliding_window_pattern": 2},
    "starcoder2": {"num_key_value_heads": 2},
}  # fmt: skip
"""What transformers takes for keys that a config of this model type leaves out, where it bears on the KV cache."""

DTYPE_BYTES = {"float64": 8, "float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}
"""Bytes of one number."""

_FOREIGN_KEYS = {
    "kv_lora_rank": "latent attention (MLA)",
    "attention_chunk_size": "chunked attention",
    **dict.fromkeys(("linear_conv_kernel_dim", "linear_attn_config", "attn_type_list"), "linear attention"),
    **dict.fromkeys(
        (
            "layers_block_type",
            "block_types",
            "hybrid_override_pattern",
            "attn_layer_period",
            "state_size",
            "mamba_d_state",
        ),
        "recurrent layers",
    ),
}
"""Keys that tell of a cache that is no plain keys and values."""


def read_config(source: Any) -> tuple[str, dict[str, Any]]:
    """A name for display and the raw config, from a dict, a config object, a loaded model, a path or a name."""
    if isinstance(source, Mapping):
        config = dict(source)
    elif callable(getattr(source, "to_dict", None)):
        config = source.to_dict()
    elif callable(getattr(getattr(source, "config", None), "to_dict", None)):
        config = source.config.to_dict()
        if getattr(source, "dtype", None) is not None:
            config["dtype"] = str(source.dtype)
    elif isinstance(source, str | PathLike):
        return str(source), _named_config(str(source))
    else:
        raise UserError(f"source {source!r}: a plan reads a config, a path, a name or a model: give one of them")
    return str(config.get("_name_or_path") or config.get("model_type") or "config"), config


def config_layout(config: Config) -> KVLayout:
    """The layout that the config describes: a kvfold checkpoint's own, or the model's as it was built."""
    if config.get("model_type") == "kvfold":
        return _saved_layout(config, "layout")
    config = text_config(config)
    _refuse_foreign(config)
    return read_sharing(config, _plain_layout(config))


def base_layout(config: Config) -> KVLayout:
    """The layout before anything was folded: a kvfold checkpoint says what it was converted from."""
    if config.get("model_type") == "kvfold" and config.get("base_layout") is not None:
        return _saved_layout(config, "base_layout")
    return config_layout(config).base()


def value_bytes(config: Config) -> int:
    """Bytes of one number in the model's dtype; 2 where the config doesn't say."""
    text = text_config(config)
    dtype = text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype")
    name = "bfloat16" if dtype in (None, "auto") else str(dtype).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise UserError(f"dtype {dtype!r}: plans know {', '.join(DTYPE_BYTES)}: set dtype in the config")
    return DTYPE_BYTES[name]


def model_tokens(config: Config) -> int | None:
    """Context that the model was made for, None where the config doesn't say."""
    text = text_config(config)
    return text.get("max_position_embeddings") or text.get("n_positions")


def _named_config(name: str) -> dict[str, Any]:
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise UserError(f"{name}: the folder has no config.json: give the folder of a checkpoint")
    if path.is_file():
        return read_json(path)
    if name.lower() in KNOWN_MODELS:
        return dict(KNOWN_MODELS[name.lower()])
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and path.suffix not in (".json", ".gguf"):
        return hub_config(name)
    if "/" in name or path.suffix in (".json", ".gguf"):
        raise UserError(f"{name}: no such file or folder: give a folder, its config.json, or a hub name owner/model")
    shown = [known for known in KNOWN_MODELS if not known.startswith("cla-")]
    shown += ["cla-1b-h128-mqa-cla2 and its like", "a folder", "a hub name owner/model"]
    raise unknown_name("model", name, KNOWN_MODELS, shown)


def hub_config(name: str) -> dict[str, Any]:
    """The config.json of a model on the hub."""
    # Imported here: a plan of anything local needs no hub client, and its import is slow.
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # the hub client raises dozens of unrelated types, its transport's among them
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"{name}: no folder here, and no config.json came from the hub ({reason}): check the name and the network, or "
            "give a folder"
        ) from error
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """What one of a checkpoint's JSON files holds."""
    if path.suffix == ".gguf":
        raise UserError(
            f"{path}: a .gguf holds no config.json: plan the loaded model, or give the original's config.json"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: can't be read as JSON ({error}): give a config.json, or fetch it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds a {type(config).__name__}, not an object: give a checkpoint's config.json")
    return config


def _saved_layout(config: Config, key: str) -> KVLayout:
    saved = config.get(key)
    if saved is None:
        raise UserError(f"a kvfold config without '{key}': it says who keeps what: take the file that kvfold wrote")
    return saved if isinstance(saved, KVLayout) else KVLayout.from_json(saved)


def text_config(config: Config) -> dict[str, Any]:
    """The language model's part of a config, with the defaults of its model type filled in."""
    nested = config.get("text_config")
    text = nested if isinstance(nested, Mapping) and "num_hidden_layers" not in config else config
    return DEFAULTS.get(text.get("model_type", ""), {}) | dict(text)


def _refuse_foreign(config: Config) -> None:
    """Raise `UserError` for models whose cache is not keys and values per token and head."""
    kinds = [kind for key, kind in _FOREIGN_KEYS.items() if config.get(key) not in (None, False)]
    if config.get("is_encoder_decoder"):
        kinds.append("an encoder and a decoder")
    if isinstance(config.get("layer_types"), Sequence) and not isinstance(config["layer_types"], str):
        strange = sorted(set(config["layer_types"]) - {"full_attention", "sliding_attention"})
        kinds += [f"layers of type {', '.join(strange)}"] if strange else []
    if kinds:
        raise UserError(
            f"model type '{config.get('model_type')}' has {kinds[0]}: kvfold folds keys and values of causal full or "
            "sliding-window attention: use a model of that kind (Llama, Mistral, Qwen, Gemma, ...)"
        )


def _plain_layout(config: Config) -> KVLayout:
    """Every layer an owner, with the architecture's own windows and head shapes."""
    num_layers = _number(config, "num_hidden_layers", "n_layer", "num_layers")
    num_heads = _number(config, "num_attention_heads", "n_head")
    num_kv_heads = _number(config, "num_key_value_heads", default=1 if config.get("multi_query") else num_heads)
    if num_heads % num_kv_heads:
        raise UserError(f"{num_kv_heads} KV heads for {num_heads} query heads: they share evenly: correct config.json")
    head_dim = config.get("head_dim") or config.get("attention_head_dim")
    head_dim = head_dim or _number(config, "hidden_size", "n_embd") // num_heads
    windows = layer_windows(config, num_layers)
    base = KVLayout.plain(num_layers, num_kv_heads, head_dim, windows).with_rope(_rope_kinds(config, windows))
    if "global_head_dim" not in config or not any(windows):
        return base
    # Gemma 4: full-attention layers have a head shape of their own.
    global_heads = config.get("num_global_key_value_heads") if config.get("attention_k_eq_v") else None
    own = {"num_kv_heads": global_heads or num_kv_heads, "head_dim": config["global_head_dim"]}
    return replace(base, layers=tuple(one if one.window else replace(one, **own) for one in base.layers))


def rope_kinds(
    without: Container[int], types: Sequence[str] | None, parameters: Any, windows: Sequence[int | None]
) -> list[str]:
    """Which rotary positions each layer has, for `KVLayout.with_rope`. `without`: layers that have none; `types`: attention
    types; `parameters`: transformers' rope parameters, one set or one for each type.
    """
    nested = isinstance(parameters, Mapping) and parameters and all(isinstance(x, Mapping) for x in parameters.values())
    # Types are told apart by their window already, where they have one.
    typed = types if nested and not any(windows) else None
    return [
        NO_ROPE if layer in without else typed[layer] if typed is not None else ROPE for layer in range(len(windows))
    ]


def _rope_kinds(config: Config, windows: Sequence[int | None]) -> list[str]:
    flags, every = config.get("no_rope_layers"), config.get("no_rope_layer_interval")
    if not flags and every:
        flags = [(layer + 1) % every for layer in range(len(windows))]
    if flags and len(flags) != len(windows):
        raise UserError(f"no_rope_layers names {len(flags)} layers of {len(windows)}: name each once in config.json")
    without, types = {layer for layer, rotated in enumerate(flags or ()) if not rotated}, config.get("layer_types")
    return rope_kinds(without, None if isinstance(types, str) else types, config.get("rope_parameters"), windows)


def read_sharing(config: Config, plain: KVLayout) -> KVLayout:
    """`plain`, the model with every layer an owner, with the sharing that its config names in any of the grammars."""
    named = {key: plain.with_owners(_named_owners(config, key, plain)) for key in _SHARING_KEYS if config.get(key)}
    found = {key: layout for key, layout in named.items() if layout != plain}
    if len(set(found.values())) > 1:
        raise UserError(f"config.json names two owner maps that differ, in {' and '.join(found)}: keep one")
    return next(iter(found.values()), plain)


def _named_owners(config: Config, key: str, plain: KVLayout) -> Sequence[int]:
    """One owner for each layer."""
    value, layers = config[key], plain.layers
    slides = [one.window is not None for one in layers]
    if key == "num_kv_shared_layers":
        # transformers: the last N read the nearest owner of their attention type, whatever its rotary positions.
        return owner_map(f"trailing:{value}", [(one.window, one.num_kv_heads, one.head_dim) for one in layers], slides)
    if key == "layer_types":
        # LCKV has one text, `0_0_2s_2s`, s for a sliding layer; transformers' own is a list and says nothing here.
        return owner_map(value, [one.kind for one in layers], slides) if isinstance(value, str) else range(len(layers))
    if key == "use_cla":  # Hunyuan
        factor = config.get("cla_share_factor", 1)
        if type(factor) is not int or factor < 1:
            raise UserError(f"cla_share_factor {factor!r}: it is a whole number of 1 or more: correct config.json")
        return [layer - layer % factor for layer in range(len(layers))]
    # transformers' `kv_source_layers` and dolomite-engine's `sharing_pattern`.
    if not isinstance(value, list) or not all(type(owner) is int for owner in value):
        raise UserError(f"{key} {value!r}: it is a list of layer numbers, one per layer: correct config.json")
    return value


def layer_windows(config: Config, num_layers: int) -> tuple[int | None, ...]:
    """The architecture's own sliding window of each layer, None for full attention."""
    window, types = config.get("sliding_window"), config.get("layer_types")
    if window is not None and (type(window) is not int or window < 1):
        raise UserError(f"sliding_window {window!r}: it is a whole number of tokens or null: correct config.json")
    if isinstance(types, str):
        slides = [part.endswith("s") for part in types.split("_")]
    elif types is not None:
        slides = [kind == "sliding_attention" for kind in types]
    elif window is None or not config.get("use_sliding_window", True):
        slides = [False] * num_layers
    elif config.get("sliding_window_pattern") is not None:
        pattern = _number(config, "sliding_window_pattern")
        slides = [(index + 1) % pattern != 0 for index in range(num_layers)]
    else:
        first = config.get("max_window_layers") or 0
        slides = [index >= first for index in range(num_layers)]
    if len(slides) != num_layers:
        raise UserError(f"layer_types names {len(slides)} layers of {num_layers}: name each once in config.json")
    if any(slides) and window is None:
        raise UserError("layer_types names sliding layers but sliding_window is missing: set it in config.json")
    return tuple(window if sliding else None for sliding in slides)


def _number(config: Config, *names: str, default: int | None = None) -> int:
    """The first of the named keys that is there; families disagree on what to call it."""
    value = next((config[name] for name in names if config.get(name) is not None), default)
    if type(value) is not int or value < 1:
        raise UserError(
            f"config of model type '{config.get('model_type')}': {names[0]} is {value!r}, it has to be a whole "
            "number of 1 or more: give the config of a causal language model with attention"
        )
    return value
