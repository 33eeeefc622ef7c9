"""What a raw config leaves out is what transformers would fill in: windows, heads and sharing of each family."""

import pytest

from kvfold.layout.hf_config import config_layout

transformers = pytest.importorskip("transformers")

SMALL = {"num_hidden_layers": 12, "hidden_size": 128, "num_attention_heads": 8}
FAMILIES = {
    "llama": {},
    "mistral": {},
    "mistral_full": {"head_dim": None, "sliding_window": None},
    "mixtral": {},
    "qwen2": {"num_key_value_heads": 4},
    "qwen2_sliding": {"num_key_value_heads": None, "use_sliding_window": True, "max_window_layers": 5},
    "qwen3": {"num_key_value_heads": 4},
    "qwen3_moe": {},
    "gemma": {"num_key_value_heads": 1},
    "gemma2": {},
    "gemma3_text": {},
    "gemma3n_text": {"num_kv_shared_layers": 4},
    "gemma4_text": {"num_kv_shared_layers": 4},
    "cohere2": {},
    "olmo3": {},
    "ministral": {},
    "starcoder2": {},
    "phi3": {"sliding_window": 64, "pad_token_id": 0},
    "gpt_oss": {},
    "smollm3": {},
    "hunyuan_v1_dense": {"head_dim": 16},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_config_is_read_as_transformers_reads_it(family):
    raw = {"model_type": family.removesuffix("_sliding").removesuffix("_full")} | SMALL | FAMILIES[family]
    theirs = transformers.AutoConfig.for_model(**raw)
    ours = config_layout(raw)
    per_layer = getattr(theirs, "per_layer_config", None) or [theirs] * ours.num_layers
    for layer, one in enumerate(ours.layers):
        assert one.num_kv_heads == per_layer[layer].num_key_value_heads
        head_dim = getattr(per_layer[layer], "head_dim", None)
        assert one.head_dim == (head_dim or theirs.hidden_size // theirs.num_attention_heads)
    types = getattr(theirs, "layer_types", None)
    window = getattr(theirs, "sliding_window", None)
    slides = [kind == "sliding_attention" for kind in types] if types else [window is not None] * ours.num_layers
    assert [one.window for one in ours.layers] == [window if sliding else None for sliding in slides]
    assert ours.num_layers - len(ours.owners) == (getattr(theirs, "num_kv_shared_layers", 0) or 0)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma4_text"])
def test_the_written_config_is_read_alike(family):
    raw = {"model_type": family.removesuffix("_sliding").removesuffix("_full")} | SMALL | FAMILIES[family]
    theirs = transformers.AutoConfig.for_model(**raw)
    assert config_layout(theirs.to_dict()) == config_layout(theirs.to_diff_dict() | raw) == config_layout(raw)
