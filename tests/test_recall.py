"""k-hop recall: the texts say what they should, the loss falls, and a stopped run resumes."""

import pytest
import torch
from recall_task import VARIANTS, RecallRun, RecallTask, answers_to, description, measure, train

TASK = RecallTask(symbols=6, pairs=(2, 4), hops=(1, 2, 3))
RUN = RecallRun(task=TASK, layers=2, heads=2, head_dim=8, width=16, mlp_width=32, steps=60, answers=64)


def test_answers_follow_from_the_text():
    batch = TASK.batch(40, pairs=4, seed=0, step=3)
    assert batch.ids_BT.shape == (10, 20)
    for ids, hops, answers in zip(
        batch.ids_BT.tolist(), batch.hops_BQ.tolist(), batch.answers_BQ.tolist(), strict=True
    ):
        listed, asked = ids[:12], ids[12:]
        assert listed[::3] == [6] * 4
        step = dict(zip(listed[1::3], listed[2::3], strict=True))
        assert len(step) == 4
        assert sorted(asked[1::2]) == sorted(step)
        assert asked[::2] == [6 + one for one in hops]
        for symbol, number, answer in zip(asked[1::2], hops, answers, strict=True):
            for _ in range(number):
                symbol = step[symbol]
            assert symbol == answer


def test_draws():
    """The same arguments give the same text, others another; few pairs ask few hops."""
    one, same, other = (TASK.batch(32, pairs=4, seed=0, step=step).ids_BT for step in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, TASK.batch(32, pairs=4, seed=1, step=1).ids_BT)
    assert (TASK.batch(32, pairs=2, seed=0, step=0).hops_BQ == 1).all()
    assert set(TASK.batch(256, pairs=4, seed=0, step=0).hops_BQ.flatten().tolist()) == {1, 2, 3}


def test_the_loss_falls_and_a_stopped_run_resumes():
    points, states = [], []
    model = train(RUN, on_point=points.append, every=30, on_state=lambda state: states.append(_copied(state)))
    assert [point["step"] for point in points] == [30, 60]
    assert points[1]["loss"] < points[0]["loss"]
    assert points[-1]["accuracy"] == measure(model, TASK)["accuracy"]
    assert answers_to(points, points[0]["accuracy"]["2x1"], "2x1") == 1920
    assert answers_to(points, 1.1, "2x1") is None
    resumed = []
    train(RUN, on_point=resumed.append, every=30, state=states[0])
    assert resumed[0]["loss"] == pytest.approx(points[1]["loss"], rel=1e-5)
    assert resumed[0]["test_loss"] == pytest.approx(points[1]["test_loss"], rel=1e-4)


def _copied(state):
    import copy

    return copy.deepcopy(state)


def test_hops_join_step_by_step():
    """Texts too short for the hops of a stage are left out."""
    run = RecallRun(task=RecallTask(symbols=8, pairs=(2, 4, 8)), hop_steps=(10, 20))
    assert [run.asked(step) for step in (0, 2, 9)] == [(2, (1,)), (8, (1,)), (2, (1,))]
    assert run.asked(10) == (4, (1, 2))
    assert run.asked(21) == (8, (1, 2, 3))
    assert RecallRun(task=run.task).asked(0) == (4, (1, 2, 3))
    assert set(run.task.batch(64, pairs=8, seed=0, step=0, hops=(2,)).hops_BQ.flatten().tolist()) == {2}


def test_variants_and_their_bytes():
    """Half of MQA's bytes three ways, twice of it by heads."""
    run = RecallRun(task=TASK)
    bytes_of = {name: description(run.with_variant(name))["kv_bytes_per_token"] for name in VARIANTS}
    assert bytes_of["mqa"] == 2 * 2 * 16 * 4
    assert bytes_of["mha"] == 4 * bytes_of["mqa"]
    assert bytes_of["mqa-keep-ends"] * 4 == bytes_of["mqa"] * 3
    assert {bytes_of[name] * 2 for name in ("mqa-cla2", "mqa-half-head", "mqa-half-layers")} == {bytes_of["mqa"]}


@pytest.mark.parametrize(
    "values", [{"hops": (2,), "pairs": (2, 4)}, {"pairs": (8,), "symbols": 4}, {"hops": (0, 1)}, {"pairs": ()}]
)
def test_refused(values):
    with pytest.raises(ValueError, match="pairs"):
        RecallTask(**values)
