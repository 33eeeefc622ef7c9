"""A cache may be made inside `torch.inference_mode()` and go on, or go away, outside it."""

import pytest
import torch

from kvfold.cache.hf import FoldCache
from kvfold.layout.kvlayout import KVLayout
from store_driver import draw, feed


@pytest.mark.parametrize("time", ["full", "window:6+2", "h2o:4+4", "tova:8"])
def test_a_cache_made_in_inference_mode_lives_on_outside(time):
    layout = KVLayout.plain(2, 2, 8).with_time(time)
    with torch.inference_mode():
        cache = FoldCache(layout, dtype=torch.float32, rows=1, page_slots=4)
        feed(cache, draw(layout, 30))
    feed(cache, draw(layout, 3))
    twin = cache.copy()
    feed(twin, draw(layout, 2))
    twin.free()
    cache.free()
    assert cache.free_pages == cache.store.pools[0].book.capacity
