"""Layouts that are drawn step by step."""

import pytest

from kvfold.layout.kvlayout import KVLayout
from kvfold.train.run_folder import read_curve
from kvfold.train.student import drawn_layout
from tiny_model import tiny_model

BASE = KVLayout.plain(8, 2, 8)


def owners(layout: KVLayout) -> list[int]:
    return [layer.owner for layer in layout.layers]


@pytest.mark.parametrize("base", [BASE, KVLayout.parse("cla2", BASE)], ids=["own", "cla2"])
@pytest.mark.parametrize("pattern", ["cla4", "trailing:2", "0_0_0_0_0_0_0_0"])
def test_every_reader_shares_in_half_of_the_steps(base, pattern):
    # A pattern names owners that the model has.
    widest = KVLayout.parse(pattern, base) if pattern != "trailing:2" else base.with_owners([0, 0, 2, 2, 4, 4, 2, 2])
    drawn = [drawn_layout(base, widest, seed=0, step=step) for step in range(400)]
    for layer in range(8):
        moved = sum(layout.owner_of(layer) != base.owner_of(layer) for layout in drawn) / len(drawn)
        if base.owner_of(layer) == widest.owner_of(layer):
            assert moved == 0
        else:
            # A reader goes where its owner went, or of its own accord.
            assert 0.4 < moved < 0.9
            assert any(layout.owner_of(layer) == widest.owner_of(layer) for layout in drawn)


def test_every_layout_in_between_comes_up():
    """Under four layers to a group: all eight choices in each, pairs among them, and nothing that reads past an owner."""
    widest = KVLayout.parse("cla4", BASE)
    drawn = {tuple(owners(drawn_layout(BASE, widest, seed=0, step=step))) for step in range(2000)}
    assert {one[:4] for one in drawn} == {(0, *rest) for rest in _NEAREST} and tuple(
        owners(KVLayout.parse("cla2", BASE))
    ) in drawn
    assert len(drawn) == 64


_NEAREST = [(1, 2, 3), (1, 2, 2), (1, 1, 3), (1, 1, 1), (0, 2, 3), (0, 2, 2), (0, 0, 3), (0, 0, 0)]


def test_a_step_has_its_layout_and_another_seed_another():
    widest = KVLayout.parse("cla4", BASE)
    found = [[owners(drawn_layout(BASE, widest, seed=seed, step=step)) for step in range(9)] for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2] and len({tuple(one) for one in found[0]}) > 4


def test_one_model_learns_to_do_with_fewer_layers(retrofit):
    run = retrofit("drawn", trains="full", kl="forward", drawn_layers="cla2", ramp_steps=0, tail_steps=12)
    run.run()
    losses = [point["loss"] for point in read_curve(run.folder.curve)]
    # Two layers: a step either shares, and is far from its teacher, or is the teacher but for what was learned.
    assert min(losses) < 0.05 < max(losses) and run.model.config.layout.layers == tiny_model().config.layout.layers


def test_parts_of_a_step_share_alike(retrofit):
    curves = []
    for at_once in (1, 4):
        run = retrofit(f"at-{at_once}", trains="full", kl="forward", drawn_layers="cla2", micro_batch_size=at_once)
        run.run()
        curves.append([point["loss"] for point in read_curve(run.folder.curve)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"drawn_layers": "cla2", "time": "dms:4"}, "drawn_layers cla2 with time 'dms:4'"),
        ({"drawn_layers": "cla2", "fsdp": True}, "drawn_layers cla2 with fsdp"),
        ({"drawn_layers": "0_0_0"}, "3"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(retrofit, tmp_path, given, says):
    with pytest.raises(ValueError, match=says) as error:
        retrofit("none", trains="full", **given).run()
    assert "\n" not in str(error.value) and not (tmp_path / "none").exists()
