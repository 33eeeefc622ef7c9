"""Layers that share for a while read what the model converted for good would read."""

import pytest
import torch

from kvfold.convert.conversion import Conversion, converted_model, new_config
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.gates import CallOptions
from tiny_model import tiny_model

IDS = torch.arange(2 * 12).view(2, 12) % 50


@pytest.mark.parametrize("pattern", ["cla2", "cla3", "trailing:2", "0_1_0_3_1_3", "full"])
@pytest.mark.parametrize("training", [False, True])
def test_it_is_the_model_converted_with_drop(pattern, training):
    model = tiny_model(num_hidden_layers=6).train(training)
    wanted = Conversion(layers=pattern, init="drop")
    converted = converted_model(model, new_config(model.config, wanted), wanted).train(training)
    plain = model(IDS, use_cache=False).logits
    sharing = CallOptions(sharing=KVLayout.parse(pattern, model.config.layout))
    shared = model(IDS, use_cache=False, options=sharing).logits
    assert torch.allclose(shared, converted(IDS, use_cache=False).logits, atol=1e-5)
    assert torch.allclose(shared, plain, atol=1e-3) == (pattern == "full")
    assert model(IDS, use_cache=False).logits.equal(plain)


def test_a_reader_s_own_projections_get_no_gradient():
    model = tiny_model(num_hidden_layers=4).train()
    sharing = CallOptions(sharing=KVLayout.parse("cla2", model.config.layout))
    model(IDS, use_cache=False, options=sharing).logits.sum().backward()
    found = [layer.self_attn.k_proj.weight.grad is not None for layer in model.model.layers]
    assert found == [True, False, True, False]


def test_windows_and_methods_stay():
    model = tiny_model(num_hidden_layers=4)
    model.config.layout = model.config.layout.with_time("window:3+1")
    sharing = CallOptions(sharing=KVLayout.parse("cla2", model.config.layout.base()))
    windowed = model(IDS, use_cache=False, options=sharing).logits
    model.config.layout = model.config.layout.with_time("full")
    assert not torch.allclose(model(IDS, use_cache=False, options=sharing).logits, windowed, atol=1e-3)


def test_a_cache_is_refused():
    model = tiny_model(num_hidden_layers=4)
    sharing = CallOptions(sharing=KVLayout.parse("cla2", model.config.layout))
    with pytest.raises(ValueError, match="while layers share for a while: convert the model"):
        model(IDS, past_key_values=model.new_cache(rows=2), options=sharing)
    with torch.no_grad():
        assert model(IDS, options=sharing).past_key_values is None
