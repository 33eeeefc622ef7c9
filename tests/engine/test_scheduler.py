"""The scheduler on a simulated store: nobody starves, memory is never exceeded, answers do not depend on who else runs."""

import random

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from kvfold.engine.budget import Budget
from kvfold.engine.scheduler import AGING_S, Scheduler
from simulated import METHODS, SimulatedMemory, costs, make_request, next_token

GRID = 16


def engine(methods=METHODS, *, pool=60_000, scale=1.0, places=64, horizon=32, **options):
    known = costs(methods)
    memory = SimulatedMemory(known, pool, places=places)
    budget = Budget(known, pool, prefill_tokens=GRID, horizon=horizon, scale=scale)
    return Scheduler(budget, memory, prefill_tokens=GRID, prefix_tokens=8, **options), memory


def run_step(scheduler, memory, now, *, ended=None):
    """Plan and run one step. The tokens that were fed, by request."""
    step = scheduler.plan(now)
    groups = {request.method for request, _ in step.prefill}
    assert len(groups) <= 1 and not {id(one) for one in step.decode} & {id(one) for one, _ in step.prefill}
    fed = {}
    for request in step.decode:
        memory.feed(request, 1)
        fed[request] = 1
    longest = max((tokens for _, tokens in step.prefill), default=0)
    assert longest * len(step.prefill) <= GRID or len(step.prefill) == 1
    for request, tokens in step.prefill:
        memory.feed(request, tokens)
        fed[request] = tokens
    for request, _ in step.prefill:
        scheduler.was_read(request)
    for request in fed:
        if request.seen == len(request.tokens):
            request.tokens.append(next_token(request.tokens))
            if request.num_outputs == request.max_tokens:
                cuts = memory.sequences[request.handle].cuts
                if not memory.costs[request.method].chunk_invariant:
                    assert cuts == expected_cuts(request), "prompts are cut on the grid, answers fed one by one"
                scheduler.finish(request, "length")
    if ended is not None:
        ended.extend(step.ended)
    return fed


def expected_cuts(request):
    prompt = request.prompt_tokens
    return [*range(GRID, prompt, GRID), prompt, *range(prompt + 1, request.seen + 1)]


def answer(request):
    tokens = request.tokens[: request.prompt_tokens]
    for _ in range(request.max_tokens):
        tokens.append(next_token(tokens))
    return tokens


def run_all(scheduler, memory, *, limit=4000):
    steps = 0
    while scheduler.waiting or scheduler.running:
        run_step(scheduler, memory, float(steps))
        steps += 1
        assert steps < limit, "somebody starves"
    return steps


requests_strategy = st.lists(
    st.tuples(
        st.sampled_from(METHODS), st.integers(1, 60), st.integers(1, 40), st.integers(0, 2), st.integers(0, 30),
        st.one_of(st.none(), st.integers(0, 60)), st.sampled_from([0, 0, 8, 24]),
    ),
    min_size=2, max_size=14,
)  # fmt: skip


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    drawn=requests_strategy, scale=st.sampled_from([1.0, 0.25]), spare=st.floats(1.0, 4.0),
    places=st.sampled_from([3, 64]), seed=st.integers(0, 99),
)  # fmt: skip
def test_all_finish_with_their_own_answer_and_all_is_freed(drawn, scale, spare, places, seed):
    rng, known = random.Random(seed), costs(METHODS)
    shared = [rng.randrange(50) for _ in range(24)]
    requests = []
    for name, (method, length, max_tokens, priority, _, _, common) in enumerate(drawn):
        prompt = (shared[:common] + [rng.randrange(50) for _ in range(length)])[: max(1, length)]
        requests.append(make_request(name, prompt, method=method, max_tokens=max_tokens, priority=priority))
    # The largest of them fits alone, with a prefill group beside it.
    pool = int(spare * max(known[one.method].most(one.final_tokens + GRID) for one in requests) / 0.97)
    scheduler, memory = engine(pool=pool, scale=scale, places=places)
    arrivals = {name: case[4] for name, case in enumerate(drawn)}
    cancels = {name: case[5] for name, case in enumerate(drawn)}
    refused, step = set(), 0
    while step <= 61 or scheduler.waiting or scheduler.running:
        for name, request in enumerate(requests):
            if arrivals[name] == step:
                request.arrival = float(step)
                try:
                    scheduler.submit(request)
                except ValueError:
                    refused.add(name)
            if cancels[name] == step and not request.is_finished and arrivals[name] <= step and name not in refused:
                held = request.handle is not None
                before = memory.free_bytes
                scheduler.finish(request, "abort")
                assert not held or memory.free_bytes > before
        oldest = min(scheduler.running, key=lambda one: one.rank, default=None)
        progress = run_step(scheduler, memory, float(step))
        if oldest is not None and not oldest.is_finished and oldest is min(scheduler.running, key=lambda one: one.rank):
            assert oldest in progress, "the first in the order always progresses"
        step += 1
        assert step < 6000, "somebody starves"
    for name, request in enumerate(requests):
        if name in refused:
            assert request.handle is None
        elif request.finish_reason == "length":
            assert request.tokens == answer(request)
        else:
            assert request.finish_reason == "abort", request.error
    event(f"preemptions: {min(scheduler.preemptions, 3)}")
    event(f"prefix hits: {min(scheduler.prefixes.hits, 3)}")
    scheduler.drop_prefixes()
    assert not memory.sequences and memory.free_bytes == memory.pool_bytes


def test_estimates_four_times_too_low_cause_preemptions_and_nothing_worse():
    scheduler, memory = engine(["full"], pool=40_000, scale=0.25)
    requests = [make_request(name, [name] * 12, max_tokens=50) for name in range(12)]
    for request in requests:
        scheduler.submit(request)
    run_all(scheduler, memory)
    assert scheduler.preemptions > 0
    assert all(one.tokens == answer(one) for one in requests)


def test_exact_estimates_cause_no_preemption():
    scheduler, memory = engine(["full", "h2o:16+16", "window:24+4"], pool=50_000, horizon=64)
    for name in range(20):
        method = ["full", "h2o:16+16", "window:24+4"][name % 3]
        scheduler.submit(make_request(name, [name] * 12, method=method, max_tokens=40))
    run_all(scheduler, memory)
    assert scheduler.preemptions == 0 and scheduler.most_running > 3


def test_one_that_can_never_fit_is_refused_and_the_others_are_unharmed():
    scheduler, memory = engine(["full"], pool=20_000)
    fine = make_request("fine", [1] * 10)
    scheduler.submit(fine)
    with pytest.raises(
        ValueError, match=r"prompt and answer of 5008 tokens must fit into the KV memory of 20000 bytes"
    ):
        scheduler.submit(make_request("huge", [1] * 5000))
    run_all(scheduler, memory)
    assert fine.tokens == answer(fine)


def test_what_can_ever_fit_fits_when_alone():
    """One formula for both: no request is accepted at submission and then waits for ever."""
    for length in range(1, 400, 7):
        for method in METHODS:
            scheduler, memory = engine([method], pool=30_000)
            try:
                scheduler.submit(make_request("one", [3] * length, method=method))
            except ValueError:
                continue
            assert run_step(scheduler, memory, 0.0), (method, length)


def test_priority_runs_first_and_makes_room():
    scheduler, memory = engine(["full"], pool=24_000)
    low = [make_request(f"low{name}", [name] * 20, max_tokens=30, priority=5) for name in range(6)]
    for request in low:
        scheduler.submit(request)
    for step in range(12):
        run_step(scheduler, memory, float(step))
    urgent = make_request("urgent", [40] * 20, max_tokens=30, priority=0, arrival=12.0)
    scheduler.submit(urgent)
    assert run_step(scheduler, memory, 12.0)[urgent]
    run_all(scheduler, memory)
    assert all(one.tokens == answer(one) for one in [*low, urgent])


def test_a_low_priority_is_not_starved_by_a_stream_of_high_ones():
    scheduler, memory = engine(["full"], pool=9_000)
    slow = make_request("slow", [1] * 10, max_tokens=10, priority=3)
    scheduler.submit(slow)
    for step in range(int(60 * AGING_S)):
        scheduler.submit(make_request(f"fast{step:03d}", [2 + step % 40] * 10, max_tokens=10, arrival=float(step)))
        run_step(scheduler, memory, float(step))
        if slow.is_finished:
            return
    pytest.fail("starved")


def test_a_deadline_ends_a_request_with_what_it_has():
    scheduler, memory = engine(["full"])
    request = make_request("late", [1] * 10, max_tokens=40, deadline=5.5)
    never = make_request("never", [1] * 10, deadline=-1.0)
    ended = []
    for one in (request, never):
        scheduler.submit(one)
    for step in range(8):
        run_step(scheduler, memory, float(step), ended=ended)
    assert ended == [never, request] and request.finish_reason == "timeout" and 3 < request.num_outputs < 8
    scheduler.drop_prefixes()
    assert not memory.sequences


def test_a_shared_beginning_is_read_once():
    scheduler, memory = engine(["full"], pool=400_000)
    text = list(range(40)) * 5
    requests = [make_request(name, [*text, *[50 + name] * 5], max_tokens=3) for name in range(16)]
    for request in requests:
        scheduler.submit(request)
    run_all(scheduler, memory)
    read = sum(one.prompt_tokens - one.cached_tokens for one in requests)
    assert read < 1.2 * (len(text) + sum(5 for _ in requests))
    assert all(one.tokens == answer(one) for one in requests)


def test_a_second_turn_goes_on_from_the_first():
    scheduler, memory = engine(["dms:8", "h2o:16+16"], pool=400_000)
    for method, least in (("dms:8", 49), ("h2o:16+16", 0)):
        first = make_request(f"first {method}", list(range(40)), method=method, max_tokens=10)
        scheduler.submit(first)
        run_all(scheduler, memory)
        second = make_request(f"second {method}", [*first.tokens, 7, 8, 9], method=method)
        scheduler.submit(second)
        run_all(scheduler, memory)
        assert second.cached_tokens == least, "state that depends on the cuts is shared on the grid only"
        assert second.tokens == answer(second)


def test_state_that_depends_on_the_cuts_is_shared_on_the_grid():
    scheduler, memory = engine(["h2o:16+16"], pool=400_000)
    text = list(range(40))
    for name in range(3):
        request = make_request(name, [*text, 60 + name], method="h2o:16+16")
        scheduler.submit(request)
        run_all(scheduler, memory)
        assert request.cached_tokens == (2 * GRID if name == 2 else 0), "the second shows where they part"
