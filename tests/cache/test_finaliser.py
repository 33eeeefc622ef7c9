"""A cache that is dropped: its pages are free at the next look at the books, and never in the middle of an allocation."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvfold.cache.pages import BlockTables, PagePool
from kvfold.layout.kvlayout import KVLayout
from store_driver import TIMES, check_books, draw, feed, new_cache, shared

READERS = {
    "allocated_bytes": lambda cache: cache.allocated_bytes,
    "free_pages": lambda cache: cache.free_pages,
    "pool_bytes": lambda cache: cache.pool_bytes,
    "usage": lambda cache: cache.usage,
    "held_pages": lambda cache: cache.store.pools[0].held_pages,
    "num_sequences": lambda cache: cache.store.num_sequences,
    "held_bytes": lambda cache: cache.store.held_bytes(cache.rows),
    "fits": lambda cache: cache.store.fits(cache.rows, [1]),
    "a call": lambda cache: feed(cache, draw(cache.layout, 1, seed=9)),
    "a copy": lambda cache: cache.copy(),
}


def books(cache) -> tuple:
    """As they stand, without asking the store: what its arrays say."""
    pool = next(iter(cache.store._pools.values()))
    return int((pool.references > 0).sum()), int(pool.references.sum())


@pytest.mark.parametrize("reader", READERS)
def test_whoever_reads_the_books_frees_what_was_dropped(reader):
    """As if nobody else had ever been there."""
    layout = shared([0, 0, 2])
    cache, alone = new_cache(layout), new_cache(layout)
    for one in (cache, alone):
        feed(one, draw(layout, 10))
    twin = cache.copy()
    feed(twin, draw(layout, 20))
    del twin
    told = [READERS[reader](one) for one in (cache, alone)]
    assert books(cache) == books(alone)
    if isinstance(told[0], int) and reader not in ("free_pages", "pool_bytes"):  # the pool had grown
        assert told[0] == told[1]
    check_books(cache.store)


class Circle:
    """Garbage that only the collector finds."""

    def __init__(self, held):
        self.held, self.itself = held, self


@pytest.mark.parametrize("time", TIMES)
def test_the_collector_may_come_at_any_moment_of_a_call(time, monkeypatch):
    """At each step that hands out, frees or moves pages a copy dies, before it and after it."""
    layout = shared([0, 0, 2]).with_time(time)
    alone, cache = new_cache(layout), new_cache(layout)
    twins = []
    for one in (alone, cache):
        feed(one, draw(layout, 10))
    for seed in range(14):
        twins.append(cache.copy())
        feed(twins[-1], draw(layout, 3, seed=seed))

    def let_one_go() -> None:
        if twins:
            Circle(twins.pop())
            gc.collect()

    def disturbed(of, name: str) -> None:
        method = getattr(of, name)

        def between(*given, **named):
            let_one_go()
            done = method(*given, **named)
            let_one_go()
            return done

        monkeypatch.setattr(of, name, between)

    expected = [feed(alone, draw(layout, columns, seed=columns)) for columns in (1, 7, 1)]
    for of, name in ((PagePool, "allocate"), (PagePool, "free"), (PagePool, "reserve"), (BlockTables, "widen")):
        disturbed(of, name)
    found = [feed(cache, draw(layout, columns, seed=columns)) for columns in (1, 7, 1)]
    monkeypatch.undo()
    assert len(twins) < 14
    twins.clear()
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert cache.allocated_bytes == alone.allocated_bytes and books(cache) == books(alone)
    check_books(cache.store)


def test_a_cache_that_could_not_be_made_goes_without_a_word():
    with pytest.raises(ValueError, match="rows -1"):
        new_cache(KVLayout.plain(1, 2, 8), rows=-1)


AT_EXIT = """
import sys
sys.path[:0] = sys.argv[1:]
from store_driver import draw, feed, new_cache, shared

layout = shared([0, 0, 2]).with_time("h2o:4+4")
cache = new_cache(layout)
feed(cache, draw(layout, 10))
twin = cache.copy()
circle = [cache.copy()]
circle.append(circle)
del circle

class Late:
    def __init__(self):
        self.cache = cache.copy()

    def __del__(self):
        del self.cache

late = Late()
sys.late = Late()
try:
    with cache.call(None, num_rows=1, num_tokens=1, scale=1.0):
        raise KeyError
except KeyError:
    pass
print("done")
"""


def test_a_process_ends_without_a_word():
    """Names at the top of a module are cleared at the very end, when much of Python is gone."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "KVFOLD_NATIVE": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT, str(root), str(Path(__file__).parent)],
        env=environment, capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
