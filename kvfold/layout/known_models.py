"""Models that can be planned for by name, without a network: the shapes that matter to a KV cache, as raw configs.

Figures are those of the models' own config.json, and for the CLA family those of arXiv 2405.12981, tables 1 to 3.
"""

from typing import Any

from kvfold.layout.patterns import named_map

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


def _config(values: tuple, more: dict[str, Any]) -> dict[str, Any]:
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
