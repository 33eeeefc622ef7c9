"""How many bytes a model's weights take: what a device's memory holds beside the cache.

Of a checkpoint it is what its files have; of a config alone it is counted, for decoders of one plain form: embeddings, four
attention projections, three of a gated MLP, and a head unless it is the embedding. Biases and norms weigh next to nothing.
"""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from kvfold.layout.hf_config import config_layout, read_config, text_config, value_bytes

_TIED_TYPES = ("cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text")
"""Model types whose head is the embedding where the config does not say."""
_OTHER_WEIGHTS = ("num_local_experts", "num_experts", "n_routed_experts", "vision_config", "audio_config")
"""Keys that tell of weights that are not counted here."""
_COUNTED = ("vocab_size", "hidden_size", "intermediate_size")


def weight_bytes(source: Any) -> int | None:
    """Bytes of the weights in the model's dtype; None where neither files nor config tell. `source` as for `plan`."""
    if callable(getattr(source, "named_parameters", None)):
        return sum(weight.numel() * weight.element_size() for _, weight in source.named_parameters())
    if isinstance(source, str | PathLike) and Path(source).expanduser().is_dir():
        files = list(Path(source).expanduser().glob("*.safetensors"))
        if files:
            return sum(file.stat().st_size for file in files)
    return counted_bytes(read_config(source)[1])


def counted_bytes(config: Mapping[str, Any]) -> int | None:
    """The same from a raw config alone."""
    text = text_config(config)
    if any(config.get(key) or text.get(key) for key in _OTHER_WEIGHTS) or not all(text.get(key) for key in _COUNTED):
        return None
    layout = config_layout(config)
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    is_tied = text.get("tie_word_embeddings", text.get("model_type") in _TIED_TYPES)
    number = text["vocab_size"] * hidden * (1 if is_tied else 2)
    for layer, kept in enumerate(layout.layers):
        number += 3 * hidden * text["intermediate_size"] + 2 * hidden * heads * kept.head_dim
        if layout.is_owner(layer):
            number += 2 * hidden * kept.num_kv_heads * kept.head_dim
    return number * value_bytes(config)
