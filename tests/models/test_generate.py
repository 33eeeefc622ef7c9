"""`generate`: the same tokens as transformers wherever nothing is folded away, and no padding, beam or refusal that costs a
row its tokens wherever something is. Greedy tokens of every family: test_ladder.py.
"""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from kvfold.cache.hf import FoldCache
from kvfold.cache.pages import CacheFull
from kvfold.planner import layout_bytes

TIMES = ["full", "window:6+2", "h2o:4+4", "tova:8"]
ROOMY = ["full", "h2o:30+30"]
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
CHUNKS_ARE_FED_RIGHT = Version(transformers.__version__) >= Version("5.23")
PADS = [0, 3, 6]


@pytest.fixture(scope="module")
def models(pair):
    return pair("llama", num_hidden_layers=2)


@pytest.fixture
def both(models):
    """Ours and theirs; a test changes nothing but our layout's method."""
    fold(models[0], "full")
    return models


@pytest.fixture
def ours(both):
    return both[0]


@pytest.fixture
def texts() -> torch.Tensor:
    """Three texts of 10 tokens."""
    return torch.randint(3, 97, (3, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask(texts) -> torch.Tensor:
    """PADS columns of padding at the left of the rows."""
    return (torch.arange(texts.shape[1]) >= torch.tensor(PADS)[:, None]).long()


def fold(model, time):
    model.config.layout = model.config.layout.with_time(time)


def poisoned(model, rows, **options) -> FoldCache:
    """A cache of small pages that are NaN wherever nothing was written, or was freed."""
    return FoldCache(model.config.layout, dtype=torch.float32, rows=rows, page_slots=4, poison=True, **options)


@torch.no_grad()
def step(model, cache, *tokens):
    """Logits [T, V] after one call of these tokens for a cache of one row."""
    return model(torch.tensor([tokens]), past_key_values=cache).logits[0]


def kept_by(cache, row):
    return [owner[row] for owner in cache.kept_positions]


def assert_all_returned(cache):
    cache.free()
    assert cache.store.num_rows == 0 and cache.allocated_bytes == 0
    assert cache.free_pages == sum(pool.book.capacity for pool in cache.store._pools)


# -- the same as transformers ----------------------------------------------------------------------------------------


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
def test_sampling_and_beams_equal_transformers(both, time, options, texts, mask):
    ours, theirs = both
    fold(ours, time)
    options |= {"attention_mask": mask, "max_new_tokens": 10, "eos_token_id": [20, 30], "pad_token_id": 0}
    found = []
    for model, given in ((ours, {"past_key_values": poisoned(ours, 3)}), (ours, {}), (theirs, {})):
        torch.manual_seed(5)
        found.append(model.generate(texts, **options, **given))
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])


def test_scores_of_beams_equal_transformers(both, texts, mask):
    options = {"attention_mask": mask, "max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2, "do_sample": False,
               "eos_token_id": 20, "pad_token_id": 0, "return_dict_in_generate": True, "output_scores": True}  # fmt: skip
    ours, theirs = (model.generate(texts, **options) for model in both)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, **CLOSE)


class Collect(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.extend(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_a_streamer_hears_every_token(both, texts):
    heard = []
    for model in both:
        streamer = Collect()
        ids = model.generate(texts[:1], streamer=streamer, max_new_tokens=8, **GREEDY)
        assert streamer.tokens == ids[0].tolist() and streamer.ended
        heard.append(streamer.tokens)
    assert heard[0] == heard[1]


@pytest.mark.parametrize("given", [False, True])
def test_a_mask_may_be_left_out(both, given, texts, mask):
    """transformers finds padding by its token; where there is none, there is no mask at all."""
    ours, theirs = both
    for ids in (texts, texts * mask):
        cache = {"past_key_values": poisoned(ours, 3)} if given else {}
        expected = theirs.generate(ids, max_new_tokens=8, **GREEDY)
        assert torch.equal(ours.generate(ids, max_new_tokens=8, **GREEDY, **cache), expected)
    if given:
        assert cache["past_key_values"].seen_tokens.tolist() == [17, 14, 11]


def test_embeddings_instead_of_ids(both, texts, mask):
    ours, theirs = both
    cache = poisoned(ours, 3)
    found = []
    for model, given in ((ours, {"past_key_values": cache}), (theirs, {})):
        embedded = model.get_input_embeddings()(texts).detach()
        found.append(model.generate(inputs_embeds=embedded, attention_mask=mask, max_new_tokens=8, **GREEDY, **given))
    assert torch.equal(*found) and found[0].shape == (3, 8)
    assert cache.seen_tokens.tolist() == [17, 14, 11]


@pytest.mark.parametrize("time", ["full", "window:60+0", "window:6+2"])
def test_without_a_cache(both, time, texts, mask):
    ours, theirs = both
    fold(ours, time)
    options = {"attention_mask": mask, "max_new_tokens": 8, **GREEDY}
    bare = ours.generate(texts, use_cache=False, **options)
    assert torch.equal(bare, ours.generate(texts, **options))
    if time != "window:6+2":
        assert torch.equal(bare, theirs.generate(texts, **options))


def test_without_a_cache_nothing_is_dropped_between_calls(both, texts, mask):
    ours, theirs = both
    fold(ours, "tova:8")
    ours.model._warned.clear()
    options = {"attention_mask": mask, "max_new_tokens": 8, **GREEDY}
    with pytest.warns(UserWarning, match="reads its own tokens whole"):
        bare = ours.generate(texts, use_cache=False, **options)
    assert torch.equal(bare, theirs.generate(texts, **options))


# -- turns, chunks and rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False], ids=["the whole text again", "only what is new"])
@pytest.mark.parametrize("time", ROOMY)
def test_several_turns_on_one_cache_equal_transformers(both, time, whole, texts, mask):
    ours, theirs = both
    fold(ours, time)
    found = []
    for model, cache in ((ours, poisoned(ours, 3)), (theirs, DynamicCache(config=theirs.config)), (theirs, None)):
        ids, real = texts, mask
        for turn in range(3):
            begun = turn > 0 and cache is not None and not whole
            fed = ids[:, cache.get_seq_length() :] if begun else ids
            given = {"attention_mask": real, "past_key_values": cache, "max_new_tokens": 6, **GREEDY}
            out = model.generate(fed, **given)
            new = torch.full((3, turn + 1), 50 + turn)
            ids = torch.cat((ids, out[:, fed.shape[1] :], new), dim=1)
            real = torch.nn.functional.pad(real, (0, ids.shape[1] - real.shape[1]), value=1)
        found.append(ids)
        if model is ours:
            assert cache.seen_tokens.tolist() == [cache.columns - pad for pad in PADS]
            assert cache.columns == 10 + 6 + 1 + 6 + 2 + 5
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("time", TIMES)
def test_turns_under_every_method_are_calls_on_one_cache(ours, time, texts):
    """A second turn feeds the last token of the first with its own, in one call: what a row read by hand gets."""
    fold(ours, time)
    cache, by_hand = poisoned(ours, 1), poisoned(ours, 1)
    first = ours.generate(texts[:1], past_key_values=cache, max_new_tokens=6, **GREEDY)
    text = torch.cat((first, texts[1:2, :5]), dim=1)
    second = ours.generate(text, past_key_values=cache, max_new_tokens=6, **GREEDY)
    logits = step(ours, by_hand, *texts[0].tolist())
    for token in first[0, 10:-1].tolist():
        step(ours, by_hand, token)
    logits, said = step(ours, by_hand, *text[0, 15:].tolist()), []
    for _ in range(6):
        said.append(int(logits[-1].argmax()))
        if len(said) < 6:
            logits = step(ours, by_hand, said[-1])
    assert second[0, 21:].tolist() == said
    assert cache.kept_positions == by_hand.kept_positions and cache.seen_tokens.tolist() == [26]


@pytest.mark.parametrize("size", [3, 10, 64])
@pytest.mark.parametrize("time", TIMES)
def test_a_prompt_read_in_chunks(both, time, size, texts, mask):
    """Whole or in pieces, for methods that go by the tokens alone; cut at the same calls for those that don't."""
    ours, theirs = both
    fold(ours, time)
    options = {"attention_mask": mask, "max_new_tokens": 6, **GREEDY}
    cache = poisoned(ours, 3)
    found = ours.generate(texts, past_key_values=cache, prefill_chunk_size=size, **options)
    assert torch.equal(found, ours.generate(texts, prefill_chunk_size=size, **options))
    if time == "full":
        assert torch.equal(found, theirs.generate(texts, **options))
    if time in ("full", "window:6+2"):
        assert torch.equal(found, ours.generate(texts, **options))
    by_hand, said = poisoned(ours, 3), []
    with torch.no_grad():
        for start in range(0, 10, size):
            stop = min(10, start + size)
            given = {"attention_mask": mask[:, :stop], "past_key_values": by_hand}
            logits = ours(texts[:, start:stop], **given).logits
        for number in range(6):
            said.append(logits[:, -1].argmax(dim=-1))
            if number < 5:
                logits = ours(said[-1][:, None], past_key_values=by_hand).logits
    assert torch.equal(found[:, 10:], torch.stack(said, dim=1))
    assert cache.kept_positions == by_hand.kept_positions


def test_chunks_on_a_continued_cache(ours, texts):
    cache = poisoned(ours, 3)
    first = ours.generate(texts, past_key_values=cache, max_new_tokens=4, **GREEDY)
    text = torch.cat((first, texts), dim=1)
    options = {"past_key_values": cache, "max_new_tokens": 4, "prefill_chunk_size": 4, **GREEDY}
    if not CHUNKS_ARE_FED_RIGHT:
        with pytest.raises(ValueError, match="would feed the text twice") as caught:
            ours.generate(text, **options)
        assert "\n" not in str(caught.value) and cache.seen_tokens.tolist() == [13] * 3
        del options["prefill_chunk_size"]
    assert torch.equal(ours.generate(text, **options), ours.generate(text, max_new_tokens=4, **GREEDY))
    assert cache.seen_tokens.tolist() == [27] * 3


@pytest.mark.parametrize("hint", [1, 2, 5])
@pytest.mark.parametrize("memory_bytes", [None, 200_000])
def test_the_number_of_rows_is_a_hint(both, hint, memory_bytes, texts):
    ours, theirs = both
    cache = poisoned(ours, hint, memory_bytes=memory_bytes)
    found = ours.generate(texts, past_key_values=cache, max_new_tokens=4, **GREEDY)
    assert torch.equal(found, theirs.generate(texts, max_new_tokens=4, **GREEDY))
    assert cache.batch_size == cache.store.num_rows == 3


def test_beams_on_a_second_turn(both, texts, mask):
    """They bring more rows than the cache has: each text goes on several times."""
    ours, theirs = both
    cache = poisoned(ours, 3)
    first = ours.generate(texts, attention_mask=mask, past_key_values=cache, max_new_tokens=5, **GREEDY)
    text, real = torch.cat((first, texts[:, :4]), dim=1), torch.nn.functional.pad(mask, (0, 9), value=1)
    beams = {"attention_mask": real, "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 7, **GREEDY}
    assert torch.equal(ours.generate(text, past_key_values=cache, **beams), theirs.generate(text, **beams))
    assert cache.batch_size == 9 and cache.seen_tokens.tolist() == [25] * 3 + [22] * 3 + [19] * 3
    assert_all_returned(cache)


@pytest.mark.parametrize("time", TIMES)
def test_the_score_of_a_beam_is_that_of_its_text_read_alone(ours, time, texts, mask):
    fold(ours, time)
    cache = poisoned(ours, 9)
    found = ours.generate(
        texts, attention_mask=mask, past_key_values=cache, max_new_tokens=12, num_beams=3, length_penalty=0.0,
        return_dict_in_generate=True, output_scores=True, **GREEDY,
    )  # fmt: skip
    for row, pad in enumerate(PADS):
        single, tokens = poisoned(ours, 1), found.sequences[row].tolist()
        logits, score = step(ours, single, *tokens[pad:10]), 0.0
        for token in tokens[10:]:
            score += float(logits[-1].log_softmax(dim=-1)[token])
            logits = step(ours, single, token)
        assert float(found.sequences_scores[row]) == pytest.approx(score, abs=1e-3)
    assert_all_returned(cache)


# -- rows that end early ---------------------------------------------------------------------------------------------


@pytest.fixture
def end_token(ours, texts, mask) -> int:
    """A token that the first row says early, and the others don't."""
    said = ours.generate(texts, attention_mask=mask, max_new_tokens=12, **GREEDY)[:, 10:]
    return next(token for token in said[0, 2:6].tolist() if not (said[1:] == token).any() and token not in said[0, :2])


def generate_folded(model, time, texts, mask, **options):
    fold(model, time)
    cache = poisoned(model, len(texts))
    out = model.generate(
        texts, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False, **options
    )
    return out[:, texts.shape[1] :], cache


@pytest.mark.parametrize(("pad", "padded"), [("the end token", True), ("another", False)])
@pytest.mark.parametrize("time", TIMES)
def test_padding_after_the_end_of_a_row_never_reaches_the_store(ours, time, pad, padded, texts, mask, request):
    if not padded:
        mask.fill_(1)
    end = request.getfixturevalue("end_token")
    options = {"eos_token_id": end, "pad_token_id": end if pad == "the end token" else 0}
    fold(ours, "full")
    said, cache = generate_folded(ours, time, texts, mask, **options)
    fed, more = [], texts[:, :5].flip(1)
    for row in range(3):
        real = texts[row : row + 1, mask[row].bool()]
        alone, single = generate_folded(ours, time, real, torch.ones_like(real), **options)
        length = alone.shape[1]
        assert said[row, :length].tolist() == alone[0].tolist()
        assert (said[row, length:] == options["pad_token_id"]).all()
        if length < said.shape[1]:
            # Alone it stops there; in company its last word is still fed.
            step(ours, single, end)
        fed.append(int(single.seen_tokens))
        assert kept_by(cache, row) == kept_by(single, 0)
        with torch.no_grad():
            later = ours(more, past_key_values=cache.copy()).logits[row]
        torch.testing.assert_close(later, step(ours, single, *more[row].tolist()), **CLOSE)
    assert cache.seen_tokens.tolist() == fed and len(set(fed)) > 1
    assert cache.columns == 10 + said.shape[1] - 1


@pytest.mark.parametrize("pad", ["the end token", "another"])
def test_rows_that_end_early_equal_transformers(both, pad, texts, mask, end_token):
    ours, theirs = both
    options = {
        "attention_mask": mask,
        "eos_token_id": end_token,
        "pad_token_id": 0,
        "max_new_tokens": 12,
        "do_sample": False,
    }
    if pad == "the end token":
        options["pad_token_id"] = end_token
    assert torch.equal(ours.generate(texts, **options), theirs.generate(texts, **options))


@pytest.mark.parametrize("time", TIMES)
def test_a_turn_after_rows_that_ended(ours, time, texts, mask, end_token):
    """The whole text passed again, with the padding in its middle marked as such."""
    options = {"eos_token_id": end_token, "pad_token_id": 0}
    said, cache = generate_folded(ours, time, texts, mask, **options)
    ended = (said == end_token).cumsum(dim=1) - (said == end_token).long() > 0
    text = torch.cat((texts, said, texts[:, :3]), dim=1)
    real = torch.cat((mask, (~ended).long(), torch.ones(3, 3, dtype=torch.long)), dim=1)
    given = {"past_key_values": cache, "max_new_tokens": 5, **GREEDY}
    second = ours.generate(text, attention_mask=real, **given)[:, text.shape[1] :]
    for row in range(3):
        ids = texts[row : row + 1, mask[row].bool()]
        alone, single = generate_folded(ours, time, ids, torch.ones_like(ids), **options)
        spoken = alone.shape[1] < said.shape[1]
        if spoken:
            step(ours, single, end_token)
        new = texts[row : row + 1, :3] if spoken else torch.cat((alone[:, -1:], texts[row : row + 1, :3]), dim=1)
        whole = torch.ones(1, single.columns + new.shape[1], dtype=torch.long)
        out = ours.generate(new, attention_mask=whole, past_key_values=single, max_new_tokens=5, **GREEDY)
        assert second[row].tolist() == out[0, new.shape[1] :].tolist()
        assert kept_by(cache, row) == kept_by(single, 0)


class FirstRowStops(StoppingCriteria):
    """After three tokens, whatever they are."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= 13, *[False] * (len(input_ids) - 1)])


@pytest.mark.parametrize("time", TIMES)
def test_a_row_that_another_rule_stops(ours, time, texts, mask):
    """Its padding is known too, and the model's own words are not taken for padding."""
    rule = {"stopping_criteria": StoppingCriteriaList([FirstRowStops()]), "eos_token_id": 96, "pad_token_id": 0}
    said, cache = generate_folded(ours, time, texts, mask, **rule)
    free, alone = generate_folded(ours, time, texts, mask, eos_token_id=96, pad_token_id=0)
    assert torch.equal(said[1:], free[1:]) and said[0].tolist() == free[0, :3].tolist() + [0] * 9
    assert cache.seen_tokens.tolist() == [13, 18, 15] and alone.seen_tokens.tolist() == [21, 18, 15]
    assert [kept_by(cache, row) for row in (1, 2)] == [kept_by(alone, row) for row in (1, 2)]


@pytest.mark.parametrize("end", [None, 96])
def test_a_word_that_is_the_padding_token_is_no_padding(both, end, texts):
    """Untrained models repeat themselves, so some row says the token that is chosen here many times."""
    ours, theirs = both
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": end}
    said = theirs.generate(texts, pad_token_id=0, **options)[:, 10:]
    pairs = said[:, 1:][said[:, 1:] == said[:, :-1]]
    assert pairs.numel(), "a token said twice in a row"
    cache = poisoned(ours, 3)
    found = ours.generate(texts, pad_token_id=int(pairs[0]), past_key_values=cache, **options)
    assert torch.equal(found[:, 10:], said) and cache.seen_tokens.tolist() == [21] * 3


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time", ["full", "window:60+0", "tova:60"])
def test_a_full_cache_leaves_the_rows_where_they_stood(ours, time, texts):
    """16 tokens a row fit: the prompt and seven more. The one after that is refused, and the rows go on elsewhere."""
    fold(ours, time)
    memory = layout_bytes(ours.config.layout, [16] * 3, 4, 4)
    cache = poisoned(ours, 3, memory_bytes=memory)
    with pytest.raises(CacheFull):
        ours.generate(texts, past_key_values=cache, max_new_tokens=20, **GREEDY)
    free = ours.generate(texts, max_new_tokens=20, **GREEDY)
    assert cache.seen_tokens.tolist() == [16] * 3 and cache.columns == 16
    assert cache.pool_bytes <= memory
    cache.batch_select_indices(torch.tensor([2]))
    rest = ours.generate(free[2:, :17], past_key_values=cache, max_new_tokens=13, **GREEDY)
    assert torch.equal(rest, free[2:])


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_written(ours, texts):
    cache = poisoned(ours, 3, memory_bytes=layout_bytes(ours.config.layout, [8] * 3, 4, 4))
    before = cache.free_pages, cache.allocated_bytes
    for _ in range(2):
        with pytest.raises(CacheFull) as caught:
            ours.generate(texts, past_key_values=cache, max_new_tokens=2, **GREEDY)
        assert "\n" not in str(caught.value)
        assert (cache.free_pages, cache.allocated_bytes) == before
        assert cache.columns == 0 and cache.seen_tokens.tolist() == [0] * 3
    found = ours.generate(texts[:, :6], past_key_values=cache, max_new_tokens=3, **GREEDY)
    assert torch.equal(found, ours.generate(texts[:, :6], max_new_tokens=3, **GREEDY))


@pytest.mark.parametrize("time", TIMES[1:])
def test_a_fixed_budget_generates_on_and_on_in_the_memory_planned(ours, time, texts):
    fold(ours, time)
    prompt = texts.repeat(1, 2)[:, :12]
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
    "there is nothing to go on from": lambda model, theirs: {"input_ids": torch.zeros(1, 0, dtype=torch.long)},
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_a_kvfold_cache_cant_do_is_refused_in_one_line(both, line, texts):
    ours, theirs = both
    call = {"input_ids": texts[:1], "max_new_tokens": 4, **GREEDY} | REFUSED[line](ours, theirs)
    with pytest.raises(ValueError) as caught:
        ours.generate(**call)
    assert line.strip() in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_number_of_rows_is_refused_in_one_line(ours, texts):
    cache = poisoned(ours, 3)
    ours.generate(texts, past_key_values=cache, max_new_tokens=4, **GREEDY)
    text = texts.repeat(1, 2)
    for rows in (1, 2):
        with pytest.raises(ValueError, match=f"holds 3 rows and the call brings {rows}") as caught:
            ours.generate(text[:rows], past_key_values=cache, max_new_tokens=4, **GREEDY)
        assert "\n" not in str(caught.value) and cache.seen_tokens.tolist() == [13] * 3


def test_a_kvfold_model_can_assist_no_other(both, texts):
    ours, theirs = both
    with pytest.raises(ValueError, match="can't be cut back") as caught:
        theirs.generate(texts[:1], assistant_model=ours, max_new_tokens=4, **GREEDY)
    assert "\n" not in str(caught.value)
