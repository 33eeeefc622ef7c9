"""Conversion: what must stay the same does, every pattern builds, saves, loads and generates, readers hold nothing."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvfold.convert.conversion import Conversion, convert, converted_model, new_config
from kvfold.convert.heads import attention_name
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.load import load
from model_driver import CLOSE, GREEDY

FAMILIES = {
    "llama": {"attention_bias": True},
    "qwen2": {},
    "qwen3": {"head_dim": 32, "attention_bias": True},
    "olmo2": {"attention_bias": True},
    "phi3": {},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32},
    "granite": {"residual_multiplier": 0.22, "logits_scaling": 6.0, "attention_multiplier": 0.02},
    "smollm3": {"no_rope_layer_interval": 2},
    "mistral": {"sliding_window": 6},
    "hunyuan_v1_dense": {"head_dim": 16},
}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
PATTERNS = [
    *("full", "cla2", "cla3", "cla4", "cla2-keep-ends", "cla2-dense-front", "cla2-dense-back"),
    *("yoco", "trailing:2", "0_1_0_1"),
]


def turned_into(model: FoldForCausalLM, **wanted) -> FoldForCausalLM:
    wanted = Conversion(**wanted)
    return converted_model(model, new_config(model.config, wanted), wanted)


@torch.no_grad()
def logits(model, ids) -> torch.Tensor:
    return model(ids, use_cache=False).logits


@pytest.fixture
def source(pair, tmp_path) -> Path:
    """A folder with a tiny Llama as transformers writes it."""
    _, theirs = pair("llama")
    theirs.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_layout_changes_nothing(family, pair, ids):
    ours, _ = pair(family, **FAMILIES[family])
    for init in ("mean", "drop"):
        same = turned_into(ours, layers="full", heads=2, init=init)
        assert torch.equal(logits(same, ids), logits(ours, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_put_in_another_order_compute_the_same(family, pair, ids):
    from kvfold.convert.heads import reorder_heads

    ours, _ = pair(family, **(FAMILIES[family] | HEADS))
    weights = dict(ours.state_dict())
    for owner in ours.config.layout.owners:
        reorder_heads(ours.config, weights, owner, [2, 0, 3, 1])
    expected = logits(ours, ids)
    ours.load_state_dict(weights)
    torch.testing.assert_close(logits(ours, ids), expected, **CLOSE)


def test_heads_of_a_shared_layout_put_in_another_order_compute_the_same(pair, ids):
    from kvfold.convert.heads import reorder_heads

    shared = turned_into(pair("qwen3", **HEADS, head_dim=32)[0], layers="cla2")
    weights, expected = dict(shared.state_dict()), logits(shared, ids)
    reorder_heads(shared.config, weights, 2, [2, 0, 3, 1])
    shared.load_state_dict(weights)
    torch.testing.assert_close(logits(shared, ids), expected, **CLOSE)


def make_heads_alike(model: FoldForCausalLM, like: list[int]) -> None:
    """Give every owner's KV head n the weights of head like[n]."""
    rows = ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias")
    rows += ("k_norm.weight",) if model.config.qk_norm == "full" else ()
    weights = model.state_dict()
    with torch.no_grad():
        for layer in range(model.config.num_hidden_layers):
            for part in rows:
                if attention_name(layer, part) in weights:
                    tensor = weights[attention_name(layer, part)]
                    tensor.copy_(tensor.unflatten(0, (len(like), -1))[like].flatten(0, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_equal_heads_is_exact(family, pair, ids):
    ours, _ = pair(family, **(FAMILIES[family] | HEADS))
    make_heads_alike(ours, [0, 0, 2, 2])
    fewer = turned_into(ours, heads=2)
    assert fewer.model.layers[0].self_attn.k_proj.out_features == 2 * ours.config.head_dim
    torch.testing.assert_close(logits(fewer, ids), logits(ours, ids), **CLOSE)


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_equal_heads_that_are_no_neighbours_are_found(family, pair, ids):
    ours, _ = pair(family, **(FAMILIES[family] | HEADS))
    make_heads_alike(ours, [0, 1, 1, 0])
    paired, plain = (turned_into(ours, heads=2, pair_heads=pairs) for pairs in (True, False))
    torch.testing.assert_close(logits(paired, ids), logits(ours, ids), **CLOSE)
    assert (logits(plain, ids) - logits(ours, ids)).abs().max() > 0.01


def test_a_merged_head_is_the_mean(pair):
    ours, _ = pair("qwen2", **HEADS)
    before, after = ours.state_dict(), turned_into(ours, heads=2).state_dict()
    for part in ("k_proj.weight", "v_proj.weight", "k_proj.bias"):
        rows = before[attention_name(1, part)].unflatten(0, (4, 8))
        expected = torch.cat([(rows[0] + rows[1]) / 2, (rows[2] + rows[3]) / 2])
        torch.testing.assert_close(after[attention_name(1, part)], expected)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "gemma3_text", "olmo2"])
def test_layers_that_see_the_same_normed_input_share_exactly(family, pair):
    """Projections that differ by what the norms' gains make up for: the mean of the folded ones is each of them."""
    ours, _ = pair(family, **FAMILIES.get(family, {}))
    config, layers = ours.config, ours.model.layers
    owner, reader = layers[0].self_attn, layers[1].self_attn
    with torch.no_grad():
        for part in ("k_proj", "v_proj"):
            theirs, mine = getattr(reader, part), getattr(owner, part)
            if config.norm_placement == "post":
                theirs.weight.copy_(mine.weight)
            else:
                gains = [one.input_layernorm.weight + config.norm_offset for one in (layers[0], layers[1])]
                theirs.weight.copy_(mine.weight * gains[0] / gains[1])
            if mine.bias is not None:
                theirs.bias.copy_(mine.bias)
        if owner.k_norm is not None:
            reader.k_norm.weight.copy_(owner.k_norm.weight)
    shared = turned_into(ours, layers="cla2", init="mean")
    for part in ("k_proj", "v_proj"):
        found, expected = getattr(shared.model.layers[0].self_attn, part), getattr(owner, part)
        torch.testing.assert_close(found.weight, expected.weight, atol=1e-5, rtol=1e-4)


def test_a_group_with_equal_inputs_computes_the_same(pair, ids):
    """Layer 0 adds nothing to the stream and layer 1 has its weights: reading layer 0's keys and values is exact."""
    ours, _ = pair("llama")
    first, second = ours.model.layers[:2]
    with torch.no_grad():
        first.self_attn.o_proj.weight.zero_()
        first.mlp.down_proj.weight.zero_()
        for part in ("k_proj", "v_proj"):
            getattr(second.self_attn, part).weight.copy_(getattr(first.self_attn, part).weight)
        second.input_layernorm.weight.copy_(first.input_layernorm.weight)
    for init in ("mean", "drop"):
        shared = turned_into(ours, layers="0_0_2_3", init=init)
        torch.testing.assert_close(logits(shared, ids), logits(ours, ids), **CLOSE)


@pytest.mark.parametrize(("layers", "init"), [*((layers, "mean") for layers in PATTERNS), ("cla2", "drop")])
def test_every_pattern_builds_saves_loads_and_generates(layers, init, pair, tmp_path, ids):
    _, theirs = pair("llama")
    theirs.save_pretrained(tmp_path / "source")
    written = convert(tmp_path / "source", tmp_path / "out", Conversion(layers=layers, init=init, heads=1))
    found = load(tmp_path / "out")
    assert found.config.layout == KVLayout.parse(layers, KVLayout.plain(4, 1, 16))
    assert found.config.base_layout == KVLayout.plain(4, 2, 16)
    # The loaded one is packed: equal up to rounding.
    torch.testing.assert_close(logits(found, ids), logits(written, ids), **CLOSE)
    with torch.no_grad():
        cache = found.new_cache(rows=2)
        pieces = [found(piece, past_key_values=cache).logits for piece in ids.split([6, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), logits(found, ids), **CLOSE)
    assert found.generate(ids, max_new_tokens=3, **GREEDY).shape == (2, 16)
    held = {int(name.split(".")[2]) for name in found.state_dict() if "k_proj" in name or "v_proj" in name}
    assert held == set(found.config.layout.owners)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_for_transformers_is_the_same_model(family, pair, tmp_path, ids):
    ours, theirs = pair(family, **(FAMILIES[family] | HEADS))
    theirs.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", Conversion(heads=2, target="transformers"))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert found.config.model_type == family and found.config.num_key_value_heads == 2
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, logits(turned_into(ours, heads=2), ids), **CLOSE)


def test_there_and_back(source, tmp_path, ids):
    """Our checkpoint, written for transformers again, is the source."""
    convert(source, tmp_path / "ours", Conversion())
    convert(tmp_path / "ours", tmp_path / "theirs", Conversion(target="transformers"))
    before, after = (AutoModelForCausalLM.from_pretrained(one).state_dict() for one in (source, tmp_path / "theirs"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_converted_model_converts_again(source, tmp_path):
    convert(source, tmp_path / "a", Conversion(layers="cla2"))
    convert(tmp_path / "a", tmp_path / "b", Conversion(layers="cla4", heads=1, time="window:8+2"))
    layout = load(tmp_path / "b").config.layout
    assert (layout.owners, layout.layers[0].num_kv_heads, layout.time_text()) == ((0,), 1, "window:8+2")
    assert load(tmp_path / "b").config.base_layout == KVLayout.plain(4, 2, 16)


def test_the_dtype_of_the_source_is_kept(source, tmp_path):
    load(source, dtype="bfloat16").save_pretrained(tmp_path / "half")
    convert(tmp_path / "half", tmp_path / "out", Conversion(layers="cla2"))
    assert load(tmp_path / "out", dtype="bfloat16").dtype == torch.bfloat16
    assert '"dtype": "bfloat16"' in (tmp_path / "out" / "config.json").read_text()


def test_tokenizer_and_generation_config_come_along(source, tmp_path):
    from transformers import GenerationConfig

    from byte_tokenizer import byte_tokenizer
    from kvfold.models.load import load_tokenizer

    byte_tokenizer().save_pretrained(source)
    GenerationConfig(top_k=7, do_sample=True).save_pretrained(source)
    convert(source, tmp_path / "out", Conversion(layers="cla2"))
    assert load_tokenizer(tmp_path / "out")("abc").input_ids == byte_tokenizer()("abc").input_ids
    assert load(tmp_path / "out").generation_config.top_k == 7
