"""The cache as its users and transformers see it, driven by a real model: counts, bytes, rows, and what is refused."""

import copy

import pytest
import torch

import kvfold
from kvfold.cache.hf import FoldCache
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM
from model_driver import CLOSE, fold

TIMES = ["full", "window:6+2", "h2o:4+4", "tova:8", "window:25%+2", "h2o:25%+25%", "tova:25%"]
PADS = [0, 5, 17]


@pytest.fixture(scope="module")
def models(pair):
    return {family: pair(family, **settings)[0] for family, settings in (
        ("llama", {"num_hidden_layers": 2}),
        ("mistral", {"num_hidden_layers": 2, "sliding_window": 6}),
        ("qwen2", {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    )}  # fmt: skip


@pytest.fixture
def model(models):
    return fold(models["llama"], "full")


@pytest.fixture
def texts() -> torch.Tensor:
    """Three texts of 20 columns; PADS of them are padding."""
    return torch.randint(3, 97, (3, 20), generator=torch.Generator().manual_seed(2))


MASK = (torch.arange(20) >= torch.tensor(PADS)[:, None]).long()


@torch.no_grad()
def feed(model, cache, texts, mask=None):
    """Logits [B, T, V] of one more call."""
    return model(texts, attention_mask=mask, past_key_values=cache).logits


def ragged(model, texts, page_slots=16) -> FoldCache:
    """Three rows of 20, 15 and 3 tokens, read in two long calls and a short one."""
    cache = model.new_cache(rows=3, page_slots=page_slots)
    for start, stop in ((0, 11), (11, 19), (19, 20)):
        feed(model, cache, texts[:, start:stop], MASK[:, :stop])
    return cache


def pages_in_all(cache):
    return sum(pool.book.capacity for pool in cache.store.pools)


# -- counts and bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_slots", [16, 3])
@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_planned_bytes_are_allocated_bytes(models, family, time, page_slots, texts):
    """After every call, with rows of different lengths, rows that go and rows that come."""
    model = fold(models[family], time)
    planned = kvfold.plan(model, page_slots=page_slots)
    assert planned.layout == model.config.layout == kvfold.plan(model, time=time).layout
    cache = model.new_cache(rows=3, page_slots=page_slots)

    def assert_as_planned():
        seen = cache.seen_tokens.tolist()
        assert cache.allocated_bytes == planned.bytes(seen) <= cache.pool_bytes
        assert (
            cache.full_bytes == kvfold.plan(model, time="full", page_slots=page_slots).bytes(seen) == cache.base_bytes
        )
        # An owner with a sliding window keeps no more than it sees, and that is what full means there.
        assert time != "full" or cache.full_bytes == cache.allocated_bytes

    assert_as_planned()
    for start, stop in ((0, 11), (11, 18), (18, 19), (19, 20)):
        feed(model, cache, texts[:, start:stop], MASK[:, :stop])
        assert_as_planned()
    assert cache.seen_tokens.tolist() == [20, 15, 3]
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert_as_planned()
    for size in (1, 7):
        feed(model, cache, texts[:2, :size])
        assert_as_planned()
    cache.reset()
    assert_as_planned()
    cache.free()
    assert cache.allocated_bytes == planned.bytes([]) == 0


def test_a_plan_of_the_model_is_a_plan_of_its_config(models):
    """Asked of the loaded model, of its config, or of what its config would write."""
    model = fold(models["qwen2"], "h2o:4+4")
    plans = [kvfold.plan(source) for source in (model, model.config, model.config.to_dict())]
    assert {one.layout for one in plans} == {model.config.layout}
    assert len({one.bytes([40, 7]) for one in plans}) == 1


@pytest.mark.parametrize("time", TIMES)
def test_seen_and_kept_tokens(models, time, texts):
    model = fold(models["llama"], time)
    cache = ragged(model, texts)
    assert cache.seen_tokens.dtype == cache.kept_tokens.dtype == torch.int64
    assert cache.seen_tokens.tolist() == [20, 15, 3]
    most = [model.config.layout.time[0].max_kept(seen) for seen in (20, 15, 3)]
    assert cache.kept_tokens.tolist() == [[[n, n] for n in most]] * 2
    assert [
        [[len(head) for head in row] for row in owner] for owner in cache.kept_positions
    ] == cache.kept_tokens.tolist()
    for owner in cache.kept_positions:
        for row, seen in zip(owner, (20, 15, 3), strict=True):
            assert all(head == sorted(set(head)) and set(head) <= set(range(seen)) for head in row)


def test_an_owner_with_fewer_heads_is_padded_with_minus_one(model, texts):
    """And an owner stands once for all its readers."""
    plain = KVLayout.plain(4, 2, 16)
    wide = KVLayout.parse("0_0_2_2", plain).to_json()
    for layer in wide["layers"][:2]:
        layer["num_kv_heads"] = 1
    layout = KVLayout.from_json(wide).with_time("full; 2=tova:4")
    cache = FoldCache(layout, dtype=torch.float32, rows=2)
    assert cache.kept_tokens.tolist() == [[[0, -1]] * 2, [[0, 0]] * 2]
    assert [len(owner[0]) for owner in cache.kept_positions] == [1, 2] and len(cache.layers) == 4
    shape = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    shared = FoldForCausalLM(FoldConfig(**shape, num_key_value_heads=2, layout=plain.with_owners([0, 0, 2, 2]))).eval()
    cache = shared.new_cache(rows=2)
    feed(shared, cache, texts[:2, :7])
    assert cache.kept_tokens.tolist() == [[[7, 7]] * 2] * 2 and len(cache.layers) == 4


def test_bytes_before_conversion_are_those_of_the_base_layout(texts):
    """Sharing, fewer heads and a method each make it smaller; only the method is what `full_bytes` leaves out."""
    plain = KVLayout.plain(4, 4, 16)
    layout = KVLayout.parse("cla2", plain).with_heads(2).with_time("tova:4")
    shape = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    model = FoldForCausalLM(FoldConfig(**shape, layout=layout, base_layout=plain)).eval()
    cache = ragged(model, texts)
    planned = kvfold.plan(model)
    assert cache.allocated_bytes == planned.bytes([20, 15, 3])
    assert cache.full_bytes == kvfold.plan(model, time="full").bytes([20, 15, 3])
    assert planned.base_layout == plain
    assert cache.base_bytes == kvfold.plan(FoldConfig(**shape, dtype="float32")).bytes([20, 15, 3])
    assert cache.allocated_bytes < cache.full_bytes < cache.base_bytes
    assert cache.base_bytes - 3 * 8 == 4 * (cache.full_bytes - 3 * 8), "half the owners, half the heads"


def test_a_budget_is_reserved_at_once_and_no_copy_adds_to_it(model, texts):
    cache = model.new_cache(rows=3, memory_bytes=100_000)
    reserved = cache.pool_bytes
    assert reserved <= 100_000 and cache.free_pages == pages_in_all(cache)
    feed(model, cache, texts, MASK)
    twin = cache.copy()
    feed(model, twin, texts, MASK)
    assert cache.pool_bytes == twin.pool_bytes <= 100_000
    assert cache.allocated_bytes <= cache.pool_bytes


# -- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time", TIMES[:4])
@pytest.mark.parametrize("way", ["copy", "copy.copy", "copy.deepcopy"])
def test_a_copy_goes_its_own_way(models, time, way, texts):
    """What is fed to one side changes nothing on the other: both go on as a cache that was read anew."""
    model = fold(models["llama"], time)
    cache = ragged(model, texts, page_slots=4)
    twin = {"copy": FoldCache.copy, "copy.copy": copy.copy, "copy.deepcopy": copy.deepcopy}[way](cache)
    assert twin.columns == 20 and twin.kept_positions == cache.kept_positions
    for size in (1, 6):
        feed(model, twin, texts[:, :size].flip(0))
        mine = feed(model, cache, texts[:, :size])
    fresh = ragged(model, texts, page_slots=4)
    for size in (1, 6):
        expected = feed(model, fresh, texts[:, :size])
    torch.testing.assert_close(mine, expected, **CLOSE)
    assert cache.kept_positions == fresh.kept_positions and twin.seen_tokens.tolist() == cache.seen_tokens.tolist()
    before = cache.kept_positions
    del twin
    assert cache.kept_positions == before and cache.store.num_sequences == 3


@pytest.mark.parametrize("time", TIMES[:4])
@pytest.mark.parametrize(
    ("deed", "order"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.reorder_cache(torch.tensor([0, 1, 2])), [0, 1, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
        (lambda cache: cache.select_rows([1, 1, 0, 2]), [1, 1, 0, 2]),
    ],
    ids=["reorder", "reorder nothing", "repeat", "select", "select by mask", "select rows"],
)
def test_rows_go_on_from_the_rows_they_were(models, time, deed, order, texts):
    model = fold(models["llama"], time)
    cache, left = ragged(model, texts, page_slots=4), ragged(model, texts, page_slots=4)
    deed(cache)
    assert cache.batch_size == cache.store.num_sequences == len(order)
    assert cache.seen_tokens.tolist() == [[20, 15, 3][row] for row in order]
    assert cache.kept_positions == [[owner[row] for row in order] for owner in left.kept_positions]
    more = texts[torch.tensor(order), :9]
    for start, stop in ((0, 1), (1, 9)):
        ours, theirs = feed(model, cache, more[:, start:stop]), feed(model, left, texts[:, start:stop])
        torch.testing.assert_close(ours, theirs[order], **CLOSE)
    assert cache.kept_positions == [[owner[row] for row in order] for owner in left.kept_positions]


@pytest.mark.parametrize("time", TIMES[:4])
def test_reset_forgets_all(models, time, texts):
    model = fold(models["llama"], time)
    cache = ragged(model, texts)
    empty = model.new_cache(rows=3).allocated_bytes
    cache.reset()
    assert cache.columns == cache.get_seq_length() == 0 and cache.seen_tokens.tolist() == [0, 0, 0]
    assert cache.kept_tokens.sum() == 0 and cache.kept_positions == [[[[], []]] * 3] * 2
    assert cache.allocated_bytes == empty and cache.free_pages == pages_in_all(cache)
    fresh = model.new_cache(rows=3)
    torch.testing.assert_close(feed(model, cache, texts, MASK), feed(model, fresh, texts, MASK), **CLOSE)


def test_a_freed_cache_is_empty_and_may_be_used_again(model, texts):
    cache = ragged(model, texts)
    cache.free()
    cache.free()
    assert cache.batch_size == 0 and cache.allocated_bytes == 0 and cache.free_pages == pages_in_all(cache)
    assert cache.seen_tokens.tolist() == [] and cache.columns == 0
    feed(model, cache, texts[:2])
    assert cache.seen_tokens.tolist() == [20, 20]


# -- what transformers asks ------------------------------------------------------------------------------------------


def test_columns_fed_are_what_transformers_counts(model, texts):
    """Padding and dropped tokens included; a mask spans them all."""
    fold(model, "tova:4")
    cache = ragged(model, texts)
    assert len(cache) == len(cache.layers) == 2
    for layer, face in enumerate(cache.layers):
        assert cache.get_seq_length() == cache.get_seq_length(layer) == face.get_seq_length() == 20
        assert cache.get_mask_sizes(5, layer) == face.get_mask_sizes(5) == (25, 0)
        assert not face.is_compileable and not face.is_croppable
    assert not cache.is_compileable and not cache.is_croppable and cache.is_initialized
    assert cache.batch_size == 3


@pytest.mark.parametrize("time", TIMES[:4])
def test_cropping_is_refused_with_the_way_out(models, time, texts):
    model = fold(models["llama"], time)
    cache = ragged(model, texts)
    for tokens in (-1, 0, 5):
        with pytest.raises(ValueError, match=r"can't be cut back: keep a copy with copy\(\)") as caught:
            cache.crop(tokens)
        assert "\n" not in str(caught.value)
    assert cache.seen_tokens.tolist() == [20, 15, 3] and cache.columns == 20


def test_keys_and_values_of_another_model_are_refused(model):
    cache = model.new_cache(rows=1)
    with pytest.raises(ValueError, match="filled by a kvfold model only") as caught:
        cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    assert "\n" not in str(caught.value)


def test_a_cache_of_another_layout_is_refused(models, texts):
    """A cache is made by the model that uses it, and for the layout that it has then."""
    cache = models["qwen2"].new_cache(rows=3)
    with pytest.raises(ValueError) as caught:
        feed(fold(models["llama"], "full"), cache, texts)
    assert "\n" not in str(caught.value) and cache.seen_tokens.tolist() == [0, 0, 0]
