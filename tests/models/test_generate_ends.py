"""`generate` where some rows end before others: what they are padded with never reaches the store."""

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from model_driver import CLOSE, GREEDY, MASK, TEXTS, TIMES, fold, kept_by, poisoned, step


@pytest.fixture
def end_token(ours) -> int:
    """A token that the first row says early, and the others don't."""
    return end_token_of(ours, MASK)


def end_token_of(ours, mask) -> int:
    said = ours.generate(TEXTS, attention_mask=mask, max_new_tokens=12, **GREEDY)[:, 10:]
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
def test_padding_after_the_end_of_a_row_never_reaches_the_store(ours, time, pad, padded):
    mask = MASK if padded else torch.ones_like(MASK)
    end = end_token_of(ours, mask)
    options = {"eos_token_id": end, "pad_token_id": end if pad == "the end token" else 0}
    said, cache = generate_folded(ours, time, TEXTS, mask, **options)
    fed, more = [], TEXTS[:, :5].flip(1)
    for row in range(3):
        real = TEXTS[row : row + 1, mask[row].bool()]
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
def test_rows_that_end_early_equal_transformers(both, pad, end_token):
    ours, theirs = both
    options = {"eos_token_id": end_token, "pad_token_id": end_token if pad == "the end token" else 0}
    options |= {"attention_mask": MASK, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(ours.generate(TEXTS, **options), theirs.generate(TEXTS, **options))


@pytest.mark.parametrize("time", TIMES)
def test_a_turn_after_rows_that_ended(ours, time, end_token):
    """The whole text passed again, with the padding in its middle marked as such."""
    options = {"eos_token_id": end_token, "pad_token_id": 0}
    said, cache = generate_folded(ours, time, TEXTS, MASK, **options)
    ended = (said == end_token).cumsum(dim=1) - (said == end_token).long() > 0
    text = torch.cat((TEXTS, said, TEXTS[:, :3]), dim=1)
    real = torch.cat((MASK, (~ended).long(), torch.ones(3, 3, dtype=torch.long)), dim=1)
    given = {"past_key_values": cache, "max_new_tokens": 5, **GREEDY}
    second = ours.generate(text, attention_mask=real, **given)[:, text.shape[1] :]
    for row in range(3):
        ids = TEXTS[row : row + 1, MASK[row].bool()]
        alone, single = generate_folded(ours, time, ids, torch.ones_like(ids), **options)
        spoken = alone.shape[1] < said.shape[1]
        if spoken:
            step(ours, single, end_token)
        new = TEXTS[row : row + 1, :3] if spoken else torch.cat((alone[:, -1:], TEXTS[row : row + 1, :3]), dim=1)
        whole = torch.ones(1, single.columns + new.shape[1], dtype=torch.long)
        out = ours.generate(new, attention_mask=whole, past_key_values=single, max_new_tokens=5, **GREEDY)
        assert second[row].tolist() == out[0, new.shape[1] :].tolist()
        assert kept_by(cache, row) == kept_by(single, 0)


class FirstRowStops(StoppingCriteria):
    """After three tokens, whatever they are."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= 13, *[False] * (len(input_ids) - 1)])


@pytest.mark.parametrize("time", TIMES)
def test_a_row_that_another_rule_stops(ours, time):
    """Its padding is known too, and the model's own words are not taken for padding."""
    rule = {"stopping_criteria": StoppingCriteriaList([FirstRowStops()]), "eos_token_id": 96, "pad_token_id": 0}
    said, cache = generate_folded(ours, time, TEXTS, MASK, **rule)
    free, alone = generate_folded(ours, time, TEXTS, MASK, eos_token_id=96, pad_token_id=0)
    assert torch.equal(said[1:], free[1:]) and said[0].tolist() == free[0, :3].tolist() + [0] * 9
    assert cache.seen_tokens.tolist() == [13, 18, 15] and alone.seen_tokens.tolist() == [21, 18, 15]
    assert [kept_by(cache, row) for row in (1, 2)] == [kept_by(alone, row) for row in (1, 2)]


@pytest.mark.parametrize("end", [None, 96])
def test_a_word_that_is_the_padding_token_is_no_padding(both, end):
    """Untrained models repeat themselves, so some row says the token that is chosen here many times."""
    ours, theirs = both
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": end}
    said = theirs.generate(TEXTS, pad_token_id=0, **options)[:, 10:]
    pairs = said[:, 1:][said[:, 1:] == said[:, :-1]]
    assert pairs.numel(), "a token said twice in a row"
    cache = poisoned(ours, 3)
    found = ours.generate(TEXTS, pad_token_id=int(pairs[0]), past_key_values=cache, **options)
    assert torch.equal(found[:, 10:], said) and cache.seen_tokens.tolist() == [21] * 3
