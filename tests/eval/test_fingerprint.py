"""All weights are read once for each model, and again where anything of them changed, however that was done."""

import copy
import gc

import pytest
import torch

from byte_tokenizer import byte_tokenizer
from kvfold.eval import cells
from kvfold.eval.cells import fingerprint, model_key
from kvfold.eval.perplexity import measure_quality
from kvfold.eval.reading import Protocol
from kvfold.methods.gates import GateConfig
from tiny_model import tiny_model


@pytest.fixture
def read(monkeypatch) -> list:
    """Weights that are read whole."""
    found, raw = [], cells._raw
    monkeypatch.setattr(cells, "_raw", lambda weight: found.append(weight) or raw(weight))
    return found


def test_weights_are_read_once(read):
    model = tiny_model()
    first = fingerprint(model)
    assert len(read) == len(list(model.parameters()))
    read.clear()
    assert fingerprint(model) == model_key(model, "other name")["fingerprint"] == first and read == []
    assert fingerprint(tiny_model()) == first and read  # another model of the same weights


def test_measurements_of_one_model_read_them_once(read, tmp_path):
    model, tokenizer, text = tiny_model(), byte_tokenizer(), tmp_path / "text.txt"
    text.write_text("a few words " * 60)
    protocol = Protocol(windows=2, context_tokens=32, batch=2)
    for method in ("full", "window:8+2"):
        measure_quality(model, tokenizer, [text], [method], name="tiny", protocol=protocol)
    assert len(read) == len(list(model.parameters()))


CHANGES = {
    "in place": lambda weight: weight.add_(1.0),
    "one value": lambda weight: weight[-1, -1].add_(1.0),
    "behind torch's back": lambda weight: weight.data.mul_(2.0),
    "a new tensor": lambda weight: setattr(weight, "data", weight.data.clone() * 2),
    "by an optimizer": lambda weight: torch.optim.SGD([weight], lr=1.0).step(),
    "copied": lambda weight: weight.copy_(torch.zeros_like(weight)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change):
    model = tiny_model()
    before, weight = fingerprint(model), model.model.layers[1].self_attn.q_proj.weight
    weight.grad = torch.ones_like(weight)
    with torch.no_grad():
        CHANGES[change](weight)
    fresh = fingerprint(copy.deepcopy(model))
    assert fingerprint(model) == fresh != before


def test_gates_dtype_and_loading_are_seen():
    model, found = tiny_model(), []
    other = tiny_model(rms_norm_eps=1e-5).state_dict()
    for change in (
        lambda: None,
        lambda: model.set_gates(GateConfig(method="dms", source="adapter"), "dms:4"),
        lambda: model.load_state_dict({name: weight * 2 for name, weight in other.items()}, strict=False),
        lambda: model.to(torch.bfloat16),
        lambda: setattr(model.config, "rms_norm_eps", 0.1),
    ):
        change()
        found.append(fingerprint(model))
        assert found[-1] == fingerprint(copy.deepcopy(model))
    assert len(set(found)) == 5


def test_weights_made_in_inference_mode_have_a_fingerprint():
    with torch.inference_mode():
        model = tiny_model()
    assert fingerprint(model) == fingerprint(tiny_model())


def test_nothing_is_kept_of_models_that_are_gone():
    gc.collect()
    before, model = len(cells._FINGERPRINTS), tiny_model()
    fingerprint(model)
    del model
    gc.collect()
    assert len(cells._FINGERPRINTS) <= before
