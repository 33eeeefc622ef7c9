"""Driving a small model through caches whose unwritten pages are NaN: three texts, padded at the left, under any method."""

import torch
from transformers import PreTrainedModel

from kvfold.cache.hf import FoldCache
from kvfold.models.decoder import FoldForCausalLM

TIMES = ["full", "window:6+2", "h2o:4+4", "tova:8"]
"""One setting of each method, small enough to drop a lot."""
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
PADS = [0, 3, 6]
TEXTS = torch.randint(3, 97, (3, 10), generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(10) >= torch.tensor(PADS)[:, None]).long()
"""PADS columns of padding at the left of the three texts."""

Both = tuple[FoldForCausalLM, PreTrainedModel]
"""Ours and theirs, with the same weights."""


def fold(model: FoldForCausalLM, time: str) -> FoldForCausalLM:
    """The model under this method."""
    model.config.layout = model.config.layout.with_time(time)
    return model


def poisoned(model: FoldForCausalLM, rows: int, **options) -> FoldCache:
    """A cache of small pages that are NaN wherever nothing was written, or was freed."""
    return FoldCache(model.config.layout, dtype=torch.float32, rows=rows, page_slots=4, poison=True, **options)


@torch.no_grad()
def step(model: FoldForCausalLM, cache: FoldCache, *tokens: int) -> torch.Tensor:
    """Logits [T, V] after one call of these tokens for a cache of one row."""
    return model(torch.tensor([tokens]), past_key_values=cache).logits[0]


def kept_by(cache: FoldCache, row: int) -> list:
    """Positions that one row holds: [owner][kv head]."""
    return [owner[row] for owner in cache.kept_positions]


def assert_all_returned(cache: FoldCache) -> None:
    """Freed, the cache leaves no row and no page behind."""
    cache.free()
    assert cache.store.num_sequences == 0 and cache.allocated_bytes == 0
    assert cache.free_pages == sum(pool.book.capacity for pool in cache.store.pools)
