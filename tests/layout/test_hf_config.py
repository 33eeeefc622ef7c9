"""Raw configs: every family's way of saying heads, windows and sharing; sources; refusals."""

import json
from types import SimpleNamespace

import pytest

from kvfold.layout.hf_config import base_layout, config_layout, value_bytes
from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import plan

LLAMA = {"model_type": "llama", "num_hidden_layers": 6, "hidden_size": 64, "num_attention_heads": 4}


def windows(config):
    return [layer.window for layer in config_layout(config).layers]


def kv_shape(config):
    one = config_layout(config).layers[0]
    return one.num_kv_heads, one.head_dim


def test_absent_kv_heads_are_mha_and_absent_head_dim_is_the_share_of_the_width():
    assert kv_shape(LLAMA) == (4, 16)
    assert kv_shape(LLAMA | {"num_key_value_heads": None, "head_dim": None}) == (4, 16)
    assert kv_shape(LLAMA | {"num_key_value_heads": 2, "head_dim": 32}) == (2, 32)
    assert kv_shape({"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 64}) == (4, 16)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"model_type": "mistral", "num_attention_heads": 8, "sliding_window": 8}, [8] * 6),
        ({"model_type": "mistral", "num_attention_heads": 8, "sliding_window": None}, [None] * 6),
        ({"model_type": "qwen2", "sliding_window": 8, "max_window_layers": 4}, [None] * 6),
        (
            {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 4},
            [None] * 4 + [8] * 2,
        ),
        ({"model_type": "gemma2", "sliding_window": 8}, [8, None] * 3),
        ({"model_type": "gemma3_text", "sliding_window": 8}, [8] * 5 + [None]),
        ({"model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 3}, [8, 8, None] * 2),
        ({"layer_types": ["full_attention", "sliding_attention"] * 3, "sliding_window": 8}, [None, 8] * 3),
        ({"layer_types": "0s_1_0s_1_0s_1", "sliding_window": 8}, [8, None] * 3),
        ({"layer_types": "0_0_2_2_4_4", "sliding_window": 8}, [None] * 6),
    ],
)
def test_windows(more, expected):
    assert windows(LLAMA | more) == expected


def test_a_nested_text_config_is_read_with_its_own_defaults():
    config = {
        "model_type": "gemma3",
        "dtype": "float32",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "num_hidden_layers": 12,
            "sliding_window": 1024,
        },
        "vision_config": {"num_hidden_layers": 27},
    }
    assert windows(config) == ([1024] * 5 + [None]) * 2
    assert kv_shape(config) == (4, 256)
    assert plan(config).model_bytes == 4
    assert plan(config).model_tokens == 131072


def test_sharing_in_the_config_is_the_models_own():
    assert config_layout(LLAMA | {"kv_source_layers": [0, 0, 2, 2, 4, 4]}).owners == (0, 2, 4)
    assert config_layout(LLAMA | {"layer_types": "0_0_2_2_4_4"}).owners == (0, 2, 4)
    assert config_layout(LLAMA | {"use_cla": True, "cla_share_factor": 2}).owners == (0, 2, 4)
    assert plan(LLAMA | {"num_kv_shared_layers": 2}).base_layout.owners == (0, 1, 2, 3)


def test_a_kvfold_config_is_its_layouts():
    base = KVLayout.plain(4, 4, 16)
    layout = KVLayout.parse("cla2", base).with_time("h2o:4+4")
    config = {"model_type": "kvfold", "layout": layout.to_json(), "base_layout": base.to_json(), "dtype": "bfloat16"}
    assert config_layout(json.loads(json.dumps(config))) == layout
    assert plan(config).base_layout == base
    assert plan(config, time="full").layout == KVLayout.parse("cla2", base)
    assert base_layout({"model_type": "kvfold", "layout": layout.to_json()}) == layout.base()
    with pytest.raises(ValueError, match="without 'layout'"):
        plan({"model_type": "kvfold"})


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("bfloat16", 2), ("torch.float16", 2), ("float32", 4), ("float64", 8), ("auto", 2), (None, 2)],
)
def test_bytes_of_a_number(dtype, expected):
    assert value_bytes(LLAMA | {"dtype": dtype}) == value_bytes(LLAMA | {"torch_dtype": dtype}) == expected


def test_sources(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    expected = plan(LLAMA).layout
    config = SimpleNamespace(to_dict=lambda: dict(LLAMA))
    for source in (tmp_path, str(tmp_path), tmp_path / "config.json", config):
        assert plan(source).layout == expected
    model = SimpleNamespace(config=config, dtype="torch.float32")
    assert (plan(model).layout, plan(model).model_bytes) == (expected, 4)
    assert plan("Llama-2-7B").bytes_per_token == plan("llama-2-7b").bytes_per_token


def test_a_hub_name_fetches_the_config_alone(tmp_path, monkeypatch):
    import huggingface_hub

    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    asked = []

    def fetch(repo, name):
        asked.append((repo, name))
        return str(tmp_path / "config.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert plan("owner/model").layout == plan(LLAMA).layout
    assert asked == [("owner/model", "config.json")]


def test_a_hub_that_fails_is_one_line(monkeypatch):
    import huggingface_hub

    def fail(repo, name):
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(
        ValueError, match=r"^owner/model: no folder here, and no config.json came from the hub \(no route\): [^\n]*$"
    ):
        plan("owner/model")


def refused(source, **fold):
    with pytest.raises(ValueError) as refusal:
        plan(source, **fold)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_bad_paths_are_one_line(tmp_path):
    assert "has no config.json" in refused(tmp_path)
    assert "no such file or folder" in refused(str(tmp_path / "nowhere"))
    assert "no such file or folder" in refused("nowhere/config.json")
    assert "no such file or folder" in refused("owner/model.gguf")
    assert "did you mean 'llama-2-7b'" in refused("lama-2-7b")
    assert "a plan reads a config" in refused(3)
    broken = tmp_path / "config.json"
    for text, says in (("{", "can't be read as JSON"), ("[]", "holds a list"), ("\udcff", "can't be read")):
        broken.write_bytes(text.encode("utf-8", "surrogateescape"))
        assert says in refused(tmp_path)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    assert "a .gguf holds no config.json" in refused(gguf)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "num_hidden_layers is None"),
        ({"model_type": "vit", "num_hidden_layers": 3}, "num_attention_heads is None"),
        ({"num_hidden_layers": 3, "num_attention_heads": 4}, "hidden_size is None"),
        (LLAMA | {"num_hidden_layers": "6"}, "num_hidden_layers is '6'"),
        (LLAMA | {"num_key_value_heads": 3}, "3 KV heads for 4 query heads"),
        (LLAMA | {"kv_lora_rank": 512, "model_type": "deepseek_v3"}, "'deepseek_v3' has latent attention (MLA)"),
        (LLAMA | {"linear_conv_kernel_dim": 4}, "linear attention"),
        (LLAMA | {"layer_types": ["linear_attention"] * 5 + ["full_attention"]}, "layers of type linear_attention"),
        (LLAMA | {"is_encoder_decoder": True}, "an encoder and a decoder"),
        (LLAMA | {"attention_chunk_size": 8192}, "chunked attention"),
        (LLAMA | {"state_size": 16}, "recurrent layers"),
        (LLAMA | {"layer_types": ["full_attention"] * 5}, "names 5 layers of 6"),
        (LLAMA | {"layer_types": "0_0_2"}, "names 3 layers of 6"),
        (LLAMA | {"layer_types": ["sliding_attention"] * 6}, "sliding_window is missing"),
        (LLAMA | {"sliding_window": "big"}, "sliding_window 'big'"),
        (LLAMA | {"dtype": "int3"}, "dtype 'int3'"),
        (LLAMA | {"kv_source_layers": [0, 0]}, "2 owners for 6 layers"),
        ({"model_type": "kvfold", "layout": {"format": 9}}, "layout format 9"),
    ],
)
def test_configs_without_a_plain_kv_cache_are_refused_in_one_line(config, says):
    assert says in refused(config)


def test_axes_that_do_not_fit_are_one_line():
    assert "does not fit" in refused(LLAMA, layers="trailing:6")
    assert "use 1, 2, 4" in refused(LLAMA, heads=3)
    assert "unknown time method" in refused(LLAMA, time="h3o:1+1")
    assert "unknown storage" in refused(LLAMA, bits="int2")
    assert "layer 1 stores nothing" in refused(LLAMA, layers="cla2", time="full; 1=tova:4")
