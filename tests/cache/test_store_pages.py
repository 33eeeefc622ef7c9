"""Properties of pages and bytes under rows that come, go, fork and go on: nothing lost, nothing held twice, planned
bytes are allocated bytes, and what the tensors really take is counted.
"""

import copy
import gc
import weakref
from dataclasses import astuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.cache.allocator import CacheFull, PageBook
from kvfold.cache.hf import usage_of
from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import layout_bytes
from store_driver import (
    TIMES,
    Face,
    check_books,
    draw,
    face_of,
    feed,
    feed_cut,
    new_cache,
    plain_time,
    shared,
    shared_page_bytes,
    tensor_bytes,
    with_sizes,
)  # fmt: skip

LAYOUTS = {
    "plain": lambda time: KVLayout.plain(2, 2, 8).with_time(time),
    "shared": lambda time: shared([0, 0, 2, 2]).with_time(time),
    "sliding": lambda time: KVLayout.plain(3, 2, 8, windows=(5, None, 5)).with_time(time),
    "mixed": lambda time: with_sizes(KVLayout.plain(3, 2, 8), [(2, 8), (1, 16), (4, 8)]).with_time(f"{time}; 2=full"),
}


def planned(store, rows=None):
    """The planner's word on the tokens that these rows (all that are alive) have seen."""
    alive = [row for row in range(len(store._seen)) if row not in store._free] if rows is None else rows
    return layout_bytes(store.layout, [store._seen[row] for row in alive], 4, store.page_slots)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("time", [*TIMES, "window:25%+2", "tova:25%"])
def test_planned_bytes_are_allocated_bytes_at_every_step(kind, time):
    layout = LAYOUTS[kind](time)
    cache = new_cache(layout, 3)
    text = draw(layout, 30, rows=3, pads=[0, 4, 19])
    assert cache.allocated_bytes == planned(cache.store, cache.rows)
    for start, stop in ((0, 7), (7, 8), (8, 20), *((t, t + 1) for t in range(20, 30))):
        feed(cache, text.part(slice(start, stop)))
        assert cache.allocated_bytes == planned(cache.store) <= cache.pool_bytes
        assert cache.full_bytes == layout_bytes(layout.base(), cache.seen_tokens.tolist(), 4, 4)
    cache.free()
    assert cache.allocated_bytes == 0


def test_bytes_are_counted_under_the_layout_before_conversion_too():
    layout, before = shared([0, 0, 2, 2]).with_time("tova:8"), KVLayout.plain(4, 2, 8)
    cache = new_cache(layout, 2, base_layout=before)
    feed(cache, draw(layout, 30, rows=2, pads=[0, 3]))
    assert cache.base_bytes == layout_bytes(before, [30, 27], 4, 4)
    assert cache.base_bytes > 1.9 * cache.full_bytes > 3 * cache.allocated_bytes


@st.composite
def lives(draw_from):
    """Rows that are made, fed (some, in calls of any length), forked and freed."""
    kind, time = draw_from(st.sampled_from(list(LAYOUTS))), draw_from(st.sampled_from(TIMES))
    deeds = st.sampled_from(["new", "feed", "feed", "feed", "fork", "free"])
    return LAYOUTS[kind](time), draw_from(st.lists(st.tuples(deeds, st.integers(0, 999)), min_size=4, max_size=14))


@given(lives(), st.sampled_from([2, 4, 16]))
@settings(deadline=None, max_examples=20)
def test_rows_that_come_and_go(life, page_slots):
    layout, deeds = life
    cache = new_cache(layout, 1, page_slots=page_slots, kind=Face)
    store, alive = cache.store, list(cache.rows)
    for deed, number in deeds:
        chosen = [row for place, row in enumerate(alive) if number >> place & 1] or alive[:1]
        if deed == "new":
            alive += store.new_sequences(1 + number % 3)
        elif deed == "fork" and chosen:
            alive += store.fork(chosen)
        elif deed == "free" and chosen:
            store.free(chosen)
            alive = [row for row in alive if row not in chosen]
        elif chosen:
            feed(face_of(cache, chosen), draw(layout, 1 + number % 11, rows=len(chosen), seed=number))
        check_books(store)
        assert sorted(alive + store._free) == list(range(len(store._seen))), "a row is lost or stands twice"
        assert store.allocated_bytes == planned(store) - shared_page_bytes(store) == usage_of(store).total
        assert min(astuple(usage_of(store))) >= 0
        assert max(store.allocated_bytes, tensor_bytes(store)) <= store.pool_bytes
    store.free(alive)
    check_books(store)
    assert store.allocated_bytes == 0 and store.free_pages == sum(pool.book.capacity for pool in store.pools)


def test_books_of_empty_rows_count_too():
    """Rows that hold nothing yet have places in the tables."""
    layout = KVLayout.plain(2, 2, 8)
    memory = layout_bytes(layout, [1] * 3, 4, 4) + 400
    store = new_cache(layout, 1, memory_bytes=memory, kind=Face).store
    before = store.new_sequences(8)
    with pytest.raises(CacheFull):
        store.fork(before)
    assert tensor_bytes(store) <= memory


@given(lives(), st.integers(1, 40))
@settings(deadline=None, max_examples=20)
def test_a_budget_is_never_exceeded(life, tokens):
    """Whatever is asked for, what the store has reserved stays within its memory, refused calls included."""
    layout, deeds = life
    memory = layout_bytes(layout, [tokens] * 3, 4, 4) + 400
    cache = new_cache(layout, 1, memory_bytes=memory, kind=Face)
    store, alive = cache.store, list(cache.rows)
    for deed, number in deeds:
        chosen = [row for place, row in enumerate(alive) if number >> place & 1] or alive[:1]
        try:
            if deed == "new":
                alive += store.new_sequences(1 + number % 3)
            elif deed == "fork" and chosen:
                alive += store.fork(chosen)
            elif deed == "free" and chosen:
                store.free(chosen)
                alive = [row for row in alive if row not in chosen]
            elif chosen:
                feed(face_of(cache, chosen), draw(layout, 1 + number % 11, rows=len(chosen), seed=number))
        except CacheFull:
            pass
        check_books(store)
        assert sorted(alive + store._free) == list(range(len(store._seen))), "a row is lost or stands twice"
        assert tensor_bytes(store) <= store.pool_bytes <= memory


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("memory", [None, 200_000])
def test_the_tensors_that_a_cache_holds_are_counted(kind, memory):
    layout = LAYOUTS[kind]("h2o:4+4")
    cache = new_cache(layout, 5, memory_bytes=memory)
    cache.select_rows([0, 1])
    for columns in (30, 1, 1, 9):
        feed(cache, draw(layout, columns, rows=2))
        assert 0 < tensor_bytes(cache) <= cache.pool_bytes <= (memory or cache.pool_bytes)
    twin = cache.copy()
    feed(twin, draw(layout, 1, rows=2))
    cache.select_rows([1, 1, 0])
    assert tensor_bytes(cache) <= cache.pool_bytes <= (memory or cache.pool_bytes)


def test_no_call_leaves_a_tensor_behind():
    """Buffers of a call (weights, gathered keys, the new token that waits) go with it."""
    layout = shared([0, 0, 2]).with_time("h2o:4+4; 2=tova:6")
    cache = new_cache(layout, 2)
    feed(cache, draw(layout, 50, rows=2))
    before = tensor_bytes(cache)
    for seed in range(3):
        feed(cache, draw(layout, 1, rows=2, seed=seed))
    assert tensor_bytes(cache) == before


def test_a_cache_that_nobody_holds_is_gone_at_once():
    """Not when the cycle collector comes by: a loop that makes a cache a text would pile up whole pools."""
    gc.collect()
    gc.disable()
    try:
        layout = KVLayout.plain(2, 2, 8)
        cache = new_cache(layout)
        feed(cache, draw(layout, 9))
        store = weakref.ref(cache.store)
        del cache
        assert store() is None
    finally:
        gc.enable()


def test_memory_is_real():
    """Under full a second text does not fit beside the first, under a window it does; when the first goes, it fits."""
    texts = draw(KVLayout.plain(1, 2, 8), 40, rows=2)
    room = layout_bytes(KVLayout.plain(1, 2, 8), [60], 4, 4) + 200
    for time in ("full", "window:6+2", "h2o:4+4", "tova:8"):
        layout = KVLayout.plain(1, 2, 8).with_time(time)
        cache = new_cache(layout, 2, memory_bytes=room, kind=Face)
        first, second = (face_of(cache, [row]) for row in cache.rows)
        feed(first, texts.part(rows=slice(0, 1)))
        free = cache.free_pages
        if time == "full":
            with pytest.raises(CacheFull):
                feed(second, texts.part(rows=slice(1, 2)))
            assert cache.free_pages == free
            cache.store.free([0])
            assert cache.free_pages == free + 2 * 10
        feed(second, texts.part(rows=slice(1, 2)))


def test_free_pages_rise_when_a_call_drops():
    for time in ("window:3+1", "h2o:2+2", "tova:4"):
        layout = KVLayout.plain(1, 2, 8).with_time(time)
        cache = new_cache(layout, page_slots=1)
        held = []
        for _ in range(12):
            feed(cache, draw(layout, 1))
            held.append(cache.store.pools[0].held_pages)
        assert held == [2, 4, 6, *[8] * 9]


@pytest.mark.parametrize("time", TIMES)
def test_a_cut_prompt_holds_no_more_than_its_budget_between_calls(time):
    layout = KVLayout.plain(2, 2, 8).with_time(time)
    cache = new_cache(layout, 2)
    feed_cut(cache, draw(layout, 60, rows=2, pads=[0, 30]), [7, 1, 20, 1])
    most = layout.time_of(0).max_kept
    assert cache.kept_tokens.tolist() == [[[most(60)] * 2, [most(30)] * 2]] * 2


def test_pools_grow_without_losing_anything():
    layout = with_sizes(plain_time(KVLayout.plain(2, 2, 8), "full", "h2o:8+8"), [(2, 8), (2, 16)])
    text = draw(layout, 300, rows=2)
    small, large = new_cache(layout, 2, page_slots=2), new_cache(layout, 2, page_slots=2, memory_bytes=4_000_000)
    outs = [feed_cut(cache, text, [40, 1, 100, 1, 1, 60]) for cache in (small, large)]
    assert small.pool_bytes < large.pool_bytes <= 4_000_000
    for ours, theirs in zip(*outs, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_page_book():
    asked = []
    book = PageBook(capacity=8, free=8, limit=10, count_free=lambda: asked.append(1) or 7)
    book.allocated(3)
    assert book.free == 5
    assert book.grown_capacity(5) == 8 and book.grown_capacity(6) == 10
    with pytest.raises(CacheFull, match="needs 8 more pages and 5 of 8 are free"):
        book.grown_capacity(8)
    book.freed(3)
    assert book.free == 8 and not asked
    with pytest.raises(AssertionError):
        book.freed(1)
    book.free = 2
    with pytest.raises(AssertionError):
        book.allocated(3)
    book.freed(None)
    assert book.grown_capacity(2) == 8 and not asked, "the host's bound is enough"
    assert book.grown_capacity(6) == 8 and asked == [1] and book.exact_free() == 7 and asked == [1]


def test_a_deep_copy_is_a_cache_of_its_own():
    layout = shared([0, 0]).with_time("h2o:4+4")
    text = draw(layout, 30)
    cache = new_cache(layout)
    feed(cache, text.part(slice(0, 20)))
    twin = copy.deepcopy(cache)
    ours = feed_cut(cache, text.part(slice(20, 30)), [1])
    theirs = feed_cut(twin, text.part(slice(20, 30)), [1])
    assert twin.store is not cache.store and torch.equal(ours[1], theirs[1])
    assert twin.layers[0].get_seq_length() == twin.columns == 30
