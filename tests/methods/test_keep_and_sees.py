"""What each policy answers, tensors in and tensors out, against loops over single entries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.methods.base import Budget
from kvfold.methods.plans import Entries
from kvfold.methods.registry import parse_time
from kvfold.methods.scored import evict_lowest
from kvfold.methods.window import Full


@st.composite
def holdings(draw_from, heads_alike=False):
    """Entries of some rows: positions in any order, holes (-1), scores with ties; and tokens seen."""
    rows, heads, entries = (draw_from(st.integers(1, most)) for most in (3, 2, 9))
    position = torch.full((rows, heads, entries), -1, dtype=torch.int32)
    seen = []
    for row in range(rows):
        seen.append(draw_from(st.integers(1, 30)))
        held = []
        for head in range(heads):
            if head == 0 or not heads_alike:
                number = draw_from(st.integers(0, min(entries, seen[-1])))
                held = draw_from(st.permutations(range(seen[-1])))[:number]
                places = draw_from(st.permutations(range(entries)))[:number]
            position[row, head, places] = torch.tensor(held, dtype=torch.int32)
    scores = draw_from(st.lists(st.integers(0, 4), min_size=position.numel(), max_size=position.numel()))
    return Entries(
        position_BKE=position, score_BKE=torch.tensor(scores, dtype=torch.float32).view(position.shape),
        seen_B=torch.tensor(seen),
    )  # fmt: skip


def stay(entries, keep):
    """[row][head]: the positions that stay."""
    return [[sorted(p[p >= 0][k[p >= 0]].tolist()) for p, k in zip(*pair, strict=True)]
            for pair in zip(entries.position_BKE, keep, strict=True)]  # fmt: skip


def held(entries, row, head):
    """(position, score) of what is there."""
    both = zip(entries.position_BKE[row, head].tolist(), entries.score_BKE[row, head].tolist(), strict=True)
    return [(position, score) for position, score in both if position >= 0]


def top(pairs, number):
    return [position for position, _ in sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:number]]


@given(holdings(), st.sampled_from(["2+1", "1+4", "25%+25%", "10%+3", "30%+100%"]))
@settings(deadline=None, max_examples=60)
def test_h2o(entries, budgets):
    keep = parse_time(f"h2o:{budgets}").retain(entries)
    recent, heavy = (Budget.parse(text) for text in budgets.split("+"))
    for row, seen in enumerate(entries.seen_B.tolist()):
        for head in range(entries.position_BKE.shape[1]):
            pairs = held(entries, row, head)
            new = [position for position, _ in pairs if position >= seen - recent.tokens(seen)]
            old = [pair for pair in pairs if pair[0] < seen - recent.tokens(seen)]
            assert stay(entries, keep)[row][head] == sorted([*new, *top(old, heavy.tokens(seen))])


@given(holdings(heads_alike=True), st.sampled_from(["1", "3", "8", "25%", "100%"]))
@settings(deadline=None, max_examples=60)
def test_tova(entries, budget):
    keep = parse_time(f"tova:{budget}").retain(entries)
    for row, seen in enumerate(entries.seen_B.tolist()):
        heads = [held(entries, row, head) for head in range(entries.position_BKE.shape[1])]
        summed = {}
        for position, score in (pair for head in heads for pair in head):
            summed[position] = summed.get(position, 0) + score
        chosen = sorted(top(summed.items(), Budget.parse(budget).tokens(seen)))
        assert stay(entries, keep)[row] == [chosen] * len(heads)


@given(holdings(), st.sampled_from(["1+0", "3+2", "25%+1", "100%+0"]))
@settings(deadline=None, max_examples=60)
def test_window_keeps_what_its_newest_query_sees(entries, settings_text):
    method = parse_time(f"window:{settings_text}")
    recent, sinks = settings_text.split("+")
    keep = method.retain(entries)
    for row, seen in enumerate(entries.seen_B.tolist()):
        for head in range(entries.position_BKE.shape[1]):
            chosen = [position for position, _ in held(entries, row, head)
                      if position >= seen - Budget.parse(recent).tokens(seen) or position < int(sinks)]  # fmt: skip
            assert stay(entries, keep)[row][head] == sorted(chosen)
    sees = method.sees(entries.seen_B[:, None] - 1, entries.position_BKE)
    assert stay(entries, sees[:, :, 0]) == stay(entries, keep)


def test_window_tells_every_query_what_it_sees():
    method = parse_time("window:3+1")
    position = torch.arange(8, dtype=torch.int32)[None, None]
    sees = method.sees(torch.arange(8)[None], position)[0, 0]
    for query in range(8):
        assert [e for e in range(query + 1) if sees[query, e]] == sorted({0, *range(max(0, query - 2), query + 1)})


@given(
    st.integers(1, 12).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 3), min_size=n, max_size=n)] * 2)),
    st.integers(0, 12), st.randoms(use_true_random=False),
)  # fmt: skip
@settings(deadline=None, max_examples=100)
def test_evict_lowest(drawn, room, random):
    """Of equal scores the newer go; with one too many (the quick path) as with several."""
    scores, flags = drawn
    positions = random.sample(range(40), len(scores))
    candidates = [flag > 0 for flag in flags]
    gone = evict_lowest(
        torch.tensor([[scores]], dtype=torch.float32), torch.tensor([[positions]], dtype=torch.int32),
        torch.tensor([[candidates]]), torch.tensor([room]),
    )[0, 0].tolist()  # fmt: skip
    order = sorted((i for i, c in enumerate(candidates) if c), key=lambda i: (scores[i], -positions[i]))
    assert [i for i, flag in enumerate(gone) if flag] == sorted(order[: max(0, len(order) - room)])


def test_evict_lowest_in_lanes_that_differ():
    """One lane has one too many, one has three, one none, one nothing at all."""
    score = torch.tensor([[[5.0, 1, 1, 3]], [[5, 1, 1, 3]], [[0, 0, 0, 0]], [[0, 0, 0, 0]]])
    position = torch.tensor([[[7, 3, 9, 1]]] * 4, dtype=torch.int32)
    candidate = torch.tensor([[[True] * 4], [[True] * 4], [[True, False, True, False]], [[False] * 4]])
    gone = evict_lowest(score, position, candidate, torch.tensor([3, 1, 2, 0]))
    assert gone[:, 0].tolist() == [[False, False, True, False], [False, True, True, True], [False] * 4, [False] * 4]
    gone = evict_lowest(score[:1], position[:1], candidate[:1], torch.tensor([3]))
    assert gone[0, 0].tolist() == [False, False, True, False]


def test_nothing_dropped_needs_no_scores():
    """`full` asks for no weights and answers that all stays."""
    method = Full()
    entries = Entries(position_BKE=torch.zeros(1, 1, 1, dtype=torch.int32), score_BKE=None, seen_B=torch.ones(1).long())
    assert method.attention_scores is None and method.retain(entries) is None
    assert method.sees(torch.zeros(1, 1), entries.position_BKE) is None


@pytest.mark.parametrize("percent", [1, 7, 12, 25, 33, 99, 100])
def test_shares_are_counted_as_the_specs_count_them(percent):
    seen = torch.arange(1, 2000)
    budget = Budget(percent=percent)
    assert budget.of(seen).tolist() == [budget.tokens(n) for n in seen.tolist()]
    assert Budget(fixed=64).of(seen) == 64
