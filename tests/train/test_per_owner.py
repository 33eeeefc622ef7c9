"""Retrofits in which single owners have no gates, or gates with other settings: what learns, what is counted, what is saved."""

import pytest
import torch

from kvfold.models.adapters import apply_adapter, read_adapter
from kvfold.models.load import load
from kvfold.train.run_folder import read_curve
from kvfold.train.settings import Retention, RetrofitSettings
from kvfold.train.student import make_student, trained_weights
from tiny_model import tiny_model

IDS = torch.randint(0, 200, (2, 48), generator=torch.Generator().manual_seed(5))
LAYERS = {"num_hidden_layers": 3}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def decisions(model):
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False, output_decisions=True).decisions


@pytest.mark.parametrize("warm_start", [False, True])
@pytest.mark.parametrize("time", ["dms:4; 0=full", "1-2=dms:4", "dms:4; 0=window:8+2; 2=dms:9"])
def test_an_adapter_for_some_owners(retrofit, time, warm_start):
    """All owners count in the compression; calibration and the cache agree about it; the others' gates stay as they were."""
    run = retrofit(
        "out", model=tiny_model(**LAYERS), time=time, compression=1.6, calibrate=True, warm_start=warm_start,
        ratio_weight=30.0,
    )  # fmt: skip
    facts = run.run()
    layout = run.model.config.layout
    assert layout.time_text() == layout.with_time(time).time_text() and not layout.time_of(0).trained
    assert facts["calibration"]["after"] == pytest.approx(1.6, rel=0.03)
    assert facts["after"]["compression"] == pytest.approx(1.6, rel=0.1)
    kept = Retention.of(layout, 32, 4)
    assert facts["nominal"] == pytest.approx(kept.nominal_for(1.6))
    last = read_curve(run.folder.curve)[-1]
    assert last["target_nominal_compression"] == pytest.approx(facts["nominal"])
    assert len(last["layer_compression"]) == 2
    per_layer = [kept.without_gates * 3, *(1 / one for one in last["layer_compression"])]
    assert 1 / last["compression"] == pytest.approx(sum(per_layer) / 3, rel=1e-3)
    gates = run.model.model.layers[0].self_attn.fold_proj
    assert not gates.weight.any() and not gates.bias.any() and run.model.model.layers[1].self_attn.fold_proj.bias.any()
    width, outputs = 32, 2
    assert facts["trained_parameters"] == 2 * (width + width * outputs + outputs)
    card = (run.folder.out / "README.md").read_text()
    assert f"| method | `{time}` |" in card and f"({facts['nominal']:.2f} by the gates alone)" in card
    about, _ = read_adapter(run.folder.out)
    fresh = tiny_model(**LAYERS)
    apply_adapter(fresh, run.folder.out)
    assert about.time == layout.time_text() and fresh.config.layout == layout
    torch.testing.assert_close(logits(fresh), logits(run.model), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("trains", ["lora", "full"])
@pytest.mark.parametrize("time", ["dmc:3; 0=full", "1=dmc:3"])
def test_a_channel_is_freed_where_gates_are(retrofit, time, trains):
    """Not in the layers beside them, whatever method rules all of them later."""
    run = retrofit("out", time=time, compression=1.3, trains=trains, rank=2, zero_out_steps=2, learning_rate=1e-2)
    before = tiny_model().model.layers[0].self_attn.q_proj.weight
    run.run()
    assert {name.split(".")[2] for name in trained_weights(run.model) if "fold_" in name} == set()

    def loaded(**settings):
        if trains == "full":
            return load(run.folder.out, **settings)
        model = tiny_model()
        apply_adapter(model, run.folder.out, **settings)
        return model

    again = loaded()
    assert again.config.freed_owners == (1,) and again.config.freed_layers == [1]
    torch.testing.assert_close(logits(again), logits(run.model), atol=2e-4, rtol=1e-4)
    channel = again.model.layers[0].self_attn.q_proj.weight.detach().unflatten(0, (-1, 8))[:, -1]
    assert not torch.allclose(channel, torch.zeros_like(channel), atol=1e-2)
    assert torch.allclose(channel, before.detach().unflatten(0, (-1, 8))[:, -1], atol=0.3)
    assert loaded(time="full").config.freed_owners == (1,)
    again.save_pretrained(run.folder.out.parent / "saved")
    assert load(run.folder.out.parent / "saved", time="dmc:3").config.freed_owners == (1,)


def test_a_stopped_run_goes_on_to_the_same_end(gone_on):
    """Which owners have a freed channel is known again."""
    whole, rest = gone_on(time="dmc:3; 0=full", compression=1.3, trains="full", zero_out_steps=1)
    assert rest.model.config.freed_layers == whole.model.config.freed_layers == [1]
    torch.testing.assert_close(logits(rest.model), logits(whole.model), atol=1e-5, rtol=1e-5)


def test_idle_gates_never_fire_under_another_text(retrofit):
    """The adapter of an owner that trained without one is there, and shut."""
    model = tiny_model()
    make_student(model, RetrofitSettings(time="dms:4; 0=full", compression=1.2, seq_len=32))
    model.config.layout = model.config.layout.with_time("dms:4")
    assert not decisions(model)[0].any()


@pytest.mark.parametrize(
    ("time", "said"),
    [
        ("dms:4; 0=dmc", "gates of one model are of one method, not dmc and dms: choose one"),
        ("window:8+2; 0=full", "it learns nothing"),
        ("dms:4; full", "only the first part may hold for all"),
        ("dms:4; 7=full", "no layer 7"),
        ("dms:4; 0=full", "it can't be reached: .* leave fewer layers without gates"),
        ("dms:4; 0-1=full", "no layer of this model comes under dms:4"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_trained(retrofit, time, said):
    with pytest.raises(ValueError, match=said):
        retrofit("out", time=time, compression=3.0).run()
