"""Methods that do what none of kvfold's own does: drop any number of entries in one step, or nothing ever; what they
keep may fall as the text grows.
"""

from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch

from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import layout_bytes
from kvfold.methods import registry
from kvfold.methods.base import Method
from store_driver import assert_real_close, check_books, draw, feed, feed_cut, new_cache, pieces, shared, slow_twin


@pytest.fixture(autouse=True)
def own_registries(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))


@dataclass(frozen=True, kw_only=True, slots=True)
class Toy(Method):
    """`NAME:N`; keeps no more than all."""

    number: int
    title, source, lossy, chunk_invariant = "a toy", "a test", True, False

    @classmethod
    def parse(cls, args):
        return cls(number=int(args))

    def format(self):
        return f"{self.name}:{self.number}"

    def max_kept(self, seen):
        return seen


def register(monkeypatch, name, method):
    toy = type(f"Toy_{name}", (method,), {"name": name, "__slots__": ()})
    monkeypatch.setitem(registry.METHODS, name, toy)


class Scored(Toy):
    """With a score in each slot."""

    attention_scores = "cumulative"
    slot_arrays = MappingProxyType({"score": "float32"})


class Newest(Toy):
    """Scored by the newest query alone."""

    attention_scores = "last"


class AboveMean(Scored):
    """Keeps what received at least the mean of what is there: any number goes at once, the newest too."""

    def retain(self, entries):
        there = entries.position_BKE >= 0
        total = entries.score_BKE.masked_fill(~there, 0).sum(dim=-1, keepdim=True)
        return (entries.score_BKE * there.sum(dim=-1, keepdim=True) >= total) | (entries.seen_B < 6)[:, None, None]


class AboveMeanOfNewest(Newest):
    """The same by the newest query's attention."""

    retain = AboveMean.retain


def above_mean_by_hand(slow, owner, row, seen, which):
    for held in slow.held[owner][row]:
        if seen >= 6:
            scores = [getattr(entry, which) for entry in held]
            mean = sum(scores) / len(scores)
            slow.narrowest = min(slow.narrowest, *(abs(score - mean) for score in scores))
            held[:] = [entry for entry, score in zip(held, scores, strict=True) if score >= mean]


@pytest.mark.parametrize("cuts", [[1], [9, 1], [7, 3, 1, 1, 5]], ids=str)
@pytest.mark.parametrize(("method", "which"), [(AboveMean, "total"), (AboveMeanOfNewest, "newest")])
def test_any_number_of_entries_may_go_in_one_step(cuts, method, which, monkeypatch):
    """Heads keep different numbers, the newest token is often not stored at all, and nothing is lost or doubled."""
    register(monkeypatch, "toy", method)
    layout = shared([0, 0, 2]).with_time("toy:1")
    for seed in range(50, 60):
        text = draw(layout, 24, rows=2, seed=seed)
        slow, theirs = slow_twin(layout.base(), rows=2), []
        slow._drop = lambda owner, row, seen, slow=slow: above_mean_by_hand(slow, owner, row, seen, which)
        for piece in pieces(text, cuts):
            outs = slow.call(piece.q, piece.k, piece.v, [[True] * piece.columns] * 2)
            theirs.append((outs, slow.positions()))
        if slow.narrowest > 1e-5:
            break
    else:
        pytest.fail("ten draws in a row were too close to tell")
    cache = new_cache(layout, 2)
    for piece, (outs, positions) in zip(pieces(text, cuts), theirs, strict=True):
        assert_real_close(feed(cache, piece), outs, None)
        assert cache.kept_positions == positions
        check_books(cache.store)


@pytest.mark.parametrize("method", ["Toy", "Scored", "Newest"])
def test_a_method_may_answer_that_all_stays(method, monkeypatch):
    register(monkeypatch, "all", globals()[method])
    layout = shared([0, 0, 2])
    text = draw(layout, 20, rows=2, pads=[0, 4])
    for cuts in ([1], [20], [7, 1, 5]):
        cache = new_cache(layout.with_time("all:1"), 2)
        assert_real_close(feed_cut(cache, text, cuts), feed_cut(new_cache(layout, 2), text, cuts), text.real)
        assert cache.kept_tokens.tolist() == [[[20] * 2, [16] * 2]] * 2


class LastBlock(Toy):
    """Queries see their own block of N tokens: all of them go when a new block begins."""

    chunk_invariant = True

    def max_kept(self, seen):
        return seen - max(0, (seen - 1) // self.number) * self.number

    def sees(self, query_BT, position_BKE):
        return position_BKE.unsqueeze(2) >= (query_BT // self.number * self.number)[:, None, :, None]


@pytest.mark.parametrize("cuts", [[1], [26], [5, 1, 1, 9, 1]], ids=str)
def test_what_a_method_keeps_may_fall(cuts, monkeypatch):
    """Rows of other lengths may hold more than the one that has seen most: 7 of 7 beside 2 of 10."""
    register(monkeypatch, "block", LastBlock)
    layout = KVLayout.plain(2, 2, 8).with_time("block:8")
    text = draw(layout, 26, rows=3, pads=[0, 3, 17])
    cache = new_cache(layout, 3)
    ours = feed_cut(cache, text, cuts)
    assert cache.kept_tokens[0, :, 0].tolist() == [2, 7, 1]
    assert cache.allocated_bytes == layout_bytes(layout, [26, 23, 9], 4, 4)
    for row, pad in enumerate([0, 3, 17]):
        for start in range(pad, 26, 8):
            block = text.part(slice(start, min(start + 8, 26)), slice(row, row + 1))
            block.real = None
            for out, alone in zip(ours, feed(new_cache(layout.base()), block), strict=True):
                torch.testing.assert_close(out[row, start : start + 8], alone[0], atol=2e-5, rtol=1e-4)


class Forgetful(Newest):
    """Drops the oldest entry at every step."""

    def retain(self, entries):
        there = entries.position_BKE.masked_fill(entries.position_BKE < 0, 10**6)
        return entries.position_BKE != there.amin(dim=-1, keepdim=True)


@pytest.mark.parametrize("columns", [1, 3])
def test_a_call_of_nothing_but_padding_is_no_step_for_that_row(columns, monkeypatch):
    """Whatever the policy would drop."""
    register(monkeypatch, "forget", Forgetful)
    layout = KVLayout.plain(2, 2, 8).with_time("forget:1")
    cache = new_cache(layout, 2)
    feed(cache, draw(layout, 9, rows=2))
    text = draw(layout, columns, rows=2, pads=[0, columns])
    before = [owner[1] for owner in cache.kept_positions]
    feed(cache, text)
    assert [owner[1] for owner in cache.kept_positions] == before
    assert cache.kept_tokens[:, 0].tolist() == [[8 + columns - 1] * 2] * 2
