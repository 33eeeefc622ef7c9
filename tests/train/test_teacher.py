"""What a teacher said is read again, and nothing else changes."""

import pytest
import torch

from kvfold.train.objectives import Distillation
from kvfold.train.student import TeacherStates
from tiny_model import tiny_model


@pytest.fixture
def asked(monkeypatch):
    """How many sequences teachers are asked about."""
    found, original = [], Distillation._asked

    def noted(self, ids_BT):
        found.append(ids_BT.shape[0])
        return original(self, ids_BT)

    monkeypatch.setattr(Distillation, "_asked", noted)
    return found


def curve(run) -> list[float]:
    points = []
    object.__setattr__(run, "on_step", points.append)
    run.run()
    return [point["loss"] for point in points]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"time": "dms:4", "trains": "adapter"}, {"time": "dmc:3", "trains": "lora", "kl": "reverse"}),
        (
            {"time": "dms:4", "trains": "full"},
            {"time": "dmc", "trains": "full", "kl": "forward", "micro_batch_size": 4},
        ),
    ],
)
def test_another_run_on_the_same_text_asks_nothing(retrofit, asked, tmp_path, first, second):
    kept = {"teacher_states": str(tmp_path / "states")}
    plain = [curve(retrofit(f"plain-{name}", **given)) for name, given in (("a", first), ("b", second))]
    asked.clear()
    with_states = [curve(retrofit("a", **kept, **first))]
    assert sum(asked) == 10 * 4
    asked.clear()
    with_states.append(curve(retrofit("b", **kept, **second)))
    assert asked == []
    for one, other in zip(plain, with_states, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5) and max(one) > 0


def test_sequences_that_are_missing_are_asked_alone_and_order_does_not_matter(tmp_path):
    states, ids = TeacherStates(tmp_path, tiny_model()), torch.arange(12).view(4, 3)
    calls = []

    def ask(ids_BT):
        calls.append(ids_BT.tolist())
        return ids_BT[..., None].float() * torch.ones(5)

    first = states.of(ids[:2], ask)
    both = states.of(ids[[3, 1, 0, 2]], ask)
    assert calls == [ids[:2].tolist(), ids[[3, 2]].tolist()]
    assert first.equal(both[[2, 1]]) and both.equal(ids[[3, 1, 0, 2], :, None].float().expand(-1, -1, 5))


def test_a_file_that_was_cut_short_is_asked_again(tmp_path):
    states, ids = TeacherStates(tmp_path, tiny_model()), torch.arange(3)[None]
    states.of(ids, lambda one: torch.ones(1, 3, 5))
    (path,) = tmp_path.glob("*/*.safetensors")
    path.write_bytes(path.read_bytes()[:-7])
    assert states.of(ids, lambda one: torch.zeros(1, 3, 5)).equal(torch.zeros(1, 3, 5))


def test_another_teacher_has_files_of_its_own(tmp_path):
    other = tiny_model()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    for model in (tiny_model(), tiny_model(), other):
        TeacherStates(tmp_path, model)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"trains": "full"}, "nothing is distilled"),
        ({"trains": "full", "time": "dms:4", "fsdp": True}, "asked together"),
    ],
)
def test_where_nothing_can_be_kept_it_is_refused(settings, given, says):
    with pytest.raises(ValueError, match=f"teacher_states somewhere: .*{says}"):
        settings(teacher_states="somewhere", **given)


def test_teachers_of_the_same_weights_and_another_layout_are_told_apart(tmp_path):
    plain, narrow = tiny_model(), tiny_model()
    narrow.config.layout = narrow.config.layout.with_time("window:6+2")
    ids = torch.arange(3)[None]
    for model, said in ((plain, 1.0), (narrow, 0.0)):
        assert TeacherStates(tmp_path, model).of(ids, lambda one, said=said: torch.full((1, 3, 5), said)).eq(said).all()


def test_what_was_said_under_autocast_is_kept_apart(tmp_path):
    states, ids = TeacherStates(tmp_path, tiny_model()), torch.arange(3)[None]
    states.of(ids, lambda one: torch.ones(1, 3, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert states.of(ids, lambda one: torch.zeros(1, 3, 5)).equal(torch.zeros(1, 3, 5))
    assert states.of(ids, lambda one: torch.zeros(1, 3, 5)).equal(torch.ones(1, 3, 5))
