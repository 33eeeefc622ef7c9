import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.dmc import DMC
from kvfold.methods.dms import DMS
from kvfold.train.settings import Retention, RetrofitSettings, Stages


def of_method(method, tokens):
    return Retention.of(KVLayout.plain(1, 1, 1).with_time(method.format()), tokens)


def share_for(compression, tokens, method):
    return of_method(method, tokens).share_for(compression)


def nominal_for(compression, tokens, method):
    return of_method(method, tokens).nominal_for(compression)


def test_the_window_is_counted():
    """A pool holds the delay window and the newest token whatever gates say: FACTS' 1,024 tokens at a delay of 256."""
    share = share_for(1024 / (257 + (1024 - 257) / 4), 1024, DMS(delay=256))
    assert share == pytest.approx(0.75)
    assert nominal_for(4, 1024, DMS(delay=128)) == pytest.approx((1024 - 129) / (256 - 129))


@pytest.mark.parametrize("spec", [DMS(delay=16), DMC(window=12), DMC(window=None)])
@given(compression=st.floats(1, 8), tokens=st.integers(512, 4096))
def test_share_and_compression_are_inverses(spec, compression, tokens):
    kept = of_method(spec, tokens)
    assert kept.compression_for(kept.share_for(compression)) == pytest.approx(compression)


def test_nothing_fires_at_compression_1():
    assert share_for(1, 64, DMS(delay=512)) == 0
    assert nominal_for(1, 64, DMC()) == 1


def test_dmc_merges_all_but_the_first():
    assert share_for(4, 101, DMC()) == pytest.approx(1 - (101 / 4 - 1) / 100)


@pytest.mark.parametrize(("compression", "tokens"), [(4, 1024), (4, 1022), (3, 1000), (8, 4096), (1.5, 100)])
def test_an_unreachable_target_names_the_largest_delay_that_reaches_it(compression, tokens):
    with pytest.raises(ValueError, match="it can't be reached: use a delay of") as refused:
        share_for(compression, tokens, DMS(delay=tokens))
    named = int(str(refused.value).split("a delay of ")[1].split()[0])
    assert 0 < share_for(compression, tokens, DMS(delay=named)) < 1
    with pytest.raises(ValueError, match="can't be reached"):
        share_for(compression, tokens, DMS(delay=named + 1))


LAYERS = KVLayout.plain(4, 2, 8, [None, None, None, 32])


@pytest.mark.parametrize("time", ["dms:16", "dms:16; 0=full", "dms:16; 0=dms:4; 1=window:20+4", "0-1=dms:16"])
@given(share=st.floats(0, 0.99))
def test_all_owners_count_by_their_bytes(time, share):
    """Layer 3 slides over 32 tokens; a head under a gate keeps its window, and of the rest what does not fire."""
    layout, tokens = LAYERS.with_time(time), 200
    kept = 0.0
    for owner in range(4):
        method = layout.time_of(owner)
        free = tokens - method.delay - 1 if method.trained else 0
        kept += method.max_kept(tokens) - free * share
    found = Retention.of(layout, tokens)
    assert found.compression_for(share) == pytest.approx(4 * tokens / kept)
    assert found.share_for(found.compression_for(share)) == pytest.approx(share, abs=1e-9)


def test_storage_counts():
    """A layer of int8 costs about half: what it keeps weighs half as much."""
    plain = KVLayout.plain(2, 1, 64).with_time("dms:16; 1=full")
    mixed = Retention.of(plain.with_bits("model; 1=int8"), 200)
    assert Retention.of(plain, 200).without_gates == 0.5
    assert mixed.without_gates == pytest.approx(68 / (68 + 128)) or 0.3 < mixed.without_gates < 0.4


def test_what_is_kept_without_gates_may_be_too_much():
    kept = Retention.of(LAYERS.with_time("0=dms:4; 1-2=full"), 200)
    assert kept.share_for(1.2) == 0  # the sliding layer alone comes to more
    with pytest.raises(ValueError, match="keeps 50, and .* always keeps 109: .* leave fewer layers without gates"):
        kept.share_for(4)


def test_a_target_that_no_delay_reaches():
    with pytest.raises(ValueError, match="ask for less, or longer sequences"):
        share_for(40, 32, DMS(delay=1))


def test_the_stages_follow_each_other():
    stages = Stages(compression=4, zero_out_steps=5, ramp_steps=6, tail_steps=3)
    assert stages.total == 14
    assert [stages.zero_out_factor(step) for step in range(6)] == pytest.approx([1, 0.75, 0.5, 0.25, 0, None])
    asked = [stages.compression_at(step) for step in range(14)]
    assert asked == pytest.approx([1] * 5 + [1.5, 2, 2.5, 3, 3.5, 4] + [4] * 3)
    assert {done: stages.unit_after(done) for done in range(15) if stages.unit_after(done)} == {7: 2, 9: 3}


def test_without_a_ramp_the_target_holds_from_the_start():
    stages = Stages(compression=3, ramp_steps=0, tail_steps=4)
    assert [stages.compression_at(step) for step in range(4)] == [3] * 4
    assert not any(stages.unit_after(done) for done in range(5))


@given(steps=st.integers(1, 300), compression=st.integers(2, 16))
def test_every_unit_short_of_the_target_leaves_one_checkpoint(steps, compression):
    stages = Stages(compression=compression, ramp_steps=steps, tail_steps=2)
    left = [unit for done in range(stages.total + 1) if (unit := stages.unit_after(done))]
    assert left == sorted(set(left)) and set(left) <= set(range(2, compression))
    assert steps < compression or left == list(range(2, compression))


def test_no_steps_at_all():
    with pytest.raises(ValueError, match="give it more tokens"):
        Stages(compression=2, ramp_steps=0)


def factors(kind, **settings):
    stages = {"time": "dms:4", "compression": 2, "ramp_steps": 6, "tail_steps": 4}
    settings = RetrofitSettings(**stages, learning_rate_schedule=kind, **settings)
    return [settings.rate_factor(step) for step in range(10)]


def test_learning_rates():
    assert factors("constant") == [1] * 10
    assert factors("constant", warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75] + [1] * 7)
    tail = factors("tail-cosine", final_learning_rate=0.1)
    assert tail[:7] == [1] * 7 and tail[8] == pytest.approx(0.55) and tail[9] < 0.3
    whole = factors("cosine", final_learning_rate=0.5, warmup_steps=2)
    assert whole[:3] == pytest.approx([0.5, 1, 1]) and whole[3:] == sorted(whole[3:], reverse=True) and whole[9] > 0.5
