"""What a retrofit's step costs: both sides do what they say, in turns."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.nn.functional as F

from kvfold.bench import train
from kvfold.bench.train import StepPoint, bench_train, control_of, make_loop, make_sides, random_samples, step_settings
from kvfold.models import blocks
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM
from kvfold.train.student import retention_of, trained_weights

LAYERS = 3
SMALL = StepPoint(sequence_tokens=24, batch_sequences=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = FoldConfig(vocab_size=97, num_hidden_layers=LAYERS, max_position_embeddings=64, **shape)
    model = FoldForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return model.eval()


@pytest.fixture
def gated_layers(monkeypatch):
    """Grows by one for each layer whose gates are asked anything."""
    asked, original = [], blocks.decide

    def counted(call, *rest):
        asked.append(call.off)
        return original(call, *rest)

    monkeypatch.setattr(blocks, "decide", counted)
    return asked


@pytest.mark.parametrize(
    ("method", "trains"), [("dms:4", "full"), ("dmc:3", "full"), ("dmc", "lora"), ("dms:4", "adapter")]
)
def test_gates_are_asked_on_one_side_alone(model, gated_layers, tmp_path, method, trains):
    point = StepPoint(sequence_tokens=24, batch_sequences=2, trains=trains)
    settings = step_settings(model, method, point)
    samples = random_samples(model, settings)
    for student, plan in zip(make_sides(model, settings), (settings, control_of(settings)), strict=True):
        gated_layers.clear()
        make_loop(student, plan, samples, tmp_path).step(0)
        # A teacher that is the student itself runs with gates off.
        assert gated_layers.count(False) == (LAYERS if plan is settings else 0)
        assert plan is settings or gated_layers == []


@pytest.mark.parametrize(("method", "loss"), [("dmc", "none"), ("dms:4", "reverse")])
def test_the_side_without_gates_minimises_the_same_loss(model, tmp_path, method, loss):
    """The next token's: the plain model's. A distillation: nothing at first, since the student is its teacher."""
    settings = step_settings(model, method, SMALL)
    samples = random_samples(model, settings)
    ids, (gated, plain) = samples.batch(0, range(2)).ids_BT, make_sides(model, settings)
    with torch.no_grad():
        own = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    sides = (plain, control_of(settings)), (gated, settings)
    losses = [make_loop(side, plan, samples, tmp_path).step(0)["loss"] for side, plan in sides]
    assert settings.distils == control_of(settings).distils == loss
    assert losses[0] == pytest.approx(own if loss == "none" else 0.0, rel=1e-5, abs=1e-6)
    assert abs(losses[1] - losses[0]) > 1e-2


@pytest.mark.parametrize(("method", "trains"), [("dms:4", "full"), ("dms:4", "adapter"), ("dms:2", "full")])
def test_gates_fire_as_often_as_trained_ones(model, tmp_path, method, trains):
    """Noise decides: a few hundred decisions scatter by some percent."""
    settings = step_settings(model, method, StepPoint(sequence_tokens=60, batch_sequences=4, trains=trains))
    target = retention_of(model, settings).share_for(settings.compression)
    gated, _ = make_sides(model, settings)
    parts = make_loop(gated, settings, random_samples(model, settings), tmp_path).step(0)
    assert target > 0.5 and parts["share"] == pytest.approx(target, abs=0.06)


def test_both_sides_share_the_weights_and_train_them(model):
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    gated, plain = make_sides(model, step_settings(model, "dms:4", SMALL))
    own, others = (dict(student.model.named_parameters()) for student in (gated, plain))
    assert all(others[name] is weight and own[name] is weight for name, weight in model.named_parameters())
    assert {name for name in own if name not in others} == {name for name in own if ".fold_" in name} != set()
    assert not any(one is weight for one in gated.teacher.parameters() for weight in model.parameters())
    result = bench_train(model, name="tiny", methods=["dms:4"], point=SMALL, repeats=1)
    assert all(not weight.equal(before[name]) for name, weight in model.named_parameters())
    row = result["rows"][0]
    assert row["gates_off"]["trained_parameters"] == model.num_parameters() < row["with_gates"]["trained_parameters"]
    assert model.config.gates is None and model.config.layout.time_text() == "full"


def test_a_frozen_base_stays_and_its_gates_learn(model, tmp_path):
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    settings = step_settings(model, "dms:4", StepPoint(sequence_tokens=24, trains="adapter"))
    sides, samples = make_sides(model, settings), random_samples(model, settings)
    for student, plan in zip(sides, (settings, control_of(settings)), strict=True):
        make_loop(student, plan, samples, tmp_path).step(0)
    assert all(weight.equal(before[name]) for name, weight in model.named_parameters())
    gates, none = (trained_weights(student.model) for student in sides)
    assert none == {} and any(bool(weight.any()) for name, weight in gates.items() if "fold_proj" in name)


def test_sides_take_turns_and_ratios_are_taken_round_by_round(model, monkeypatch):
    turns, seconds = [], iter([9.0, 9.0, 3.0, 2.0, 1.0, 1.0, 8.0, 2.0])

    def noted(loop, device):
        turns.append(loop._settings.compresses)
        return next(seconds)

    monkeypatch.setattr(train, "_timed_step", noted)
    told = []
    result = bench_train(
        model, name="tiny", methods=["dmc"], point=SMALL, repeats=3, report=lambda *done: told.append(done)
    )
    row = result["rows"][0]
    assert turns == [True, False] * 4
    assert row["ratio"] == {"median": 1.5, "min": 1, "max": 4}
    assert row["with_gates"]["step_ms"] == {"median": 3000, "min": 1000, "max": 8000}
    assert row["gates_off"]["tokens_per_second"] == {"median": 24, "min": 24, "max": 48}
    assert told[-1] == ("steps, dmc", 8, 8) and result["repeats"] == 3


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"repeats": 0}, "0 repeats"),
        ({"point": StepPoint(sequence_tokens=65)}, "the model reads 64 at most"),
        ({"methods": ["dms:23"]}, "dms:23 drops nothing in so few tokens"),
        ({"methods": ["h2o:4+4"]}, "it learns nothing"),
        ({"methods": ["dmc"], "point": StepPoint(sequence_tokens=24, trains="adapter")}, "use lora or full"),
    ],
)
def test_what_can_not_be_measured_is_one_line(model, monkeypatch, given, says):
    taken = []
    monkeypatch.setattr(train, "_timed_step", lambda loop, device: taken.append(loop) or 1.0)
    with pytest.raises(ValueError, match=says) as error:
        bench_train(model, name="tiny", **({"point": SMALL, "methods": ["dmc"]} | given))
    assert "\n" not in str(error.value) and taken == []


@pytest.mark.parametrize("given", [{"sequence_tokens": 1}, {"batch_sequences": 0}, {"trains": "all"}])
def test_a_step_of_nothing_is_refused(given):
    with pytest.raises(ValueError, match=str(next(iter(given.values())))):
        StepPoint(**given)
