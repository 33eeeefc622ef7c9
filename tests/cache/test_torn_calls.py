"""A call that dies in between leaves rows that say so until they are reset, and loses no page; poison shows any read of
what was freed.
"""

import pytest
import torch

from kvfold.layout.kvlayout import KVLayout
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
    page_of,
    shared,
)


class Died(Exception):
    """What goes wrong in a layer."""


def die_after(cache, text, layers):
    """A call in which the model fails when so many layers have attended."""
    with cache.call(text.real, num_rows=text.rows, num_tokens=text.columns, scale=0.6) as view:
        for layer in range(layers):
            own = (text.k[layer], text.v[layer]) if cache.layout.is_owner(layer) else (None, None)
            view.attend(layer, text.q[layer], *own, None)
        raise Died


@pytest.mark.parametrize("time", [*TIMES, "h2o:4+4; 2=full"])
@pytest.mark.parametrize("columns", [1, 9])
@pytest.mark.parametrize("layers", [0, 2, 4])
def test_rows_of_a_call_that_died_are_unusable_until_reset(time, columns, layers):
    layout = shared([0, 0, 2, 3]).with_time(time)
    text = draw(layout, 30, rows=2)
    cache = new_cache(layout, 2)
    feed_cut(cache, text.part(slice(0, 12)), [7, 1])
    seen, fed = cache.seen_tokens.tolist(), cache.columns
    with pytest.raises(Died):
        die_after(cache, text.part(slice(12, 12 + columns)), layers)
    assert cache.seen_tokens.tolist() == seen and cache.columns == fed, "what died was not seen"
    for again in (lambda: feed(cache, text.part(slice(12, 13))), cache.copy, lambda: cache.select_rows([0, 1])):
        with pytest.raises(RuntimeError, match=r"rows \[0, 1\] were left half-written by a call that failed") as found:
            again()
        assert "reset" in str(found.value) and "\n" not in str(found.value)
    cache.reset()
    check_books(cache.store)
    assert cache.allocated_bytes == cache.store.num_sequences * cache.store._sequence_bytes
    assert cache.free_pages == sum(pool.book.capacity for pool in cache.store.pools)
    assert_real_close(feed_cut(cache, text, [7, 1]), feed_cut(new_cache(layout, 2), text, [7, 1]), None)


def test_other_rows_of_the_store_go_on():
    layout = shared([0, 0, 2]).with_time("tova:6")
    text = draw(layout, 20, rows=2)
    cache = new_cache(layout, 2, kind=Face)
    feed(cache, text.part(slice(0, 9)))
    with pytest.raises(Died):
        die_after(face_of(cache, [1]), text.part(slice(9, 10), slice(1, 2)), 2)
    rest = text.part(slice(9, 20), slice(0, 1))
    single = new_cache(layout)
    feed(single, text.part(slice(0, 9), slice(0, 1)))
    assert_real_close(feed_cut(face_of(cache, [0]), rest, [1]), feed_cut(single, rest, [1]), None)
    with pytest.raises(RuntimeError, match=r"rows \[1\]"):
        feed(cache, draw(layout, 1, rows=2))
    cache.store.free([1])
    assert cache.store.new_sequences(1) == [1]
    feed(cache, draw(layout, 1, rows=2))
    check_books(cache.store)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("columns", [1, 9])
def test_a_row_that_died_loses_no_page(time, columns):
    """Values of a wrong shape fail in the middle of storing."""
    layout = KVLayout.plain(2, 2, 8).with_time(time)
    cache = new_cache(layout)
    feed(cache, draw(layout, 12))
    text = draw(layout, columns)
    text.v[1] = text.v[1][..., :4]
    with pytest.raises((RuntimeError, IndexError, AssertionError, ValueError)):
        feed(cache, text)
    cache.reset()
    check_books(cache.store)
    assert cache.free_pages == sum(pool.book.capacity for pool in cache.store.pools)


def test_a_fork_survives_the_call_in_which_its_sibling_died():
    """What the dying call wrote went to pages of its own."""
    for time in TIMES:
        layout = KVLayout.plain(2, 2, 8).with_time(time)
        start, more = draw(layout, 10), draw(layout, 6, seed=1)
        cache = new_cache(layout)
        feed(cache, start)
        twin = cache.copy()
        with pytest.raises(Died):
            die_after(twin, draw(layout, 1, seed=2), 2)
        single = new_cache(layout)
        feed(single, start)
        assert_real_close(feed_cut(cache, more, [1]), feed_cut(single, more, [1]), None)
        twin.free()
        check_books(cache.store)


def test_a_read_of_a_freed_page_gives_nan():
    """The poison works: a table that still points at a freed page spoils the outputs of exactly that row."""
    for columns in (1, 3):
        layout = KVLayout.plain(1, 2, 8)
        cache = new_cache(layout, 2)
        feed(cache, draw(layout, 9, rows=2))
        group = cache.store.groups[0]
        page = page_of(group, 1)
        assert not cache.store.pools[0].arrays["k"][page].isnan().any()
        group.pool.free(page[None])
        assert (
            cache.store.pools[0].arrays["k"][page].isnan().all()
            and cache.store.pools[0].arrays["v"][page].isnan().all()
        )
        (out,) = feed(cache, draw(layout, columns, rows=2))
        assert not out[0].isnan().any() and out[1, :, :2].isnan().all() and not out[1, :, 2:].isnan().any()


@pytest.mark.parametrize("time", ["window:6+2", "h2o:4+4", "tova:8"])
def test_pages_left_empty_by_a_drop_are_poisoned_and_free(time):
    layout = KVLayout.plain(1, 1, 8).with_time(time)
    cache = new_cache(layout, page_slots=1)
    feed(cache, draw(layout, 8))
    pool = cache.store.pools[0]
    held = set(cache.store.groups[0].page_ids(torch.tensor([0]))[2].tolist())
    assert len(held) == 8
    feed(cache, draw(layout, 5))
    now = set(cache.store.groups[0].page_ids(torch.tensor([0]))[2].tolist())
    assert len(now) == 8
    for page in range(pool.book.capacity):
        assert pool.arrays["k"][page].isnan().all() == (page not in now)


def test_a_page_that_changes_hands_carries_nothing_over():
    """Freed by one row, taken by another that fills it halfway: what is left of the first is NaN."""
    layout = KVLayout.plain(1, 1, 8)
    cache = new_cache(layout, 2, memory_bytes=4000, kind=Face)
    first, second = (face_of(cache, [row]) for row in (0, 1))
    feed(first, draw(layout, 20))
    cache.store.free([0])
    feed(second, draw(layout, 9))
    page = page_of(cache.store.groups[0], 1, 2)
    assert (
        not cache.store.pools[0].arrays["k"][page, 0].isnan().any()
        and cache.store.pools[0].arrays["k"][page, 1:].isnan().all()
    )
    assert not feed(second, draw(layout, 1))[0].isnan().any()
