"""`generate`: the same tokens as transformers wherever nothing is folded away, a memory that is never exceeded, and what is
refused. Greedy tokens of every family: test_ladder.py.
"""

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from kvfold.cache.allocator import CacheFull
from kvfold.layout.planner import layout_bytes
from model_driver import CLOSE, GREEDY, MASK, TEXTS, TIMES, fold, poisoned

ROOMY = ["full", "h2o:30+30"]
"""Nothing is dropped."""


@pytest.mark.parametrize("time", ROOMY)
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 1.3, "top_k": 20, "num_return_sequences": 2},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2, "top_k": 20},
    ],
    ids=["sampling", "beams", "sampled beams"],
)
def test_sampling_and_beams_equal_transformers(both, time, options):
    ours, theirs = both
    fold(ours, time)
    options |= {"attention_mask": MASK, "max_new_tokens": 10, "eos_token_id": [20, 30], "pad_token_id": 0}
    found = []
    for model, given in ((ours, {"past_key_values": poisoned(ours, 3)}), (ours, {}), (theirs, {})):
        torch.manual_seed(5)
        found.append(model.generate(TEXTS, **options, **given))
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])


def test_scores_of_beams_equal_transformers(both):
    options = {"attention_mask": MASK, "max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2, "do_sample": False,
               "eos_token_id": 20, "pad_token_id": 0, "return_dict_in_generate": True, "output_scores": True}  # fmt: skip
    ours, theirs = (model.generate(TEXTS, **options) for model in both)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, **CLOSE)


class Collect(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.extend(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_a_streamer_hears_every_token(both):
    heard = []
    for model in both:
        streamer = Collect()
        ids = model.generate(TEXTS[:1], streamer=streamer, max_new_tokens=8, **GREEDY)
        assert streamer.tokens == ids[0].tolist() and streamer.ended
        heard.append(streamer.tokens)
    assert heard[0] == heard[1]


@pytest.mark.parametrize("given", [False, True])
def test_a_mask_may_be_left_out(both, given):
    """transformers finds padding by its token; where there is none, there is no mask at all."""
    ours, theirs = both
    for ids in (TEXTS, TEXTS * MASK):
        cache = {"past_key_values": poisoned(ours, 3)} if given else {}
        expected = theirs.generate(ids, max_new_tokens=8, **GREEDY)
        assert torch.equal(ours.generate(ids, max_new_tokens=8, **GREEDY, **cache), expected)
    if given:
        assert cache["past_key_values"].seen_tokens.tolist() == [17, 14, 11]


def test_embeddings_instead_of_ids(both):
    ours, theirs = both
    cache = poisoned(ours, 3)
    found = []
    for model, given in ((ours, {"past_key_values": cache}), (theirs, {})):
        embedded = model.get_input_embeddings()(TEXTS).detach()
        found.append(model.generate(inputs_embeds=embedded, attention_mask=MASK, max_new_tokens=8, **GREEDY, **given))
    assert torch.equal(*found) and found[0].shape == (3, 8)
    assert cache.seen_tokens.tolist() == [17, 14, 11]


@pytest.mark.parametrize("time", ["full", "window:60+0", "window:6+2"])
def test_without_a_cache(both, time):
    ours, theirs = both
    fold(ours, time)
    options = {"attention_mask": MASK, "max_new_tokens": 8, **GREEDY}
    bare = ours.generate(TEXTS, use_cache=False, **options)
    assert torch.equal(bare, ours.generate(TEXTS, **options))
    if time != "window:6+2":
        assert torch.equal(bare, theirs.generate(TEXTS, **options))


def test_without_a_cache_nothing_is_dropped_between_calls(both):
    ours, theirs = both
    fold(ours, "tova:8")
    ours.model._warned.clear()
    options = {"attention_mask": MASK, "max_new_tokens": 8, **GREEDY}
    with pytest.warns(UserWarning, match="reads its own tokens whole"):
        bare = ours.generate(TEXTS, use_cache=False, **options)
    assert torch.equal(bare, theirs.generate(TEXTS, **options))


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time", ["full", "window:60+0", "tova:60"])
def test_a_full_cache_leaves_the_rows_where_they_stood(ours, time):
    """16 tokens a row fit: the prompt and seven more. The one after that is refused, and the rows go on elsewhere."""
    fold(ours, time)
    memory = layout_bytes(ours.config.layout, [16] * 3, 4, 4)
    cache = poisoned(ours, 3, memory_bytes=memory)
    with pytest.raises(CacheFull):
        ours.generate(TEXTS, past_key_values=cache, max_new_tokens=20, **GREEDY)
    free = ours.generate(TEXTS, max_new_tokens=20, **GREEDY)
    assert cache.seen_tokens.tolist() == [16] * 3 and cache.columns == 16
    assert cache.pool_bytes <= memory
    cache.batch_select_indices(torch.tensor([2]))
    rest = ours.generate(free[2:, :17], past_key_values=cache, max_new_tokens=13, **GREEDY)
    assert torch.equal(rest, free[2:])


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_written(ours):
    cache = poisoned(ours, 3, memory_bytes=layout_bytes(ours.config.layout, [8] * 3, 4, 4))
    before = cache.free_pages, cache.allocated_bytes
    for _ in range(2):
        with pytest.raises(CacheFull) as caught:
            ours.generate(TEXTS, past_key_values=cache, max_new_tokens=2, **GREEDY)
        assert "\n" not in str(caught.value)
        assert (cache.free_pages, cache.allocated_bytes) == before
        assert cache.columns == 0 and cache.seen_tokens.tolist() == [0] * 3
    found = ours.generate(TEXTS[:, :6], past_key_values=cache, max_new_tokens=3, **GREEDY)
    assert torch.equal(found, ours.generate(TEXTS[:, :6], max_new_tokens=3, **GREEDY))


@pytest.mark.parametrize("time", TIMES[1:])
def test_a_fixed_budget_generates_on_and_on_in_the_memory_planned(ours, time):
    fold(ours, time)
    prompt = TEXTS.repeat(1, 2)[:, :12]
    cache = poisoned(ours, 3, memory_bytes=layout_bytes(ours.config.layout, [60] * 3, 4, 4))
    found = ours.generate(prompt, past_key_values=cache, max_new_tokens=48, **GREEDY)
    assert torch.equal(found, ours.generate(prompt, max_new_tokens=48, **GREEDY))
    assert cache.seen_tokens.tolist() == [59] * 3 and (cache.kept_tokens == 8).all()


# -- refusals --------------------------------------------------------------------------------------------------------

REFUSED = {
    "assisted generation": lambda model, theirs: {"assistant_model": theirs},
    "assisted generation ": lambda model, theirs: {"prompt_lookup_num_tokens": 2},
    "Contrastive Search requires": lambda model, theirs: {"penalty_alpha": 0.6, "top_k": 4},
    "cache_implementation='static'": lambda model, theirs: {"cache_implementation": "static"},
    "cache_implementation='dynamic'": lambda model, theirs: {"cache_implementation": "dynamic"},
    "cache_implementation='paged'": lambda model, theirs: {"cache_implementation": "paged"},
    "past_key_values is a DynamicCache": lambda model, theirs: {"past_key_values": DynamicCache()},
    "past_key_values is a tuple": lambda model, theirs: {"past_key_values": ((1, 2),)},
    "nothing to go on from": lambda model, theirs: {"input_ids": torch.zeros(1, 0, dtype=torch.long)},
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_a_kvfold_cache_cant_do_is_refused_in_one_line(both, line):
    ours, theirs = both
    call = {"input_ids": TEXTS[:1], "max_new_tokens": 4, **GREEDY} | REFUSED[line](ours, theirs)
    with pytest.raises(ValueError) as caught:
        ours.generate(**call)
    assert line.strip() in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_number_of_rows_is_refused_in_one_line(ours):
    cache = poisoned(ours, 3)
    ours.generate(TEXTS, past_key_values=cache, max_new_tokens=4, **GREEDY)
    text = TEXTS.repeat(1, 2)
    for rows in (1, 2):
        with pytest.raises(ValueError, match=f"holds 3 rows, the call brings {rows}") as caught:
            ours.generate(text[:rows], past_key_values=cache, max_new_tokens=4, **GREEDY)
        assert "\n" not in str(caught.value) and cache.seen_tokens.tolist() == [13] * 3


def test_a_kvfold_model_can_assist_no_other(both):
    ours, theirs = both
    with pytest.raises(ValueError, match="can't be cut back") as caught:
        theirs.generate(TEXTS[:1], assistant_model=ours, max_new_tokens=4, **GREEDY)
    assert "\n" not in str(caught.value)
