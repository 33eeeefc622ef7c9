"""The tail of a layer as one function equals its parts, and stands aside where they are not as they were."""

import copy

import pytest
import torch
from torch import nn

from kvfold.models.blocks import FoldLayer
from kvfold.models.packing import pack, unpack
from kvfold.ops import native

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
@pytest.mark.parametrize("rows", [1, 2, 7, 33])
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
        assert not layer.tail.serves(layer._tail_modules(), torch.randn(300, 1, 128))
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
