"""A method belongs to a cache, not to the model: caches under all methods use one model in turn, and from threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gated_models import CHANNEL, METHODS, cache_under, gated_model
from kvfold.methods.gates import GateConfig
from kvfold.models.adapters import load_gates
from kvfold.models.gates import CallOptions

IDS = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(2))
CUTS = [12, 1, 1, 7, 1, 1, 1, 9, 1, 1, 1, 1, 1, 1, 1]


@torch.no_grad()
def fed(model, cache, number):
    """One call: piece `number` of the text."""
    start = sum(CUTS[:number])
    return model(IDS[:, start : start + CUTS[number]], past_key_values=cache).logits


def alone(model, method):
    cache = cache_under(model, method, 2)
    return torch.cat([fed(model, cache, number) for number in range(len(CUTS))], dim=1), cache.kept_positions


@pytest.mark.parametrize("layers", ["full", "cla2"])
def test_in_turn(layers):
    model = gated_model(layers)
    caches = {method: cache_under(model, method, 2) for method in METHODS}
    parts = {method: [] for method in METHODS}
    for number in range(len(CUTS)):
        for method, cache in caches.items():
            parts[method].append(fed(model, cache, number))
    for method, cache in caches.items():
        logits, kept = alone(model, method)
        assert torch.equal(torch.cat(parts[method], dim=1), logits)
        assert cache.kept_positions == kept


def test_from_threads():
    model = gated_model()
    expected = {method: alone(model, method) for method in METHODS}
    with ThreadPoolExecutor(len(METHODS)) as pool:
        for _ in range(3):
            for method, (logits, kept) in zip(METHODS, pool.map(lambda one: alone(model, one), METHODS), strict=True):
                torch.testing.assert_close(logits, expected[method][0], atol=1e-5, rtol=1e-5)
                assert kept == expected[method][1]


@pytest.mark.parametrize("method", ["dms:5", "dmc:3"])
def test_a_cache_evicts_whatever_the_config_says(method):
    """Before, a cache made under a learned method kept everything while the config said `full`, without a word."""
    model = gated_model()
    assert model.config.layout.time_text() == "full"
    cache = cache_under(model, method, 2)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    assert cache.kept_tokens.max() < IDS.shape[1]
    assert model.config.layout.time_text() == "full", "a cache's method is never the model's"


@pytest.mark.parametrize(("method", "says"), [("dmc:3", "the model has gates of dms"), ("dms", None)])
def test_a_learned_method_needs_its_gates(method, says):
    model = gated_model()
    if says is None:
        assert model.new_cache(1, time=method).layout.time_text() == "dms:256"
        return
    with pytest.raises(ValueError, match=says) as found:
        model.new_cache(1, time=method)
    assert "gates='channel'" in str(found.value) and "\n" not in str(found.value)


def test_the_published_channel_is_asked_for_by_name():
    """It decides as the formulas say; nothing falls back to it."""
    model = gated_model()
    cache = model.new_cache(1, time="dmc", gates="channel")
    assert cache.gates.config == GateConfig(method="dmc")
    with torch.no_grad():
        out = model(IDS[:1], past_key_values=cache, output_decisions=True)
    assert all(one is not None for one in out.decisions)
    with pytest.raises(ValueError, match="one learned method"):
        model.new_cache(1, time="full", gates="channel")


def test_gates_off_is_of_one_call():
    model = gated_model()
    cache = cache_under(model, "dms:5", 1)
    with torch.no_grad():
        off = model(IDS[:1], past_key_values=cache, options=CallOptions(gates="off")).logits
        assert (cache.kept_tokens == IDS.shape[1]).all()
        full = model(IDS[:1], past_key_values=cache_under(model, "full", 1)).logits
    torch.testing.assert_close(off, full, atol=1e-5, rtol=1e-5)


def test_the_shipped_adapter_is_refused_beside_another_model():
    with pytest.raises(ValueError, match="load it on its base"):
        load_gates(gated_model(), "smollm2-135m-dms-4x")


def test_a_gate_set_decides_for_its_cache_alone():
    model = gated_model()
    cache = model.new_cache(1, time="dmc:3", gates=CHANNEL)
    with torch.no_grad():
        through = model(IDS[:1], past_key_values=cache, output_decisions=True).decisions
        own = model(IDS[:1], past_key_values=cache_under(model, "dms:5", 1), output_decisions=True).decisions
    assert not torch.equal(through[0], own[0])
