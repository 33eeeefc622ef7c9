"""States held to the teacher's: the distance against a slow reference, what it does in a run, and where it is refused."""

import pytest
import torch

from kvfold.train.objectives import state_distance
from kvfold.train.run_folder import read_curve
from tiny_model import tiny_model

HELD = {"trains": "full", "kl": "forward", "hidden_loss_weight": 1.0}


def other():
    """The same shape, other weights."""
    model = tiny_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model


def slow_distance(student, teacher, counts) -> float:
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        for row, tokens in enumerate(counts.tolist()):
            for at, counted in enumerate(tokens):
                mine, wanted = (one[row, at].tolist() for one in (ours, theirs))
                apart = sum((a - b) ** 2 for a, b in zip(mine, wanted, strict=True))
                total += counted * apart / sum(b**2 for b in wanted)
    return total / len(student)


def test_distance_is_the_slow_reference():
    torch.manual_seed(0)
    student = [torch.randn(2, 5, 7, requires_grad=True) for _ in range(3)]
    teacher = [torch.randn(2, 5, 7, requires_grad=True) for _ in range(3)]
    counts = torch.rand(2, 5) < 0.6
    found = state_distance(student, teacher, counts)
    assert found.item() == pytest.approx(slow_distance(student, teacher, counts), rel=1e-5)
    found.backward()
    assert all(one.grad is None for one in teacher)
    assert all(torch.equal(one.grad.abs().sum(dim=-1) > 0, counts) for one in student)


def test_states_come_nearer_to_the_teachers(retrofit):
    """Two models of other weights: with the factor the distance falls further than by the head's loss alone, where it is no
    figure of the curve.
    """
    runs = {}
    for weight in (1e-6, 3.0):
        run = retrofit(
            f"at-{weight}", trains="full", kl="forward", teacher=other(), hidden_loss_weight=weight, learning_rate=1e-2
        )
        run.run()
        runs[weight] = read_curve(run.folder.curve)
    for weight, curve in runs.items():
        for point in curve:
            assert point["loss"] == pytest.approx(point["distillation"] + weight * point["state_distance"], rel=1e-5)
    alone, held = (curve[-1]["state_distance"] for curve in runs.values())
    assert held < 0.8 * alone and held < 0.8 * runs[3.0][0]["state_distance"]


def test_parts_of_a_step_share_alike(retrofit):
    curves = []
    for at_once in (1, 4):
        run = retrofit(f"at-{at_once}", teacher=other(), micro_batch_size=at_once, **HELD)
        run.run()
        curves.append([point["state_distance"] for point in read_curve(run.folder.curve)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3, abs=1e-6)


def test_gates_are_held_to_their_own_base(retrofit):
    """An adapter's teacher is the model below it: no distance while nothing is dropped, one when it is."""
    run = retrofit(
        "adapter", time="dms:4", trains="adapter", hidden_loss_weight=1.0, compression=2.0, ramp_steps=2, tail_steps=8
    )
    run.run()
    found = [point["state_distance"] for point in read_curve(run.folder.curve)]
    assert min(found) >= 0 and max(found) > 1e-4


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"kl": "none"}, "hidden_loss_weight 1: nothing is distilled"),
        ({"kl": "forward", "teacher_states": "kept"}, "hidden_loss_weight 1: teacher_states keep"),
        ({"kl": "forward", "hidden_loss_weight": -1.0}, "hidden_loss_weight -1"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(settings, given, says):
    with pytest.raises(ValueError, match=says):
        settings(trains="full", **({"hidden_loss_weight": 1.0} | given))


def test_a_teacher_of_another_depth_is_refused(retrofit, tmp_path):
    with pytest.raises(ValueError, match="hidden_loss_weight: the teacher has 4 layers of width 32, the model 2 of 32"):
        retrofit("none", teacher=tiny_model(num_hidden_layers=4), **HELD).run()
    assert not (tmp_path / "none").exists()
