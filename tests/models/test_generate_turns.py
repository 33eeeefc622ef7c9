"""`generate` over several calls: turns on one cache, prompts in chunks, rows and beams that come and go."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache

from model_driver import GREEDY, MASK, PADS, TEXTS, TIMES, assert_all_returned, fold, poisoned, step

ROOMY = ["full", "h2o:30+30"]
"""Nothing is dropped."""
CHUNKS_ARE_FED_RIGHT = Version(transformers.__version__) >= Version("5.23")


@pytest.mark.parametrize("whole", [True, False], ids=["the whole text again", "only what is new"])
@pytest.mark.parametrize("time", ROOMY)
def test_several_turns_on_one_cache_equal_transformers(both, time, whole):
    ours, theirs = both
    fold(ours, time)
    found = []
    for model, cache in ((ours, poisoned(ours, 3)), (theirs, DynamicCache(config=theirs.config)), (theirs, None)):
        ids, real = TEXTS, MASK
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
def test_turns_under_every_method_are_calls_on_one_cache(ours, time):
    """A second turn feeds the last token of the first with its own, in one call: what a row read by hand gets."""
    fold(ours, time)
    cache, by_hand = poisoned(ours, 1), poisoned(ours, 1)
    first = ours.generate(TEXTS[:1], past_key_values=cache, max_new_tokens=6, **GREEDY)
    text = torch.cat((first, TEXTS[1:2, :5]), dim=1)
    second = ours.generate(text, past_key_values=cache, max_new_tokens=6, **GREEDY)
    logits = step(ours, by_hand, *TEXTS[0].tolist())
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
def test_a_prompt_read_in_chunks(both, time, size):
    """Whole or in pieces, for methods that go by the tokens alone; cut at the same calls for those that don't."""
    ours, theirs = both
    fold(ours, time)
    options = {"attention_mask": MASK, "max_new_tokens": 6, **GREEDY}
    cache = poisoned(ours, 3)
    found = ours.generate(TEXTS, past_key_values=cache, prefill_chunk_size=size, **options)
    assert torch.equal(found, ours.generate(TEXTS, prefill_chunk_size=size, **options))
    if time == "full":
        assert torch.equal(found, theirs.generate(TEXTS, **options))
    if time in ("full", "window:6+2"):
        assert torch.equal(found, ours.generate(TEXTS, **options))
    by_hand, said = poisoned(ours, 3), []
    with torch.no_grad():
        for start in range(0, 10, size):
            stop = min(10, start + size)
            given = {"attention_mask": MASK[:, :stop], "past_key_values": by_hand}
            logits = ours(TEXTS[:, start:stop], **given).logits
        for number in range(6):
            said.append(logits[:, -1].argmax(dim=-1))
            if number < 5:
                logits = ours(said[-1][:, None], past_key_values=by_hand).logits
    assert torch.equal(found[:, 10:], torch.stack(said, dim=1))
    assert cache.kept_positions == by_hand.kept_positions


def test_chunks_on_a_continued_cache(ours):
    cache = poisoned(ours, 3)
    first = ours.generate(TEXTS, past_key_values=cache, max_new_tokens=4, **GREEDY)
    text = torch.cat((first, TEXTS), dim=1)
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
def test_the_number_of_rows_is_a_hint(both, hint, memory_bytes):
    ours, theirs = both
    cache = poisoned(ours, hint, memory_bytes=memory_bytes)
    found = ours.generate(TEXTS, past_key_values=cache, max_new_tokens=4, **GREEDY)
    assert torch.equal(found, theirs.generate(TEXTS, max_new_tokens=4, **GREEDY))
    assert cache.batch_size == cache.store.num_sequences == 3


def test_beams_on_a_second_turn(both):
    """They bring more rows than the cache has: each text goes on several times."""
    ours, theirs = both
    cache = poisoned(ours, 3)
    first = ours.generate(TEXTS, attention_mask=MASK, past_key_values=cache, max_new_tokens=5, **GREEDY)
    text, real = torch.cat((first, TEXTS[:, :4]), dim=1), torch.nn.functional.pad(MASK, (0, 9), value=1)
    beams = {"attention_mask": real, "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 7, **GREEDY}
    assert torch.equal(ours.generate(text, past_key_values=cache, **beams), theirs.generate(text, **beams))
    assert cache.batch_size == 9 and cache.seen_tokens.tolist() == [25] * 3 + [22] * 3 + [19] * 3
    assert_all_returned(cache)


@pytest.mark.parametrize("time", TIMES)
def test_the_score_of_a_beam_is_that_of_its_text_read_alone(ours, time):
    fold(ours, time)
    cache = poisoned(ours, 9)
    found = ours.generate(
        TEXTS, attention_mask=MASK, past_key_values=cache, max_new_tokens=12, num_beams=3, length_penalty=0.0,
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
