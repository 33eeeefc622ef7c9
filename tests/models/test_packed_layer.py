"""What stands before and behind attention as one function each equals its parts, and stands aside where these have changed."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from kvfold.methods.gates import GateConfig
from kvfold.models.blocks import FoldLayer, pack, unpack
from kvfold.models.gates import GateCall, GateNorm, GateProjection, GateTable, gate_table
from kvfold.ops import native
from kvfold.ops.rotation import Rotation

pytestmark = pytest.mark.skipif(native.linear_library() is None, reason="no C compiler, or switched off")


@pytest.fixture
def model(pair):
    return copy.deepcopy(pair("llama", hidden_size=128, intermediate_size=256)[0])


def layer_of(model) -> FoldLayer:
    return next(module for module in model.modules() if isinstance(module, FoldLayer))


def both(layer, attended, hidden):
    """(whether the function serves, what it gives, what the parts give)."""
    with torch.no_grad():
        serves = layer.tail is not None and layer.tail.serves(layer._tail_modules(), hidden)
        fused = layer.tail(attended, hidden) if serves else None
        h = layer._add(hidden, layer.self_attn.o_proj(attended))
        return serves, fused, layer._add(h, layer.mlp(layer.post_attention_layernorm(h)))


@pytest.mark.parametrize("isa", [one for one in native.instruction_sets() if one != "generic"])
@pytest.mark.parametrize("rows", [1, 2, 7, 33, 230])
@pytest.mark.parametrize("family", ["llama", "granite", "qwen2"])
def test_equals_its_parts(pair, family, rows, isa, monkeypatch):
    monkeypatch.setenv("KVFOLD_ISA", isa)
    native.linear_library.cache_clear()
    try:
        model = copy.deepcopy(pair(family, hidden_size=144, intermediate_size=200)[0])
        pack(model)
        layer = layer_of(model)
        attended = torch.randn(rows, 1, layer.self_attn.o_proj.in_features) * 3
        serves, fused, parts = both(layer, attended, torch.randn(rows, 1, 144) * 5)
        assert serves
        torch.testing.assert_close(fused, parts, atol=1e-4, rtol=1e-5)
    finally:
        native.linear_library.cache_clear()


def written(layer):
    layer.mlp.up_proj.weight.data.mul_(1.5)


def new_gain(layer):
    layer.post_attention_layernorm.weight = nn.Parameter(torch.rand(128))


@pytest.mark.parametrize("edit", [written, new_gain])
def test_a_changed_weight_counts(model, edit):
    pack(model)
    layer, attended, hidden = layer_of(model), torch.randn(2, 1, 64), torch.randn(2, 1, 128)
    attended = torch.randn(2, 1, layer.self_attn.o_proj.in_features)
    before = both(layer, attended, hidden)[1]
    edit(layer)
    serves, fused, parts = both(layer, attended, hidden)
    assert serves and not torch.allclose(before, fused)
    torch.testing.assert_close(fused, parts, atol=1e-4, rtol=1e-5)


def other_activation(layer):
    layer.mlp.act = nn.GELU()


def other_module(layer):
    layer.mlp.down_proj = nn.Linear(256, 128, bias=False)


def hook(layer):
    layer.mlp.register_forward_hook(lambda *_: None)


def hook_inside(layer):
    layer.self_attn.o_proj.register_forward_pre_hook(lambda *_: None)


def bias(layer):
    layer.self_attn.o_proj.bias = nn.Parameter(torch.ones(128))


def gain_in_bf16(layer):
    layer.post_attention_layernorm.bfloat16()


@pytest.mark.parametrize("edit", [other_activation, other_module, hook, hook_inside, bias, gain_in_bf16])
def test_stands_aside(model, edit):
    pack(model)
    layer = layer_of(model)
    hidden = torch.randn(2, 1, 128)
    with torch.no_grad():
        assert layer.tail.serves(layer._tail_modules(), hidden)
        assert not layer.tail.serves(layer._tail_modules(), hidden.double())
        assert layer.tail.serves(layer._tail_modules(), torch.randn(300, 1, 128))
        edit(layer)
        assert not layer.tail.serves(layer._tail_modules(), hidden)
    assert not layer.tail.serves(layer._tail_modules(), hidden)  # gradients are wanted


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_other_forms_have_none(pair, family):
    model = copy.deepcopy(pair(family, hidden_size=128, intermediate_size=256)[0])
    pack(model)
    assert layer_of(model).tail is None


def test_unpacked_and_copied_models_have_none(model):
    pack(model)
    assert layer_of(copy.deepcopy(model)).tail is None
    unpack(model)
    assert layer_of(model).tail is None


def test_equal_answers_with_and_without(model):
    """Whole steps: prompts of several lengths, then tokens one by one."""
    ids, mask = torch.randint(1, 90, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[1, :5] = 0
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    pack(model)
    assert layer_of(model).front is not None
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False), plain)


# -- the front -------------------------------------------------------------------------------------------------------


def angles(rows, width, same=False, tokens=1):
    cos, sin = torch.randn(2, 1 if same else rows, tokens, width)
    return Rotation(cos_BTR=cos, sin_BTR=sin)


@pytest.mark.parametrize("isa", [one for one in native.instruction_sets() if one != "generic"])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (3, 1), (8, 1), (21, 1), (2, 5), (3, 101)])
@pytest.mark.parametrize(("turned", "same"), [(None, False), (1.0, False), (1.0, True), (0.5, False)])
@pytest.mark.parametrize("reader", [False, True])
def test_front_equals_its_parts(model, rows, tokens, turned, same, reader, isa, monkeypatch):
    monkeypatch.setenv("KVFOLD_ISA", isa)
    native.linear_library.cache_clear()
    try:
        layer = layer_of(model)
        attention, hidden = layer.self_attn, torch.randn(rows, tokens, 128) * 5
        if reader:
            attention.k_proj = attention.v_proj = None
        pack(model)
        rotation = None if turned is None else angles(rows, int(attention.head_dim * turned), same, tokens)
        with torch.no_grad():
            assert layer._front_serves(hidden, rotation, None)
            found = layer.front(hidden, rotation)
            parts = attention._projected(layer.input_layernorm(hidden), hidden, None)
            assert found[3] is None
            for at, (one, part) in enumerate(zip(found[:3], parts, strict=True)):
                if part is not None and at < 2 and rotation is not None:
                    part = rotation.apply(part)
                assert (one is None) == (part is None)
                if part is not None:
                    torch.testing.assert_close(one, part, atol=2e-5, rtol=1e-5)
    finally:
        native.linear_library.cache_clear()


def adapter_of(outputs, bias):
    norm, projection = GateNorm(128, 1e-6, offset=False), GateProjection(128, outputs, bias=bias)
    for weight in (norm.weight, *projection.parameters()):
        nn.init.normal_(weight)
    return norm, projection


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (8, 1), (2, 150)])
@pytest.mark.parametrize(("outputs", "bias"), [(1, True), (6, False)])
def test_front_tells_what_an_adapter_does(model, rows, tokens, outputs, bias):
    pack(model)
    layer, hidden, adapter = layer_of(model), torch.randn(rows, tokens, 128) * 5, adapter_of(outputs, bias)
    adapter[0].eps = layer.input_layernorm.eps
    with torch.no_grad():
        assert layer.front.tells(adapter)
        *heads, told = layer.front(hidden, None, adapter)
        torch.testing.assert_close(told, adapter[1](adapter[0](hidden)), atol=1e-4, rtol=1e-4)
        assert all(torch.equal(*pair) for pair in zip(heads, layer.front(hidden, None), strict=False))
    for edit in (hooked, transposed, wrapped):
        assert not layer.front.tells(edit(*adapter_of(outputs, bias), layer.input_layernorm.eps)), edit


def hooked(norm, projection, eps):
    norm.eps = eps
    projection.register_forward_hook(lambda *_: None)
    return norm, projection


def transposed(norm, projection, eps):
    norm.eps = eps
    projection.weight = nn.Parameter(torch.randn(128, 2).t())
    return norm, projection


def wrapped(norm, projection, eps):
    norm.eps = eps
    return norm, nn.Sequential(projection)


def test_a_method_that_merges_keys_gets_them_before_they_are_rotated(model):
    layers = model.config.num_hidden_layers
    dmc = gate_table(GateConfig(method="dmc"), model.config.layout.with_time("dmc"), freed_owners=())
    assert dmc.merging == (True,) * layers
    plain = GateTable(configs=(None,) * layers, freed=(), merging=(False,) * layers)
    merges = GateTable(configs=(None,) * layers, freed=(), merging=(True,) * layers)
    assert plain.is_empty and not merges.is_empty
    pack(model)
    layer, hidden = layer_of(model), torch.randn(2, 1, 128)
    with torch.no_grad():
        assert layer._front_serves(hidden, angles(2, 16), GateCall(plain, False))
        assert not layer._front_serves(hidden, angles(2, 16), GateCall(merges, False))


def hook_on_norm(layer):
    layer.input_layernorm.register_forward_hook(lambda *_: None)


def hook_on_keys(layer):
    layer.self_attn.k_proj.register_forward_hook(lambda *_: None)


def bias_on_values(layer):
    layer.self_attn.v_proj.bias = nn.Parameter(torch.ones(layer.self_attn.v_proj.out_features))


@pytest.mark.parametrize("edit", [hook_on_norm, hook_on_keys, bias_on_values])
def test_front_stands_aside(model, edit):
    pack(model)
    layer, hidden, rotation = layer_of(model), torch.randn(2, 1, 128), angles(2, 16)
    with torch.no_grad():
        assert layer._front_serves(hidden, rotation, None)
        gained = replace(rotation, query_gain_D=torch.ones(layer.self_attn.head_dim))
        assert not layer._front_serves(hidden, gained, None)
        edit(layer)
        assert not layer._front_serves(hidden, rotation, None)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_layers_of_other_forms_have_no_front(pair, family):
    """Biases, and norms of heads."""
    model = copy.deepcopy(pair(family, hidden_size=128, intermediate_size=256)[0])
    pack(model)
    assert layer_of(model).front is None
