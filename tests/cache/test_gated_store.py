"""Memory under learned gates: what was merged or dropped is handed out again, a budget is never exceeded, calls are cut so
that they fit, and what is allocated is what the planner's terms give. The gates here say what the test wants.
"""

import pytest
import torch

from kvfold.cache.allocator import CacheFull
from kvfold.cache.hf import FoldCache
from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import (
    LENGTH_BYTES,
    PAGE_OVERHEAD_BYTES,
    SEQUENCE_BYTES,
    layout_bytes,
    page_bytes,
    page_class,
    page_classes,
    plan,
)
from kvfold.ops.gating import STAY_NEVER, Gates

HEADS, DIM, SLOTS = 2, 8, 4


def layout(time: str) -> KVLayout:
    return KVLayout.plain(2, HEADS, DIM).with_time(time)


def cache_of(time: str, rows: int = 1, **options) -> FoldCache:
    return FoldCache(layout(time), dtype=torch.float32, rows=rows, page_slots=SLOTS, poison=True, **options)


def gates(alpha_BT: torch.Tensor) -> Gates:
    alpha = alpha_BT.float()[..., None].expand(*alpha_BT.shape, HEADS)
    return Gates(alpha_BTK=alpha, log_stay_BTK=alpha * STAY_NEVER, weight_BTK=torch.ones_like(alpha))


def feed(cache: FoldCache, alpha_BT: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """One call with these decisions in both layers, cut as the cache asks; the last layer's output [B, T, H, D]."""
    rows, tokens = alpha_BT.shape
    source, outs = torch.Generator().manual_seed(seed), []
    q, k, v = (torch.randn((rows, tokens, HEADS, DIM), generator=source) for _ in range(3))
    for start, end in cache.pieces(None, num_rows=rows, num_tokens=tokens):
        part = slice(start, end)
        with cache.call(None, num_rows=rows, num_tokens=end - start, scale=0.3) as view:
            for layer in range(2):
                out = view.attend(layer, q[:, part], k[:, part], v[:, part], None, gates(alpha_BT[:, part]))
        outs.append(out)
    return torch.cat(outs, dim=1)


def every_fourth_stays(rows: int, tokens: int) -> torch.Tensor:
    return (torch.arange(tokens) % 4 != 0).expand(rows, tokens)


def reserved_for(time: str, rows: int, tokens: int) -> int:
    """Bytes in which so many rows fit with nothing merged or dropped."""
    return layout_bytes(layout(time), [tokens] * rows, 4, SLOTS)


@pytest.mark.parametrize(("time", "kept", "rows"), [("dmc:3", 32, 4), ("dmc:inf", 32, 4), ("dms:4", 36, 3)])
def test_a_pool_for_one_plain_row_holds_several_compressed_ones(time, kept, rows):
    tokens, lanes = 128, 2 * HEADS
    a_row = SEQUENCE_BYTES + lanes * (LENGTH_BYTES + layout(time).time_of(0).stream_state_bytes(DIM))
    # A page more for each lane: before a gate has spoken its token may need one.
    cache = cache_of(time, rows=4, memory_bytes=reserved_for(time, 1, tokens + SLOTS) + 3 * a_row)
    shut = torch.zeros((1, tokens), dtype=torch.bool)
    feed(cache, shut)
    assert (cache.kept_tokens == tokens).all()
    with pytest.raises(CacheFull):
        for _ in range(2 * SLOTS):
            feed(cache, shut[:, :1])
    cache.reset()
    held = [cache, *(cache.copy() for _ in range(rows - 1))]
    for seed, one in enumerate(held):
        for start in range(0, tokens, 8):
            feed(one, every_fourth_stays(1, tokens)[:, start : start + 8], seed=seed)
        assert one.kept_tokens.max() <= kept and one.seen_tokens.tolist() == [tokens]


@pytest.mark.parametrize("time", ["dmc:12", "dms:128"])
def test_a_pool_for_one_plain_row_of_4k_tokens_holds_the_compressed_rows_that_the_planner_says(time):
    tokens, slots = 4096, 16
    config = {
        "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "hidden_size": HEADS * DIM, "head_dim": DIM, "max_position_embeddings": 2 * tokens, "dtype": "float32",
    }  # fmt: skip
    memory = plan(config).bytes([tokens])
    folded = plan(config, time=time, compression=4)
    rows = folded.max_rows(memory, tokens)
    assert rows == 3  # four, less their rings
    cache = FoldCache(layout(time), dtype=torch.float32, rows=rows, memory_bytes=memory, page_slots=slots, poison=True)
    step, stays = 32, torch.arange(tokens) % 4 == 0
    if time == "dms:128":
        # Of the newest 129 all are there, so fewer of the others may stay.
        wanted = tokens // 4 - 129
        stays = torch.arange(tokens) * wanted // (tokens - 129) != (torch.arange(tokens) - 1) * wanted // (tokens - 129)
    for start in range(0, tokens, step):
        feed(cache, ~stays[start : start + step].expand(rows, step), seed=start)
    assert (cache.seen_tokens == tokens).all()
    reached = tokens / cache.kept_tokens.float().mean()
    assert abs(reached / 4 - 1) < 0.01
    assert abs(cache.allocated_bytes / folded.bytes([tokens] * rows) - 1) < 0.02


@pytest.mark.parametrize("time", ["dmc:3", "dms:4", "fold:4+4@0.5"])
def test_a_call_that_may_not_fit_is_cut_and_stops_at_a_token_border(time):
    cache = cache_of(time, memory_bytes=reserved_for(time, 1, 24))
    outs = feed(cache, every_fourth_stays(1, 60))
    assert outs.shape[1] == 60 and cache.seen_tokens.tolist() == [60]
    whole = cache_of(time)
    torch.testing.assert_close(outs, feed(whole, every_fourth_stays(1, 60)))
    assert whole.kept_positions == cache.kept_positions
    before = cache.seen_tokens.clone()
    with pytest.raises(CacheFull):
        feed(cache, torch.zeros((1, 60), dtype=torch.bool), seed=1)
    assert cache.seen_tokens > before
    kept = cache.kept_tokens.clone()
    with pytest.raises(CacheFull):
        feed(cache, torch.zeros((1, 1), dtype=torch.bool))
    assert torch.equal(kept, cache.kept_tokens)
    cache.reset()
    assert torch.equal(feed(cache, every_fourth_stays(1, 60)), outs)


@pytest.mark.parametrize(("time", "waiting"), [("dmc:3", 0), ("dmc:inf", 0), ("dms:4", 3), ("fold:4+4@0.5", 4)])
def test_allocated_bytes_are_pages_of_what_is_kept_and_the_rings(time, waiting):
    cache = cache_of(time, rows=2)
    feed(cache, every_fourth_stays(2, 50))
    feed(cache, every_fourth_stays(2, 1))
    spec = cache.layout.time_of(0)
    one = page_class(cache.layout, 0)
    page = page_bytes(one, SLOTS, model_bytes=4, slot_state_bytes=page_classes(cache.layout)[one])
    pages = sum(-(-int(kept) // SLOTS) for kept in cache.kept_tokens.flatten())
    lanes = 2 * 2 * HEADS
    assert cache.allocated_bytes == pages * page + 2 * SEQUENCE_BYTES + lanes * (
        LENGTH_BYTES + spec.stream_state_bytes(DIM)
    )
    assert (
        cache.allocated_bytes
        < layout_bytes(cache.layout, [51, 51], 4, SLOTS)
        == cache.store.bytes_under(cache.layout, cache.rows)
    )
    usage, entry = cache.usage, (page - PAGE_OVERHEAD_BYTES) // SLOTS
    assert usage.entries + usage.waiting == entry * int(cache.kept_tokens.sum())
    # Of the tokens 46 to 50, in the window of the newest one, 48 and 50 stay; on a grid 45 still waits for the border at 52.
    assert usage.waiting == waiting * entry * lanes
    assert usage.rounding == entry * (SLOTS * pages - int(cache.kept_tokens.sum())) > 0
    assert usage.rings == lanes * spec.stream_state_bytes(DIM)
    assert usage.total == cache.allocated_bytes
    cache.free()
    assert cache.allocated_bytes == 0


@pytest.mark.parametrize("time", ["dmc:3", "dmc:inf", "dms:4", "fold:1+2@0.5"])
def test_copies_go_their_own_ways(time):
    cache, alone = cache_of(time), cache_of(time)
    for one in (cache, alone):
        feed(one, every_fourth_stays(1, 23))
    twin = cache.copy()
    for step in range(7):
        apart = feed(twin, torch.zeros((1, 1), dtype=torch.bool), seed=50 + step)
        assert torch.equal(feed(cache, every_fourth_stays(1, 9)[:, step : step + 1], seed=step),
                           feed(alone, every_fourth_stays(1, 9)[:, step : step + 1], seed=step))  # fmt: skip
        assert not apart.isnan().any()
    assert cache.kept_positions == alone.kept_positions != twin.kept_positions


@pytest.mark.parametrize(("tokens", "most"), [(1, 1), (3, 3)])
def test_a_fork_copies_only_the_pages_that_it_writes(tokens, most):
    """One token a stream writes one page; a chunk moves what lies behind the first entry that leaves, here in the window."""
    cache, lanes = cache_of("dms:4"), 2 * HEADS
    feed(cache, every_fourth_stays(1, 95))
    held = cache.store.pools[0].held_pages
    assert held >= 6 * lanes
    twin = cache.copy()
    assert cache.store.pools[0].held_pages == held
    feed(twin, torch.ones((1, tokens), dtype=torch.bool), seed=1)
    assert 0 < cache.store.pools[0].held_pages - held <= most * lanes
    twin.free()
    assert cache.store.pools[0].held_pages == held


def test_gates_that_are_off_keep_everything():
    for time in ("dmc:3", "dms:4", "fold:4+4@0.5"):
        cache = cache_of(time)
        q, k, v = (torch.randn((1, 20, HEADS, DIM)) for _ in range(3))
        for start, end in ((0, 9), (9, 10), (10, 20)):
            with cache.call(None, num_rows=1, num_tokens=end - start, scale=0.3) as view:
                for layer in range(2):
                    view.attend(layer, *(x[:, start:end] for x in (q, k, v)), None, None)
        assert (cache.kept_tokens == 20).all()


@pytest.mark.parametrize("time", ["dmc:3", "dms:4"])
def test_axes_multiply(time):
    """Half the layers, half the heads, a quarter of the tokens: a sixteenth of the entries, and of the pages but for those
    that DMS's window fills in each lane.
    """
    tokens = 8 * SLOTS
    plain = KVLayout.plain(4, 4, DIM)
    folded = KVLayout.parse("cla2", plain).with_heads(2).with_time(time)
    pages, entries = [], []
    for one in (plain, folded):
        cache = FoldCache(one, dtype=torch.float32, rows=1, page_slots=SLOTS, poison=True)
        heads = one.layers[0].num_kv_heads
        q, k, v = (torch.randn((1, tokens, number, DIM)) for number in (4, heads, heads))
        alpha = every_fourth_stays(1, tokens).float()[..., None].expand(1, tokens, heads)
        told = Gates(alpha_BTK=alpha, log_stay_BTK=alpha * STAY_NEVER, weight_BTK=torch.ones_like(alpha))
        with cache.call(None, num_rows=1, num_tokens=tokens, scale=0.3) as view:
            for layer in range(4):
                own = one.is_owner(layer)
                said = told if one is folded and own else None
                view.attend(layer, q, k if own else None, v if own else None, None, said)
        pages.append(sum(pool.held_pages for pool in cache.store.pools))
        entries.append(cache.usage.entries)
    waiting = cache.usage.waiting // (SLOTS * cache.store.groups[0].pool.slot_bytes)
    assert entries[0] == 16 * entries[1] and pages[0] == 16 * (pages[1] - waiting)
    assert waiting == (0 if time.startswith("dmc") else 4)
