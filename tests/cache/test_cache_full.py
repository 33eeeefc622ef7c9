"""A cache with a budget: what fits by the plan fits, one row more does not, and a refused call changes nothing."""

import pytest
import torch

from kvfold.cache.allocator import CacheFull
from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import Plan, layout_bytes
from store_driver import (
    TIMES,
    Face,
    assert_real_close,
    check_books,
    draw,
    face_of,
    feed,
    feed_cut,
    new_cache,
    plain_time,
    shared,
    with_sizes,
)  # fmt: skip


def plan_of(layout, page_slots=16):
    return Plan(source="test", layout=layout, base_layout=layout.base(), model_bytes=4, model_tokens=None,
                page_slots=page_slots)  # fmt: skip


def state_of(cache):
    """Everything that a refused call must leave alone."""
    store = cache.store
    return (
        cache.columns, list(cache.rows), cache.seen_tokens.tolist(), cache.kept_tokens.tolist(), cache.kept_positions,
        cache.allocated_bytes, cache.pool_bytes, cache.free_pages, store.num_sequences, sorted(store._free),
    )  # fmt: skip


@pytest.mark.parametrize("time", ["full", "window:256+4", "h2o:128+128", "tova:256", "window:25%+4"])
def test_the_plan_and_the_store_agree_on_how_many_rows_fit(time):
    """Rows of 4,096 tokens: as many as the plan says, and not one more."""
    layout = KVLayout.plain(1, 1, 8).with_time(time)
    plan = plan_of(layout)
    memory = 3 * plan.bytes([4096]) + plan.bytes([4096]) // 2
    rows = plan.max_rows(memory, 4096)
    assert rows == 3
    text = draw(layout, 4096, group=1)
    crowd = new_cache(layout, rows + 1, memory_bytes=memory, page_slots=16)
    for row in crowd.rows[:rows]:
        feed_cut(face_of(crowd, [row]), text, [512], check=False)
    assert crowd.pool_bytes <= memory
    assert crowd.allocated_bytes == plan.bytes([4096] * rows) + crowd.store._sequence_bytes <= memory
    with pytest.raises(CacheFull):
        feed_cut(face_of(crowd, crowd.rows[rows:]), text, [512], check=False)
    check_books(crowd.store)


@pytest.mark.parametrize("time", ["full", "window:9+2", "h2o:8+8", "tova:12"])
def test_the_longest_context_of_the_plan_fits_and_one_token_more_does_not(time):
    layout = KVLayout.plain(2, 2, 8).with_time(time)
    plan = plan_of(layout, page_slots=4)
    memory = plan.bytes([100, 100])
    longest = plan.max_context_tokens(memory, 2)
    cache = new_cache(layout, 2, memory_bytes=memory)
    feed(cache, draw(layout, longest or 300, rows=2))
    if longest is not None:
        with pytest.raises(CacheFull):
            feed(cache, draw(layout, 1, rows=2))


@pytest.mark.parametrize("owners", [[0, 1], [0, 0, 2, 2]], ids=str)
@pytest.mark.parametrize("columns", [30, 4, 1])
def test_a_refused_call_leaves_the_rows_as_they_were(owners, columns):
    """The next call that fits gives what it gives in a cache that was never asked."""
    layout = shared(owners)
    memory = layout_bytes(layout, [28, 28], 4, 4) + 64
    text = draw(layout, 80, rows=2, pads=[0, 4])
    cache, twin = new_cache(layout, 2, memory_bytes=memory, kind=Face), new_cache(layout, 2)
    for one in (cache, twin):
        feed_cut(one, text.part(slice(0, 25 if columns > 1 else 28)), [9, 1])
    before = state_of(cache)
    for _ in range(2):
        with pytest.raises(CacheFull):
            feed(cache, text.part(slice(25, 25 + columns)) if columns > 1 else text.part(slice(28, 29)))
        assert state_of(cache) == before
        check_books(cache.store)
    if columns > 1:
        piece = text.part(slice(25, 26))
        assert_real_close(feed(cache, piece), feed(twin, piece), piece.real)
        assert cache.kept_positions == twin.kept_positions
    cache.store.free([1])
    face, other = face_of(cache, [0]), face_of(twin, [0])
    piece = text.part(slice(26, 34), slice(0, 1))
    assert_real_close(feed(face, piece), feed(other, piece), piece.real)


@pytest.mark.parametrize("time", ["window:14+2", "h2o:8+8", "tova:16", "h2o:8+8; 1=full"])
@pytest.mark.parametrize("columns", [1, 6])
def test_a_refused_call_under_a_policy_leaves_the_rows_as_they_were(time, columns):
    layout = shared([0, 1, 1]).with_time(time)
    memory = layout_bytes(layout, [12, 12], 4, 4) + 64
    text = draw(layout, 40, rows=2)
    cache, twin = new_cache(layout, 2, memory_bytes=memory, kind=Face), new_cache(layout, 2)
    for one in (cache, twin):
        feed_cut(one, text.part(slice(0, 12)), [5, 1])
    before = state_of(cache)
    with pytest.raises(CacheFull, match="free rows, shorten the text, or give the cache more memory_bytes"):
        feed(cache, text.part(slice(12, 12 + columns)))
    assert state_of(cache) == before
    cache.store.free([1])
    piece = text.part(slice(12, 12 + columns), slice(0, 1))
    face, other = face_of(cache, [0]), face_of(twin, [0])
    assert_real_close(feed(face, piece), feed(other, piece), None)
    assert face.kept_positions == other.kept_positions
    check_books(cache.store)


@pytest.mark.parametrize("time", ["window:6+2", "h2o:4+4", "tova:8"])
def test_a_full_budget_goes_on_for_ever_once_the_policy_is_at_its_own(time):
    layout = KVLayout.plain(2, 2, 8).with_time(time)
    cache = new_cache(layout, 2, memory_bytes=layout_bytes(layout, [1000, 1000], 4, 4))
    for columns in (50, *[1] * 30, 17, *[1] * 30):
        feed(cache, draw(layout, columns, rows=2))
    assert cache.allocated_bytes == layout_bytes(layout, [127, 127], 4, 4)
    assert cache.kept_tokens.eq(8).all() and cache.pool_bytes <= cache.store.memory_bytes


def test_more_rows_than_the_books_hold_are_refused_and_the_cache_stays_as_it_was():
    """The first call may bring other rows than were expected, but not any number of them."""
    layout = KVLayout.plain(2, 2, 8)
    cache = new_cache(layout, 1, memory_bytes=20_000)
    feed(cache, draw(layout, 3))
    cache.reset()
    before = state_of(cache)
    with pytest.raises(CacheFull, match="tables of .* rows exceed memory_bytes"):
        feed(cache, draw(layout, 1, rows=3000))
    assert state_of(cache) == before
    feed(cache, draw(layout, 3))
    twin = cache.copy()
    assert set(twin.rows).isdisjoint(cache.rows) and cache.store.num_sequences == 2
    check_books(cache.store)


def test_a_long_sequence_costs_many_short_ones_nothing():
    """Tables have a length of their own for each sequence: what was planned fits, in whatever order it comes."""
    layout = KVLayout.plain(2, 2, 8)
    seen = [400] + [4] * 60
    memory = layout_bytes(layout, seen, 4, 4)
    for order in (seen, seen[::-1]):
        cache = new_cache(layout, len(seen), memory_bytes=memory, kind=Face)
        for row, tokens in zip(cache.rows, order, strict=True):
            feed(face_of(cache, [row]), draw(layout, tokens))
        assert cache.allocated_bytes == memory and cache.store.pool_bytes <= memory
        check_books(cache.store)


def test_rows_of_very_different_length_fit_as_planned():
    layout = KVLayout.plain(2, 2, 8)
    seen = [512] + [16] * 8
    cache = new_cache(layout, 9, memory_bytes=layout_bytes(layout, seen, 4, 4))
    for row, tokens in zip(cache.rows, seen, strict=True):
        feed(face_of(cache, [row]), draw(layout, tokens))
    assert cache.allocated_bytes == layout_bytes(layout, seen, 4, 4)


def test_many_short_rows_fit_where_a_long_one_was():
    """Tables as wide as the longest row ever would hold room that its end should give back."""
    layout = KVLayout.plain(2, 2, 8)
    cache = new_cache(layout, 1, memory_bytes=layout_bytes(layout, [16] * 40, 4, 4) + 1000)
    feed(cache, draw(layout, 600))
    cache.free()
    feed(cache, draw(layout, 16, rows=40))
    assert cache.seen_tokens.tolist() == [16] * 40


@pytest.mark.parametrize("times", [("full", "window:16+0"), ("h2o:8+8", "full"), ("tova:16", "window:4+0")], ids=str)
def test_a_budget_is_shared_by_pages_of_two_kinds_as_the_plan_says(times):
    """Head dims 8 and 16 have pages of their own, and each owner its own method."""
    layout = plain_time(with_sizes(KVLayout.plain(2, 2, 8), [(2, 8), (2, 16)]), *times)
    cache = new_cache(layout, 4, memory_bytes=layout_bytes(layout, [256] * 4, 4, 4))
    feed(cache, draw(layout, 256, rows=4))
    assert cache.allocated_bytes == layout_bytes(layout, [256] * 4, 4, 4)


@pytest.mark.parametrize("rows", [3, 6])
def test_rows_beyond_those_expected_find_pages_of_both_kinds(rows):
    """`rows` is a hint that the first call may change; the bounded owner's pages must not be used up by then."""
    layout = plain_time(with_sizes(KVLayout.plain(2, 2, 8), [(2, 8), (2, 16)]), "full", "window:16+0")
    cache = new_cache(layout, 1, memory_bytes=4 * layout_bytes(layout, [100] * rows, 4, 4))
    feed(cache, draw(layout, 100, rows=rows))
    assert cache.seen_tokens.tolist() == [100] * rows


@pytest.mark.parametrize("times", [("full", "full"), ("full", "window:16+0")], ids=str)
@pytest.mark.parametrize("memory", [None, 60_000])
def test_a_cache_of_no_rows_takes_those_of_the_first_call(times, memory):
    """One whose rows are all still to come, and one whose rows have all gone."""
    layout = plain_time(with_sizes(KVLayout.plain(2, 2, 8), [(2, 8), (2, 16)]), *times)
    cache, text = new_cache(layout, 0, memory_bytes=memory), draw(layout, 20, rows=3)
    expected = feed(new_cache(layout, 3), text)
    for _ in range(2):
        assert cache.batch_size == cache.allocated_bytes == cache.full_bytes == cache.usage.total == 0
        assert cache.seen_tokens.tolist() == [] and cache.kept_tokens.shape == (2, 0, 2)
        assert cache.copy().batch_size == 0
        assert cache.pool_bytes == memory or memory is None or cache.pool_bytes < memory
        assert_real_close(feed(cache, text), expected, None)
        check_books(cache.store)
        cache.free()


def test_too_many_rows_leave_a_store_of_two_kinds_of_pages_whole():
    layout = plain_time(with_sizes(KVLayout.plain(2, 2, 8), [(2, 8), (2, 16)]), "full", "window:16+0")
    cache = new_cache(layout, 1, memory_bytes=40_000)
    for rows in (3000, 200_000):
        with pytest.raises((CacheFull, ValueError)):
            feed(cache, draw(layout, 1, rows=rows))
        assert cache.batch_size == cache.store.num_sequences == 1 and cache.pool_bytes <= 40_000
    feed(cache, draw(layout, 20))
    check_books(cache.store)


def test_a_memory_that_holds_no_page_is_refused_in_one_line():
    for memory in (0, 100, 700):
        with pytest.raises(ValueError, match="give more memory") as found:
            new_cache(KVLayout.plain(2, 2, 8), 4, memory_bytes=memory, page_slots=16)
        assert "\n" not in str(found.value) and str(memory) in str(found.value)


@pytest.mark.parametrize("time", TIMES)
def test_a_fork_that_does_not_fit_is_refused_before_anything_is_written(time):
    """Both sides would copy the pages they share: the call is refused while that does not fit."""
    layout = KVLayout.plain(1, 2, 8).with_time(time)
    memory = layout_bytes(layout, [10], 4, 4) + 120
    text = draw(layout, 12)
    cache, alone = new_cache(layout, 1, memory_bytes=memory), new_cache(layout, 1)
    for one in (cache, alone):
        feed(one, text.part(slice(0, 10)))
    twin = cache.copy()
    before, pages = state_of(cache), cache.free_pages
    with pytest.raises(CacheFull):
        for _ in range(6):
            feed(twin, draw(layout, 1))
            feed(cache, draw(layout, 1))
    check_books(cache.store)
    twin.free()
    cache.reset()
    assert cache.free_pages > pages and before[0] == 10
    feed(cache, text.part(slice(0, 10)))
    piece = text.part(slice(10, 12))
    assert_real_close(feed_cut(cache, piece, [1]), feed_cut(alone, piece, [1]), None)


def test_beams_reorder_within_a_full_budget():
    """Rows that go on from others need no page of their own until they write."""
    layout = KVLayout.plain(2, 2, 8).with_time("window:6+2")
    cache = new_cache(layout, 4, memory_bytes=layout_bytes(layout, [100] * 4, 4, 4) + 2000)
    feed(cache, draw(layout, 20, rows=4))
    for order in ([1, 0, 3, 2], [0, 0, 1, 1], [3, 2, 1, 0]):
        cache.reorder_cache(torch.tensor(order))
        check_books(cache.store)
        feed(cache, draw(layout, 1, rows=4))
        assert cache.pool_bytes <= cache.store.memory_bytes
