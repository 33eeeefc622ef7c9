"""Bytes that requests will need: the planner's where a method is exact, learned and corrected where gates decide."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.engine.budget import LENGTHS, Budget, SequenceCost
from kvfold.engine.request import SamplingParams
from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import layout_bytes
from simulated import METHODS, costs, layout, make_request

EXACT = ("full", "window:24+4", "window:25%+4", "h2o:16+16", "tova:20", "h2o:10%+64; 0=full")


@pytest.mark.parametrize("time", EXACT)
def test_exact_methods_have_the_planners_bytes(time):
    cost = SequenceCost(layout(time), model_bytes=4, page_slots=4)
    for seen in (0, 4, 16, 60, 400):
        assert cost.bytes(seen) == cost.bytes(seen, high=True) == layout_bytes(layout(time), [seen], 4, 4)
    assert not cost.learned and cost.lossless == (time == "full")


@settings(deadline=None, max_examples=60)
@given(time=st.sampled_from(METHODS), seen=st.integers(0, 3000), more=st.integers(0, 500))
def test_bytes_never_shrink_and_lie_below_the_most(time, seen, more):
    cost = costs([time])[time]
    for high in (False, True):
        assert cost.bytes(seen, high=high) <= cost.bytes(seen + more, high=high)
    assert cost.bytes(seen) <= cost.bytes(seen, high=True) <= cost.most(-(-seen // 4) * 4)


def kept_of(rng, rates, seen, delay):
    return [min(seen, delay + 1) + (seen - min(seen, delay + 1)) * rate * rng.uniform(0.9, 1.1) for rate in rates]


def test_without_calibration_everything_stays_until_a_sequence_has_told_better():
    cost, rng, rates = costs(["dms:8"])["dms:8"], random.Random(0), [0.1, 0.3, 0.05, 0.6]
    assert cost.bytes(1000) == cost.most(1000)
    for _ in range(30):
        seen = rng.choice([300, 900, 3000])
        cost.observe(seen, kept_of(rng, rates, seen, 8))
    for seen in (300, 900, 3000):
        truth = cost.state_bytes + sum(page * -(-int(9 + (seen - 9) * rate) // 4)
                                       for rate, (_, page) in zip(rates, cost.streams, strict=True))  # fmt: skip
        assert cost.bytes(seen) == pytest.approx(truth, rel=0.05)
        assert 1.0 < cost.bytes(seen, high=True) / truth < 1.4


def test_calibration_is_where_it_starts():
    ratios = {
        "lengths": LENGTHS,
        "median": [[0.5] * 4, [0.3] * 4, [0.2] * 4],
        "p95": [[0.6] * 4, [0.4] * 4, [0.25] * 4],
    }
    cost = SequenceCost(layout("dms:8"), model_bytes=4, page_slots=4, ratios=ratios)
    page = cost.streams[0][1]
    for place, length in enumerate(LENGTHS):
        for high, row in ((False, ratios["median"]), (True, ratios["p95"])):
            expected = row[place][0] * length * page
            assert (cost.bytes(length, high=high) - cost.state_bytes) / 4 * 4 == pytest.approx(expected, abs=5 * page)
    with pytest.raises(ValueError, match="must be of 6 KV streams, got 4"):
        SequenceCost(KVLayout.plain(3, 2, 8).with_time("dms:8"), model_bytes=4, page_slots=4, ratios=ratios)


@pytest.mark.parametrize("method", METHODS)
def test_one_formula(method):
    """Whatever is not refused for good fits when it is alone."""
    budget = Budget(costs([method]), 50_000, prefill_tokens=16, horizon=64)
    accepted = 0
    for length in range(1, 600, 11):
        request = make_request("one", [1] * length, method=method, max_tokens=1 + length % 90)
        if budget.refusal(request) is None:
            accepted += 1
            assert budget.fits(budget.pool_bytes, budget.growth(request, 0), [method])
    assert accepted


def test_the_most_tokens_that_fit():
    budget = Budget(costs(["full"]), 30_000, prefill_tokens=16)
    request = make_request("one", [1] * 20, max_tokens=100_000)
    request.max_tokens = budget.most_tokens(request)
    assert budget.refusal(request) is None
    request.max_tokens += 4  # a page further
    assert budget.refusal(request) is not None


def test_preemptions_raise_what_is_expected_of_the_running_and_refuse_nobody():
    budget = Budget(costs(["full"]), 200_000, prefill_tokens=16, horizon=32)
    request = make_request("one", [1] * 20, max_tokens=400)
    before, fits = budget.growth(request, 0), budget.refusal(request)
    for _ in range(20):
        budget.preempted()
    assert budget.growth(request, 0) > 2 * before and budget.refusal(request) is fits is None
    assert budget.growth(request, 0) <= budget.growth(request, 0, whole=True), "never more than it can come to"
    for _ in range(200):
        budget.finished(request, [20] * 4)
    assert budget.growth(request, 0) == before


@pytest.mark.parametrize(
    ("asked", "surely"),
    [({}, 0), ({"min_tokens": 300}, 300), ({"ignore_eos": True}, 400), ({"ignore_eos": True, "stop": ("x",)}, 0)],
)
def test_room_for_what_a_request_will_surely_come_to(asked, surely):
    budget = Budget(costs(["full"]), 200_000, prefill_tokens=16, horizon=32)
    request = make_request("one", [1] * 20, max_tokens=400)
    request.params = SamplingParams(max_tokens=400, **asked)
    assert request.certain_tokens == 19 + surely
    assert budget.growth(request, 0) == budget.costs["full"].bytes(20 + max(32, surely - 1))
