"""Adapters as files: what is loaded is what was trained, and nothing else is taken."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvfold.layout.kvlayout import KVLayout
from kvfold.models.adapters import Base, apply_adapter, read_adapter
from kvfold.models.gates import CallOptions
from kvfold.models.load import load
from kvfold.train.student import make_student, write_trained
from tiny_model import tiny_model

IDS = torch.randint(0, 200, (2, 48), generator=torch.Generator().manual_seed(3))
WAYS = {
    "adapter": {"time": "dms:4", "compression": 3.0, "learning_rate": 3e-2},
    "lora": {
        "time": "dmc:3",
        "compression": 2.0,
        "trains": "lora",
        "rank": 2,
        "zero_out_steps": 2,
        "learning_rate": 3e-2,
    },
    "lora dms": {"time": "dms:4", "compression": 2.0, "trains": "lora", "rank": 2, "learning_rate": 1e-2},
    "lora plain": {"trains": "lora", "rank": 2},
    "control": {"time": "dmc:3", "compression": 2.0, "trains": "lora", "rank": 2, "control": True},
}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_on_its_base_is_the_trained_model(retrofit, way):
    run = retrofit("out", **WAYS[way])
    run.run()
    fresh = tiny_model()
    before = logits(fresh)
    apply_adapter(fresh, run.folder.out)
    assert fresh.config.layout == run.model.config.layout
    torch.testing.assert_close(logits(fresh), logits(run.model), atol=2e-4, rtol=1e-4)
    assert not torch.allclose(logits(fresh), before, atol=1e-3)
    assert (run.folder.out / "adapter.safetensors").stat().st_size < 30_000
    assert not any("lora" in name for name, _ in fresh.named_parameters())


MIXED = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize("trains", ["lora", "full"])
def test_layers_with_a_window_of_their_own_keep_their_channel(retrofit, trains):
    """DMC rules the others alone, and frees its channel there alone: what is loaded is what was trained."""
    run = retrofit(
        "out", model=tiny_model(**MIXED), time="dmc:3", compression=1.5, trains=trains, rank=2, zero_out_steps=2,
        learning_rate=1e-2,
    )  # fmt: skip
    run.run()
    if trains == "full":
        loaded = load(run.folder.out)
    else:
        loaded = tiny_model(**MIXED)
        apply_adapter(loaded, run.folder.out)
    torch.testing.assert_close(logits(loaded), logits(run.model), atol=2e-4, rtol=1e-4)
    rows = [
        layer.self_attn.q_proj.weight.detach().unflatten(0, (-1, 8))[:, -1].abs().sum()
        for layer in run.model.model.layers
    ]
    assert rows[0] > 0 and (trains == "lora" or rows[1] > 0)  # the gate's own weights are in the second


def through_the_cache(model, time: str, cuts: list[int]) -> torch.Tensor:
    model.config.layout = model.config.layout.with_time(time)
    cache, parts = model.new_cache(rows=2), []
    with torch.inference_mode():
        for ids in IDS.split(cuts, dim=1):
            parts.append(model(ids, past_key_values=cache).logits)
    return torch.cat(parts, dim=1)


def test_a_freed_channel_stays_zeroed_under_any_method(retrofit):
    """Unfolded, a model that DMC has trained is itself with its gates off: what the channel says is for gates alone."""
    run = retrofit("out", **WAYS["lora"])
    run.run()
    model = tiny_model()
    apply_adapter(model, run.folder.out)
    with torch.no_grad():
        expected = model(IDS, use_cache=False, options=CallOptions(gates="off")).logits
    model.config.layout = model.config.layout.with_time("full")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    for time, cuts in (
        ("full", [48]),
        ("full", [20, 1, 1, 26]),
        ("window:100+4", [30, 1, 17]),
        ("h2o:50+50", [30, 1, 17]),
    ):
        found = through_the_cache(model, time, cuts)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_on_shared_layers(retrofit):
    """Owners have gates, readers follow."""
    layout = KVLayout.parse("cla2", KVLayout.plain(2, 2, 8))
    run = retrofit("out", model=tiny_model(layout=layout), **WAYS["adapter"], warm_start=True)
    run.run()
    assert {name.split(".")[2] for name in read_adapter(run.folder.out)[1]} == {"0"}
    fresh = tiny_model(layout=layout)
    apply_adapter(fresh, run.folder.out)
    torch.testing.assert_close(logits(fresh), logits(run.model), atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="KV heads in 1 of them"):
        apply_adapter(tiny_model(), run.folder.out)


def test_a_trained_model_is_loaded_by_its_folder(retrofit):
    run = retrofit("out", time="dmc:3", compression=2.0, trains="full", zero_out_steps=2)
    run.run()
    again = load(run.folder.out)
    assert again.config.layout.time_text() == "dmc:3" and again.config.channel_freed and again.config.gates
    torch.testing.assert_close(logits(again), logits(run.model), atol=1e-5, rtol=1e-5)


@pytest.fixture
def adapter(retrofit):
    """A folder, made quickly: gates that were never trained."""
    run = retrofit("made", time="dms:4", compression=3.0)
    base = Base.of(run.model, "tiny")
    make_student(run.model, run.settings)
    run.folder.out.mkdir()
    write_trained(run.model, None, run.settings, base, run.folder.out)
    return run.folder.out


def test_what_an_adapter_says_of_itself(adapter):
    about, weights = read_adapter(adapter)
    assert (about.base.name, about.time, about.lora) == ("tiny", "dms:4", None)
    assert about.gates["method"] == "dms" and about.gates["reads"] == "own"
    assert sorted(weights)[0] == "model.layers.0.self_attn.fold_norm.weight" and len(weights) == 6


def test_its_method_may_be_given_other_settings(adapter):
    model = tiny_model()
    apply_adapter(model, adapter, time="dms:9")
    assert model.config.layout.time_text() == "dms:9"


def test_its_base_is_known_again_in_another_dtype(adapter):
    apply_adapter(tiny_model().to(torch.bfloat16), adapter)
    apply_adapter(tiny_model().to(torch.float16), adapter)


def test_another_base_is_refused(adapter):
    with pytest.raises(
        ValueError, match=r"it is for tiny \(2 layers of width 32.*this model has 3 layers.*load it on its base"
    ):
        apply_adapter(tiny_model(num_hidden_layers=3), adapter)
    with pytest.raises(ValueError, match=r"1 KV heads in 2 of them"):
        apply_adapter(tiny_model(num_key_value_heads=1), adapter)
    other = tiny_model()
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.3 * weight.std() * torch.randn_like(weight))
    with pytest.raises(ValueError, match="the same shape but other weights: load it on its base"):
        apply_adapter(other, adapter)


def test_a_rounded_base_is_warned_of(adapter):
    """As 4-bit weights are: blocks of 32 with 16 values each."""
    model = tiny_model()
    with torch.no_grad():
        for weight in model.parameters():
            blocks = weight.view(-1, 32) if weight.numel() % 32 == 0 else weight.view(1, -1)
            low, high = blocks.amin(dim=1, keepdim=True), blocks.amax(dim=1, keepdim=True)
            step = (high - low).clamp(min=1e-9) / 15
            blocks.copy_(((blocks - low) / step).round() * step + low)
    with pytest.warns(UserWarning, match="close to that but not the same"):
        apply_adapter(model, adapter)
    assert model.config.layout.time_text() == "dms:4"


def test_what_is_no_whole_adapter_is_refused(adapter, tmp_path):
    with pytest.raises(ValueError, match=r"no adapter.json there: give the folder"):
        apply_adapter(tiny_model(), tmp_path)
    weights, about = adapter / "adapter.safetensors", adapter / "adapter.json"
    whole, told = weights.read_bytes(), about.read_text()
    weights.write_bytes(whole[:300])
    with pytest.raises(ValueError, match="it can't be read .*: fetch it again"):
        apply_adapter(tiny_model(), adapter)
    weights.write_bytes(whole)
    some = load_file(weights)
    save_file(dict(list(some.items())[1:]), weights)
    with pytest.raises(ValueError, match=r"its weights are not those that its adapter.json describes"):
        apply_adapter(tiny_model(), adapter)
    weights.write_bytes(whole)
    for data in ({}, json.loads(told) | {"colour": 1}):
        about.write_text(json.dumps(data))
        with pytest.raises(ValueError, match="it can't be read"):
            read_adapter(adapter)
    about.write_text(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match="format 2: this kvfold reads format 1: update kvfold"):
        read_adapter(adapter)
