"""Plans for gates of a known compression: what is expected, where without it a plan is the most that may be held."""

import pytest

from kvfold.layout.planner import plan, plan_rows


@pytest.mark.parametrize("time", ["dmc:12", "dmc:inf", "dms:64"])
def test_a_compression_is_what_is_kept_beside_the_rings(time):
    whole, most = plan("smollm2-135m"), plan("smollm2-135m", time=time)
    folded = plan("smollm2-135m", time=time, compression=4)
    ring = most.bytes([0]) - whole.bytes([0])
    assert most.bytes([4096]) - whole.bytes([4096]) == ring
    lengths = folded.bytes([0]) - ring
    assert (folded.bytes([4096]) - ring - lengths) * 4 == whole.bytes([4096]) - lengths
    assert folded.max_rows(10**9, 4096) > 3.3 * whole.max_rows(10**9, 4096)
    assert folded.max_context_tokens(10**9, 4) > 3.3 * whole.max_context_tokens(10**9, 4)


def test_the_delay_is_there_in_any_case():
    folded = plan("smollm2-135m", time="dms:256", compression=4)
    assert folded.bytes([257]) == plan("smollm2-135m", time="dms:256").bytes([257])
    assert folded.bytes([512]) == folded.bytes([257])
    assert folded.bytes([1280]) > folded.bytes([512])


def test_it_is_for_the_owners_that_a_learned_method_rules():
    mixed = plan("smollm2-135m", time="dms:64; 0-14=full", compression=4)
    whole, all_of_them = plan("smollm2-135m"), plan("smollm2-135m", time="dms:64", compression=4)
    assert 2 * mixed.bytes([4096]) == pytest.approx(whole.bytes([4096]) + all_of_them.bytes([4096]), rel=1e-3)


def test_rows_of_the_other_axes_are_as_they_were():
    given = {"context_tokens": 4096, "layers": "cla2", "time": "dms:64"}
    most, folded = plan_rows("smollm2-135m", **given), plan_rows("smollm2-135m", compression=4, **given)
    assert [row.context_bytes for row in most[:2]] == [row.context_bytes for row in folded[:2]]
    assert [round(row.compression, 1) for row in folded] == [1.0, 2.0, 4.0, 8.0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"time": "dms:64", "compression": 0.5}, "compression 0.5: it is times smaller, 1 or more"),
        ({"time": "h2o:8+8", "compression": 4}, "only what dmc and dms keep is learned"),
        ({"compression": 4}, "only what dmc and dms keep is learned"),
    ],
)
def test_bad_input(given, said):
    with pytest.raises(ValueError, match=said):
        plan("smollm2-135m", **given)
