"""Rows that are forked, picked, repeated and reset: each goes on as if it were alone, and shares pages until it writes."""

import pytest
import torch

from kvfold.layout.kvlayout import KVLayout
from store_driver import (
    TIMES,
    Draw,
    assert_real_close,
    check_books,
    draw,
    face_of,
    feed,
    feed_cut,
    new_cache,
    shared,
)  # fmt: skip

ALL = [*TIMES, "window:25%+2", "h2o:25%+25%", "h2o:4+4; 2=full", "full; 0=tova:5"]
LAYOUT = shared([0, 0, 2])


def joined(*texts):
    """Several texts of as many rows, one after the other."""
    return Draw(*([torch.cat(parts, dim=1) for parts in zip(*group, strict=True)]
                  for group in zip(*((text.q, text.k, text.v) for text in texts), strict=True)))  # fmt: skip


def alone(layout, cuts, *texts):
    """What one row gives for the last of these texts when it has read the others before, by itself."""
    cache = new_cache(layout)
    for text in texts[:-1]:
        feed_cut(cache, text, cuts)
    return feed_cut(cache, texts[-1], [1]), cache.kept_positions


@pytest.mark.parametrize("time", ALL)
@pytest.mark.parametrize("columns", [10, 12])
def test_a_copy_goes_its_own_way(time, columns):
    """Both sides write what the other must not see; 12 tokens fill whole pages, 10 leave one open."""
    layout = LAYOUT.with_time(time)
    start, left, right = (draw(layout, size, seed=seed) for seed, size in enumerate((columns, 9, 9)))
    cache = new_cache(layout)
    feed(cache, start)
    twin = cache.copy()
    check_books(cache.store)
    assert twin.rows != cache.rows and twin.kept_positions == cache.kept_positions
    outs = {id(one): [] for one in (cache, twin)}
    for t in range(9):
        for one, text in ((twin, right), (cache, left)):
            outs[id(one)].append(feed(one, text.part(slice(t, t + 1))))
            check_books(cache.store)
    for one, text in ((cache, left), (twin, right)):
        expected, positions = alone(layout, [columns], start, text)
        assert_real_close([torch.cat(layer, dim=1) for layer in zip(*outs[id(one)], strict=True)], expected, None)
        assert one.kept_positions == positions
    twin.free()
    assert_real_close(feed(cache, right), alone_call(layout, columns, start, left, right), None)


def alone_call(layout, columns, start, left, last):
    """The last text read in one call by a row of its own."""
    cache = new_cache(layout)
    feed_cut(cache, start, [columns])
    feed_cut(cache, left, [1])
    return feed(cache, last)


@pytest.mark.parametrize("time", ALL)
def test_a_copy_is_continued_in_long_calls_too(time):
    layout = LAYOUT.with_time(time)
    start, left, right = (draw(layout, size, seed=seed) for seed, size in enumerate((10, 7, 9)))
    cache = new_cache(layout)
    feed(cache, start)
    twin = cache.copy()
    for one, text in ((twin, right), (cache, left)):
        single = new_cache(layout)
        feed(single, start)
        assert_real_close(feed(one, text), feed(single, text), None)
        assert one.kept_positions == single.kept_positions
        check_books(cache.store)


def test_nothing_is_copied_before_it_is_written():
    layout = KVLayout.plain(2, 2, 8)
    for columns in (12, 10):
        cache = new_cache(layout)
        feed(cache, draw(layout, columns))
        pages = cache.store.pools[0].held_pages
        twins = [cache.copy() for _ in range(5)]
        assert cache.store.pools[0].held_pages == pages == 4 * 3
        feed(twins[0], draw(layout, 1))
        assert cache.store.pools[0].held_pages == pages + 4, "one page a lane: the open one's copy, or a new one"
        for twin in twins:
            twin.free()
        assert cache.store.pools[0].held_pages == pages


def test_a_copy_that_is_let_go_gives_its_pages_back():
    layout = KVLayout.plain(2, 2, 8)
    cache = new_cache(layout)
    feed(cache, draw(layout, 10))
    free = cache.free_pages
    twin = cache.copy()
    feed(twin, draw(layout, 20))
    assert cache.free_pages < free
    del twin
    assert cache.free_pages == free and cache.store.num_sequences == 1
    check_books(cache.store)


def test_the_store_lives_as_long_as_any_copy():
    layout = KVLayout.plain(1, 2, 8)
    start, more = draw(layout, 10), draw(layout, 5, seed=1)
    cache = new_cache(layout)
    feed(cache, start)
    twin = cache.copy()
    del cache
    assert_real_close(feed_cut(twin, more, [1]), alone(layout, [10], start, more)[0], None)
    check_books(twin.store)


@pytest.mark.parametrize("time", ALL)
def test_beams(time):
    """Rows of every step are picked from those of the last: each must go on from the history that was picked."""
    layout = LAYOUT.with_time(time)
    texts = draw(layout, 16, rows=3, seed=5)
    cache, histories = new_cache(layout, 3), [[row] for row in range(3)]
    feed(cache, texts.part(slice(0, 7)))
    read = [texts.part(slice(0, 7), slice(row, row + 1)) for row in range(3)]
    g = torch.Generator().manual_seed(3)
    for step in range(7, 16):
        order = torch.randint(3, (3,), generator=g)
        cache.reorder_cache(order)
        check_books(cache.store)
        read = [joined(read[row], texts.part(slice(step, step + 1), slice(beam, beam + 1)))
                for beam, row in enumerate(order.tolist())]  # fmt: skip
        ours = feed(cache, texts.part(slice(step, step + 1)))
        check_books(cache.store)
        histories = [[*histories[row], step] for row in order.tolist()]
    for beam in range(3):
        single = new_cache(layout)
        theirs = feed_cut(single, read[beam], [7, 1])
        assert [owner[beam] for owner in cache.kept_positions] == [owner[0] for owner in single.kept_positions]
        assert_real_close([out[beam : beam + 1] for out in ours], [out[:, -1:] for out in theirs], None)
    assert cache.store.num_sequences == 3


@pytest.mark.parametrize("time", ALL)
def test_rows_are_repeated_and_selected(time):
    layout = LAYOUT.with_time(time)
    texts, more = draw(layout, 9, rows=2, pads=[0, 3]), draw(layout, 6, rows=6, seed=1)
    cache = new_cache(layout, 2)
    feed(cache, texts)
    cache.batch_repeat_interleave(3)
    assert cache.batch_size == 6 and cache.seen_tokens.tolist() == [9, 9, 9, 6, 6, 6]
    outs = feed_cut(cache, more, [1, 4, 1])
    cache.batch_select_indices(torch.tensor([4, 0]))
    assert cache.seen_tokens.tolist() == [12, 15] and cache.store.num_sequences == 2
    for place, row in enumerate([4, 0]):
        single = new_cache(layout)
        feed(single, texts.part(rows=slice(row // 3, row // 3 + 1)))
        theirs = feed_cut(single, more.part(rows=slice(row, row + 1)), [1, 4, 1])
        assert_real_close([out[row : row + 1] for out in outs], theirs, None)
        assert [owner[place] for owner in cache.kept_positions] == [owner[0] for owner in single.kept_positions]
    cache.batch_select_indices(torch.tensor([False, True]))
    assert cache.seen_tokens.tolist() == [15]
    check_books(cache.store)


def test_rows_can_be_had_before_anything_was_fed():
    layout = KVLayout.plain(2, 2, 8).with_time("h2o:4+4")
    text = draw(layout, 9, rows=4)
    expected = feed(new_cache(layout, 4), text)
    for rows in (1, 4, 7):
        for deed in (lambda c: None, lambda c: c.reset(), lambda c: c.free(), lambda c: c.batch_repeat_interleave(2)):
            cache = new_cache(layout, rows)
            assert cache.kept_tokens.sum() == 0 and cache.columns == 0
            deed(cache)
            assert_real_close(feed(cache, text), expected, None)
            assert cache.batch_size == cache.store.num_sequences == 4
            check_books(cache.store)


def test_reset_forgets_all_and_frees_all():
    layout = LAYOUT.with_time("tova:6")
    text = draw(layout, 20, rows=2)
    cache = new_cache(layout, 2)
    first = feed_cut(cache, text, [7, 1])
    cache.reset()
    assert cache.columns == 0 and cache.seen_tokens.tolist() == [0, 0] and cache.get_seq_length() == 0
    assert cache.free_pages == sum(pool.book.capacity for pool in cache.store.pools)
    assert_real_close(feed_cut(cache, text, [7, 1]), first, None)
    cache.reset()
    feed(cache, draw(layout, 3, rows=5))
    assert cache.batch_size == 5 == cache.store.num_sequences


@pytest.mark.parametrize("rows", [1, 3])
def test_a_wrong_number_of_rows_is_refused_in_one_line(rows):
    layout = KVLayout.plain(1, 2, 8)
    cache = new_cache(layout, 2)
    feed(cache, draw(layout, 5, rows=2))
    with pytest.raises(ValueError, match=f"holds 2 rows, the call brings {rows}") as found:
        feed(cache, draw(layout, 1, rows=rows))
    assert "\n" not in str(found.value)
    feed(cache, draw(layout, 1, rows=2))
    assert cache.seen_tokens.tolist() == [6, 6]


@pytest.mark.parametrize("time", ["full", "tova:4"])
def test_crop_is_refused_in_one_line(time):
    layout = KVLayout.plain(1, 2, 8).with_time(time)
    cache = new_cache(layout)
    feed(cache, draw(layout, 5))
    with pytest.raises(ValueError, match="can't be cut back") as found:
        cache.crop(-1)
    assert "\n" not in str(found.value) and "copy()" in str(found.value)
    assert cache.seen_tokens.tolist() == [5] and not cache.is_croppable and not cache.is_compileable


def test_a_model_of_another_library_is_refused_in_one_line():
    cache = new_cache(KVLayout.plain(2, 2, 8))
    with pytest.raises(ValueError, match="kvfold model only") as found:
        cache.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)
    assert "\n" not in str(found.value)


def test_an_empty_call_is_refused_in_one_line():
    layout = KVLayout.plain(1, 2, 8)
    cache = new_cache(layout)
    feed(cache, draw(layout, 5))
    with pytest.raises(ValueError) as found:
        feed(cache, draw(layout, 0))
    assert "\n" not in str(found.value)
    feed(cache, draw(layout, 1))
    assert cache.seen_tokens.tolist() == [6]


def test_rows_may_go_while_others_are_in_a_call():
    """A copy that is collected in the middle of a forward call must not pull the tables from under it."""
    layout = LAYOUT.with_time("full; 2=h2o:8+8")
    text = draw(layout, 40)
    cache, expected = new_cache(layout), feed(new_cache(layout), text)
    twin = cache.copy()
    with cache.call(None, num_rows=1, num_tokens=40, scale=0.6) as view:
        twin.free()
        outs = [view.attend(layer, text.q[layer], *((text.k[layer], text.v[layer]) if layer != 1 else (None, None)), None)
                for layer in range(3)]  # fmt: skip
    assert_real_close(outs, expected, None)
    check_books(cache.store)


def test_faces_of_transformers():
    """What `generate` asks of a cache: columns fed, pads included, and one entry a decoder layer."""
    layout = shared([0, 0, 2])
    cache = new_cache(layout, 2)
    feed(cache, draw(layout, 6, rows=2, pads=[0, 4]))
    assert len(cache) == len(cache.layers) == 3 and cache.is_initialized
    assert cache.get_seq_length() == cache.get_seq_length(2) == 6 == cache.layers[1].get_seq_length()
    assert cache.get_mask_sizes(4, 0) == (10, 0) == cache.layers[0].get_mask_sizes(4)
    assert cache.seen_tokens.tolist() == [6, 2]


def test_a_face_over_some_rows_sees_those_alone():
    layout = LAYOUT.with_time("h2o:4+4")
    cache = new_cache(layout, 3)
    feed(cache, draw(layout, 9, rows=3, pads=[0, 2, 5]))
    face = face_of(cache, [cache.rows[2], cache.rows[0]])
    assert face.seen_tokens.tolist() == [4, 9] and face.batch_size == 2
    assert face.kept_tokens.tolist() == cache.kept_tokens[:, [2, 0]].tolist()
