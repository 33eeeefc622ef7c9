"""The identity ladder: a cache that folds nothing away equals transformers, and what folds equals transformers with an
attention that was written from the definitions alone (slow_cache.py). Gradients and losses: test_families.py.
"""

import functools

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from kvfold.layout.kvlayout import KVLayout
from kvfold.models.decoder import FoldForCausalLM
from model_driver import CLOSE, poisoned
from slow_cache import Method, SlowCache

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES = {
    "llama": {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "hunyuan_v1_dense": {},
}
FAMILIES = {family: {"num_hidden_layers": 2} | settings for family, settings in FAMILIES.items()}
ROOMY = ["full", "h2o:16+16", "h2o:100%+1", "tova:32", "tova:100%", "window:32+0", "window:20+4"]
"""Nothing is dropped from 24 tokens."""
PREFIX = ["full", "window:5+2", "window:25%+1"]
STEPS = ["h2o:4+4", "tova:6", "h2o:25%+25%", "tova:25%"]
CUTS = [[24], [7, 7, 7, 3], [10, 1, 1, 5, 1]]


@pytest.fixture(scope="module")
def models(pair):
    """`models(family)` gives ours and theirs, the same ones each time: tests change nothing but our layout's methods."""
    return functools.cache(lambda family: pair(family, **FAMILIES[family]))


@pytest.fixture
def texts() -> torch.Tensor:
    """Three texts of 24 tokens."""
    return torch.randint(3, 97, (3, 24), generator=torch.Generator().manual_seed(11))


PADS = [0, 4, 12]


def padded(texts: torch.Tensor) -> torch.Tensor:
    """A mask with PADS columns of padding at the left of the rows."""
    return (torch.arange(texts.shape[1]) >= torch.tensor(PADS)[:, None]).long()


def folded(model: FoldForCausalLM, time: str) -> FoldForCausalLM:
    """The model with this method in every owner, those with a sliding window of their own included."""
    last = model.config.num_hidden_layers - 1
    model.config.layout = model.config.layout.with_time("full" if time == "full" else f"full; 0-{last}={time}")
    return model


def borders(cuts: list[int], columns: int) -> list[tuple[int, int]]:
    """Calls from column to column; the last cut is repeated until the end."""
    found, start, cuts = [], 0, list(cuts)
    while start < columns:
        stop = min(columns, start + (cuts.pop(0) if len(cuts) > 1 else cuts[0]))
        found.append((start, stop))
        start = stop
    return found


@torch.no_grad()
def read(model, texts, cuts, cache, mask=None) -> torch.Tensor:
    """Logits [B, T, V] of texts read through a cache in several calls, by ours or theirs."""
    mask = torch.ones_like(texts) if mask is None else mask
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return torch.cat([
        model(texts[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], past_key_values=cache).logits
        for a, b in borders(cuts, texts.shape[1])
    ], dim=1)  # fmt: skip


def assert_same(ours, theirs, mask):
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], **CLOSE)


# -- nothing is folded away ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time", ROOMY)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_store_equals_transformers_own_cache_at_every_step(family, time, models, texts):
    ours, theirs = models(family)
    mask, cuts = padded(texts), [13, 1, 1, 4, 1, 1, 3]
    expected = read(theirs, texts, cuts, DynamicCache(config=theirs.config), mask)
    cache = poisoned(folded(ours, time), 3)
    assert_same(read(ours, texts, cuts, cache, mask), expected, mask)
    assert cache.seen_tokens.tolist() == [24, 20, 12]
    if family != "mistral" or time.startswith(("h2o", "tova")):
        kept = cache.kept_tokens
        assert (kept == torch.tensor([24, 20, 12])[:, None].expand_as(kept)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_equals_transformers_however_it_is_made(family, models, texts):
    """Without a cache, with a fresh one, and where gradients may be asked for."""
    ours, theirs = models(family)
    folded(ours, "full")
    mask = padded(texts)
    with torch.no_grad():
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        expected = theirs(texts, attention_mask=mask, position_ids=positions).logits
        for use_cache in (False, True):
            assert_same(ours(texts, attention_mask=mask, use_cache=use_cache).logits, expected, mask)
    with_gradients = ours(texts, attention_mask=mask).logits
    assert with_gradients.requires_grad
    assert_same(with_gradients.detach(), expected, mask)


@pytest.mark.parametrize("time", ["full", "h2o:16+16", "tova:32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family, time, models, texts):
    ours, theirs = models(family)
    prompts, mask = texts[:, :13], padded(texts)[:, :13]
    options = {"attention_mask": mask, "max_new_tokens": 11, "do_sample": False, "eos_token_id": None}
    cache = poisoned(folded(ours, time), 3)
    assert torch.equal(ours.generate(prompts, past_key_values=cache, **options), theirs.generate(prompts, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_group_of_one_query_head(family, pair, texts):
    """As many kv heads as query heads, which is no grouping at all."""
    ours, theirs = pair(family, num_key_value_heads=4, **FAMILIES[family])
    cache = poisoned(ours, 3)
    expected = read(theirs, texts, [13, 1, 1, 1, 8], DynamicCache(config=theirs.config))
    torch.testing.assert_close(read(ours, texts, [13, 1, 1, 1, 8], cache), expected, **CLOSE)
    assert cache.kept_tokens.shape == (2, 3, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_grouped_heads_equal_heads_written_out(family, pair, texts):
    """A kv head that two query heads share, against the same head stored twice."""
    grouped, _ = pair(family, **FAMILIES[family])
    whole, _ = pair(family, num_key_value_heads=4, **FAMILIES[family])
    weights = {
        name: tensor.unflatten(0, (2, -1)).repeat_interleave(2, dim=0).flatten(0, 1)
        if "k_proj" in name or "v_proj" in name else tensor
        for name, tensor in grouped.state_dict().items()
    }  # fmt: skip
    whole.load_state_dict(weights)
    ours, theirs = (read(model, texts, [13, 1, 1, 1, 8], poisoned(model, 3)) for model in (grouped, whole))
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("time", ["full", "h2o:16+16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_layout_with_every_layer_an_owner(family, time, pair, texts):
    ours, theirs = pair(family, **FAMILIES[family])
    config = ours.config
    config.layout = KVLayout.parse("0_1", config.layout)
    explicit = FoldForCausalLM(config)
    explicit.load_state_dict(ours.state_dict())
    mask = padded(texts)
    expected = read(theirs, texts, [13, 1, 1, 1, 8], DynamicCache(config=theirs.config), mask)
    cache = poisoned(folded(explicit.eval(), time), 3)
    assert_same(read(explicit, texts, [13, 1, 1, 1, 8], cache, mask), expected, mask)


# -- folded, and equal all the same ----------------------------------------------------------------------------------


@pytest.mark.parametrize("time", PREFIX)
@pytest.mark.parametrize("family", FAMILIES)
def test_calls_cut_anywhere_equal_one_whole_call(family, time, models, texts):
    """What a prefix method keeps is a function of the tokens alone."""
    ours = folded(models(family)[0], time)
    mask, kept = padded(texts), set()
    with torch.no_grad():
        expected = ours(texts, attention_mask=mask, use_cache=False).logits
    for cuts in CUTS:
        cache = poisoned(ours, 3)
        assert_same(read(ours, texts, cuts, cache, mask), expected, mask)
        kept.add(str(cache.kept_positions))
    assert len(kept) == 1


@pytest.mark.parametrize("time", ["full", "window:5+2", "h2o:4+4", "tova:25%"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_equals_each_row_alone(family, time, models, texts):
    """The first call brings the third row nothing but padding. Each row alone is cut where its own tokens are."""
    ours = folded(models(family)[0], time)
    mask, cuts = padded(texts), [10, 4, 1, 1, 1, 7]
    batch = poisoned(ours, 3)
    together = read(ours, texts, cuts, batch, mask)
    for row, pad in enumerate(PADS):
        sizes = [int(mask[row, a:b].sum()) for a, b in borders(cuts, 24)]
        single = poisoned(ours, 1)
        alone = read(ours, texts[row : row + 1, pad:], [size for size in sizes if size], single)
        torch.testing.assert_close(together[row, pad:], alone[0], **CLOSE)
        assert [owner[row] for owner in batch.kept_positions] == [owner[0] for owner in single.kept_positions]


@pytest.mark.parametrize("time", PREFIX + STEPS)
def test_one_call_is_the_same_with_and_without_a_cache_or_gradients(time, pair, texts):
    """Methods that drop between calls drop nothing in one call, and say so."""
    ours, mask = folded(pair("llama", **FAMILIES["llama"])[0], time), padded(texts)

    def logits(**options):
        return ours(texts, attention_mask=mask, **options).logits

    if time in STEPS:
        with pytest.warns(UserWarning, match="reads its own tokens whole"):
            with_gradients = logits()
    else:
        with_gradients = logits()
    with torch.no_grad():
        dense, fresh = logits(use_cache=False), logits(use_cache=True)
        given = logits(past_key_values=poisoned(ours, 3))
    for one in (dense, fresh, given):
        assert_same(one, with_gradients.detach(), mask)


# -- folded, against transformers with a slow cache ------------------------------------------------------------------


class SlowAttention:
    """An attention function for transformers: each layer keeps the entries of its rows in a slow cache."""

    def __init__(self, method: str, *, rows: int, kv_heads: int, window: int | None = None):
        self.real, self._made = None, {}
        self._make = lambda scale: SlowCache([0], {0: Method(method)}, {0: window}, {0: kv_heads}, rows, scale)

    def __call__(self, module, query, key, value, attention_mask, scaling, **options):
        if module.layer_idx not in self._made:
            self._made[module.layer_idx] = self._make(scaling)
        slow = self._made[module.layer_idx]
        (out,) = slow.call(*([x.transpose(1, 2)] for x in (query, key, value)), self.real.tolist())
        return out.to(query.dtype), None

    def positions(self):
        """[layer][row][kv head]: positions held, ascending."""
        return [self._made[layer].positions()[0] for layer in sorted(self._made)]

    @property
    def narrowest(self):
        """The smallest gap between the score of a token that stayed and one that went."""
        return min(slow.narrowest for slow in self._made.values())


@torch.no_grad()
def read_slowly(theirs, slow: SlowAttention, texts, cuts, mask):
    """Logits of transformers' model over the slow cache, which is handed each call's own keys and values."""
    AttentionInterface.register("slow", slow)
    AttentionMaskInterface.register("slow", lambda *_, **__: None)
    theirs.set_attn_implementation("slow")
    positions, logits = (mask.cumsum(dim=1) - 1).clamp(min=0), []
    for a, b in borders(cuts, texts.shape[1]):
        slow.real = mask[:, a:b].bool()
        logits.append(theirs(texts[:, a:b], position_ids=positions[:, a:b], use_cache=False).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("time", [*PREFIX, *STEPS])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_equals_transformers_over_a_slow_cache(family, time, pair, texts):
    """Cut at the same calls, H2O and TOVA drop the same tokens step for step."""
    ours, theirs = pair(family, **FAMILIES[family])
    mask, cuts, window = padded(texts), [9, 1, 4, 1, 1, 8], FAMILIES[family].get("sliding_window")
    slow = SlowAttention(time, rows=3, kv_heads=2, window=window)
    expected = read_slowly(theirs, slow, texts, cuts, mask)
    cache = poisoned(folded(ours, time), 3)
    assert_same(read(ours, texts, cuts, cache, mask), expected, mask)
    assert slow.narrowest > 1e-5, "no decision hangs on rounding"
    if window is None or time != "full":
        assert cache.kept_positions == slow.positions()
