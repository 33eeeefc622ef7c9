"""Models that can be planned for by name, without a network: the shapes that matter to a KV cache, as raw configs.

Figures are those of the models' own config.json, and for the CLA family those of arXiv 2405.12981, tables 1 to 3.
"""

from dataclasses import dataclass
from typing import Any

from kvfold.layout.patterns import PATTERNS

# name: model type, layers, hidden size, query heads, kv heads, head dim, context, then what only some models have
_SHAPES: dict[str, tuple] = {
    "llama-2-7b": ("llama", 32, 4096, 32, 32, 128, 4096, {"dtype": "float16"}),
    "llama-2-13b": ("llama", 40, 5120, 40, 40, 128, 4096, {"dtype": "float16"}),
    "llama-2-70b": ("llama", 80, 8192, 64, 8, 128, 4096, {"dtype": "float16"}),
    "llama-3.1-8b": ("llama", 32, 4096, 32, 8, 128, 131072, {}),
    "llama-3.1-70b": ("llama", 80, 8192, 64, 8, 128, 131072, {}),
    "llama-3.2-1b": ("llama", 16, 2048, 32, 8, 64, 131072, {}),
    "mistral-7b": ("mistral", 32, 4096, 32, 8, 128, 32768, {"sliding_window": None}),
    "mistral-7b-v0.1": ("mistral", 32, 4096, 32, 8, 128, 32768, {"sliding_window": 4096}),
    "qwen2.5-0.5b": ("qwen2", 24, 896, 14, 2, 64, 32768, {"use_sliding_window": False}),
    "qwen3-0.6b": ("qwen3", 28, 1024, 16, 8, 128, 40960, {"use_sliding_window": False}),
    "qwen3-1.7b": ("qwen3", 28, 2048, 16, 8, 128, 40960, {"use_sliding_window": False}),
    "qwen3-8b": ("qwen3", 36, 4096, 32, 8, 128, 40960, {"use_sliding_window": False}),
    "qwen3-32b": ("qwen3", 64, 5120, 64, 8, 128, 40960, {"use_sliding_window": False}),
    "gemma-2-2b": ("gemma2", 26, 2304, 8, 4, 256, 8192, {"sliding_window": 4096}),
    "gemma-3-1b": ("gemma3_text", 26, 1152, 4, 1, 256, 32768, {"sliding_window": 512, "sliding_window_pattern": 6}),
    "smollm2-135m": ("llama", 30, 576, 9, 3, 64, 8192, {}),
    "smollm2-360m": ("llama", 32, 960, 15, 5, 64, 8192, {}),
    "smollm2-1.7b": ("llama", 24, 2048, 32, 32, 64, 8192, {}),
    "tinyllama-1.1b": ("llama", 22, 2048, 32, 4, 64, 2048, {}),
}

# name: inner size of the MLP, vocabulary, whether the head is the embedding: what weights weigh, beside the shape above
_WEIGHTS: dict[str, tuple[int, int, bool]] = {
    "llama-2-7b": (11008, 32000, False),
    "llama-2-13b": (13824, 32000, False),
    "llama-2-70b": (28672, 32000, False),
    "llama-3.1-8b": (14336, 128256, False),
    "llama-3.1-70b": (28672, 128256, False),
    "llama-3.2-1b": (8192, 128256, True),
    "mistral-7b": (14336, 32768, False),
    "mistral-7b-v0.1": (14336, 32000, False),
    "qwen2.5-0.5b": (4864, 151936, True),
    "qwen3-0.6b": (3072, 151936, True),
    "qwen3-1.7b": (6144, 151936, True),
    "qwen3-8b": (12288, 151936, False),
    "qwen3-32b": (25600, 151936, False),
    "gemma-2-2b": (9216, 256000, True),
    "gemma-3-1b": (6912, 262144, True),
    "smollm2-135m": (1536, 49152, True),
    "smollm2-360m": (2560, 49152, True),
    "smollm2-1.7b": (8192, 49152, True),
    "tinyllama-1.1b": (5632, 32000, False),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CLARow:
    """One model of the CLA paper's design space."""

    size: str
    """`1b` or `3b`."""
    head_dim: int
    """Channels of one head."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """KV heads."""
    pattern: str
    """Which layers share, as a `--layers` text."""

    @property
    def name(self) -> str:
        """As in `cla-1b-h128-mqa-cla2`."""
        attention = {1: "mqa", self.num_heads: "mha"}.get(self.num_kv_heads, f"gqa{self.num_kv_heads}")
        sharing = "" if self.pattern == "full" else f"-{self.pattern}"
        return f"cla-{self.size}-h{self.head_dim}-{attention}{sharing}"

    def config(self) -> dict[str, Any]:
        """The model as a raw config; who reads whom stands in it as `kv_source_layers`."""
        hidden, inner, num_layers = {"1b": (2048, 5472, 20), "3b": (3072, 8192, 32)}[self.size]
        shape = ("llama", num_layers, hidden, self.num_heads, self.num_kv_heads, self.head_dim, 2048)
        owners = list(PATTERNS[self.pattern](num_layers))
        return _config(*shape, {"intermediate_size": inner, "kv_source_layers": owners})


def _rows(size: str, table: str) -> tuple[CLARow, ...]:
    """One row per word of a table: head dim, query heads, kv heads, pattern, joined by slashes."""
    rows = []
    for word in table.split():
        head_dim, num_heads, num_kv_heads, pattern = word.split("/")
        rows.append(
            CLARow(
                size=size,
                head_dim=int(head_dim),
                num_heads=int(num_heads),
                num_kv_heads=int(num_kv_heads),
                pattern=pattern,
            )
        )
    return tuple(rows)


CLA_ROWS: tuple[CLARow, ...] = (
    *_rows("1b", "128/16/16/full 128/16/4/full 128/16/2/full 128/16/1/full 64/32/1/full 46/45/1/full 32/64/1/full"),
    *_rows("1b", "512/4/1/cla2 256/8/1/cla2 128/16/1/cla2 90/22/1/cla2 64/32/1/cla2"),
    *_rows("1b", "256/8/4/cla2 128/16/4/cla2 128/16/2/cla2 128/16/1/cla3 128/16/1/cla4"),
    *_rows("1b", "128/16/1/cla2-keep-ends 128/16/1/cla2-dense-front 128/16/1/cla2-dense-back"),
    *_rows("3b", "128/24/1/full 128/24/1/cla2 64/48/1/full 64/48/1/cla2 32/96/1/full"),
)
"""The 1B design space in the order of the paper's table 1, then the 3B models."""


def _config(
    model_type: str,
    num_layers: int,
    hidden: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    context: int,
    more: dict[str, Any],
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "num_hidden_layers": num_layers,
        "hidden_size": hidden,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "dtype": "bfloat16",
    } | more


KNOWN_MODELS: dict[str, dict[str, Any]] = {
    **{
        name: _config(*shape)
        | dict(zip(("intermediate_size", "vocab_size", "tie_word_embeddings"), _WEIGHTS[name], strict=True))
        for name, shape in _SHAPES.items()
    },
    **{row.name: row.config() for row in CLA_ROWS},
}
"""Raw configs by bundled name."""
