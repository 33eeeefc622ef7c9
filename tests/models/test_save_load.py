"""What is saved comes back: through the Auto classes, through `load`, from other families' folders and from a meta build."""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from kvfold.convert.conversion import Conversion, convert
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.families import FAMILIES, fold_config
from kvfold.models.load import load


def assert_same(one, other):
    """Up to rounding: `load` packs weights for few rows, transformers' own classes don't."""
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_familys_folder_loads_and_saves_as_ours(model_type, pair, ids, tmp_path):
    theirs = pair(model_type, tie_word_embeddings=model_type == "llama")[1]
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    ours = load(tmp_path / "theirs")
    assert not ours.training and ours.dtype == torch.float32 and ours.config.family == model_type
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), atol=1e-4, rtol=1e-4)
    assert ours.generation_config.eos_token_id == 2
    ours.save_pretrained(tmp_path / "ours")
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), load(tmp_path / "ours")):
        assert isinstance(again, FoldForCausalLM)
        assert_same(logits(again, ids), logits(ours, ids))
        assert again.state_dict().keys() == ours.state_dict().keys()
    bare = AutoModel.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert_same(bare(ids).last_hidden_state, ours.model(ids).last_hidden_state)


SHARED = {
    "the last layers read": ({"num_kv_shared_layers": 2}, "trailing:2"),
    "one owner a layer": ({"kv_source_layers": [0, 0, 2, 2]}, "cla2"),
    "dolomite's": ({"sharing_pattern": [0, 1, 1, 1]}, "0_1_1_1"),
    "Hunyuan's": ({"use_cla": True, "cla_share_factor": 2}, "cla2"),
}


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "phi3"])
@pytest.mark.parametrize("grammar", SHARED)
@pytest.mark.parametrize("held", [True, False], ids=["readers' weights there", "left out"])
def test_a_familys_folder_that_shares_layers_is_read_as_it_says(model_type, grammar, held, pair, ids, tmp_path):
    """As converting the unshared model to that layout does; a reader's own keys and values don't count, there or not."""
    if model_type == "phi3" and not held:
        pytest.skip("a fused projection is there whole or not at all")
    keys, layers = SHARED[grammar]
    layer_types = {"layer_types": ["full_attention"] * 4} if model_type == "gemma3_text" else {}
    theirs = pair(model_type, **layer_types)[1]
    theirs.save_pretrained(tmp_path / "plain")
    expected = convert(tmp_path / "plain", tmp_path / "expected", Conversion(layers=layers, init="drop"))
    for name, value in keys.items():
        setattr(theirs.config, name, value)
    weights = theirs.state_dict()
    for layer in [] if held else range(4):
        if expected.config.layout.owner_of(layer) != layer:
            for part in ("k_proj", "v_proj", "k_norm"):
                weights.pop(f"model.layers.{layer}.self_attn.{part}.weight", None)
    theirs.save_pretrained(tmp_path / "shared", state_dict=weights)
    ours = load(tmp_path / "shared")
    assert ours.config.layout == expected.config.layout
    assert ours.state_dict().keys() == expected.state_dict().keys()
    assert_same(logits(ours, ids), logits(expected, ids))


def test_an_owner_without_keys_is_missed_all_the_same(pair, tmp_path):
    theirs = pair("llama")[1]
    theirs.config.num_kv_shared_layers = 2
    weights = theirs.state_dict()
    del weights["model.layers.1.self_attn.k_proj.weight"]
    theirs.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"lacks 1 weights, the first is model\.layers\.1\.self_attn\.k_proj"):
        load(tmp_path)


def test_tied_embeddings_are_one_tensor(pair, tmp_path):
    pair("llama", tie_word_embeddings=True)[1].save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert len({weight.data_ptr() for weight in ours.parameters()}) == len(list(ours.parameters()))


def test_no_tensor_of_a_loaded_model_is_held_twice(pair, tmp_path):
    """Fused projections are cut into tensors with storage of their own."""
    pair("phi3")[1].save_pretrained(tmp_path)
    for weight in load(tmp_path).parameters():
        assert weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "smollm3"])
def test_a_meta_device_build_has_right_rotations_and_norms(model_type, pair, ids):
    ours, theirs = pair(model_type)
    with torch.device("meta"):
        built = FoldForCausalLM(fold_config(theirs.config))
    assert all(weight.is_meta for weight in built.parameters()) and not list(built.buffers())
    built.load_state_dict(ours.state_dict(), assign=True)
    assert_same(logits(built.eval(), ids), logits(ours, ids))


def test_weights_that_a_checkpoint_lacks_start_as_fresh_ones(tmp_path):
    """A norm gain that transformers knows nothing of must not come back as noise: the case of a gate added to a model."""
    plain = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    FoldForCausalLM(FoldConfig(**plain)).save_pretrained(tmp_path)
    config = FoldConfig.from_pretrained(tmp_path, kv_norm=True)
    model = FoldForCausalLM.from_pretrained(tmp_path, config=config)
    assert (model.model.layers[1].self_attn.kv_norm.weight == 1).all()


def test_layouts_and_switches_survive(ids, tmp_path):
    plain = KVLayout.plain(4, 2, 16)
    layout = KVLayout.parse("cla2", plain).with_heads(1).with_time("window:64+2")
    config = FoldConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, layout=layout, base_layout=plain, kv_norm=True, qk_norm="full", channel_freed=True,
    )  # fmt: skip
    model = FoldForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config.layout == layout and again.config.base_layout == plain and again.config.channel_freed
    assert_same(logits(again, ids), logits(model, ids))


def test_time_bits_dtype_and_device_override(pair, ids, tmp_path):
    pair("llama")[1].save_pretrained(tmp_path)
    assert load(tmp_path, time="h2o:4+4; 0=full").config.layout.time_text() == "h2o:4+4; 0=full"
    assert load(tmp_path, bits="model").config.layout.bits_text() == "model"
    model = load(tmp_path, dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16 == model.config.dtype
    model.save_pretrained(tmp_path / "half")
    assert load(tmp_path / "half").dtype == torch.float32
    assert load(tmp_path / "half", dtype=torch.float16).dtype == torch.float16


def test_a_saved_config_is_readable_json_of_one_architecture(pair, tmp_path):
    ours, _ = pair("gemma2")
    ours.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_type"], written["family"], written["architectures"]) == (
        "kvfold",
        "gemma2",
        ["FoldForCausalLM"],
    )
    assert len(written["layout"]["layers"]) == 4


def test_old_rope_spellings_are_understood(tmp_path):
    config = CONFIG_MAPPING["llama"](rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    assert fold_config(config).rope_parameters == {
        "type": "linear",
        "rope_type": "linear",
        "factor": 2.0,
        "rope_theta": 5e5,
    }


def test_a_gguf_file_loads_and_saves(pair, ids, tmp_path):
    gguf = pytest.importorskip("gguf")
    theirs = pair("qwen2")[1]
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "qwen2")
    for add, value in (
        (writer.add_block_count, 4), (writer.add_context_length, 128), (writer.add_embedding_length, 64),
        (writer.add_feed_forward_length, 96), (writer.add_head_count, 4), (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-6), (writer.add_rope_freq_base, 1e4), (writer.add_vocab_size, 97),
    ):  # fmt: skip
        add(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 4)
    for name, weight in theirs.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = load(tmp_path / "tiny.gguf")
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), atol=1e-4, rtol=1e-4)
    ours.save_pretrained(tmp_path / "ours")
    assert_same(logits(load(tmp_path / "ours"), ids), logits(ours, ids))
