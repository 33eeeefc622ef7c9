import pytest
import torch

from kvfold.eval.reading import score_answers

METHODS = ["full", "window:8+2", "h2o:6+6", "h2o:25%+25%", "tova:12", "tova:50%"]


@pytest.fixture(scope="module")
def pairs() -> list[tuple[list[int], list[int]]]:
    """Prompts of several lengths, one with answers of one and more tokens, one that is a single token."""
    draw = torch.Generator().manual_seed(3)
    shared, *others = (torch.randint(0, 250, (length,), generator=draw).tolist() for length in (20, 9, 30, 1))
    answers = [torch.randint(0, 250, (length,), generator=draw).tolist() for length in (5, 1, 3, 8, 1, 25)]
    return list(zip([shared, shared, shared, *others], answers, strict=True))


def one_token_a_call(model, layout, prompt, answer) -> tuple[float, bool, int, float]:
    """The slow twin: one row, one token a call, logits of the whole model."""
    ids, total, greedy = [*prompt, *answer], 0.0, True
    with torch.no_grad():
        cache = model.new_cache(rows=1, time=layout.time_text())
        for index, token in enumerate(ids[:-1]):
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
            if index >= len(prompt) - 1:
                total += float(torch.log_softmax(logits, dim=-1)[ids[index + 1]])
                greedy &= int(logits.argmax()) == ids[index + 1]
        kept = float(cache.kept_tokens.float().mean())
    return total, greedy, len(ids) - 1, kept / (len(ids) - 1)


@pytest.mark.parametrize("method", METHODS)
def test_answers_are_scored_as_one_token_a_call_alone(model, pairs, method):
    layout = model.config.layout.with_time(method)
    expected = [one_token_a_call(model, layout, prompt, answer) for prompt, answer in pairs]
    for rows in (2, 32):
        for found, (log_likelihood, greedy, seen, share) in zip(
            score_answers(model, layout, pairs, rows=rows), expected, strict=True
        ):
            assert found.log_likelihood == pytest.approx(log_likelihood, abs=1e-4)
            assert (found.is_greedy, found.seen_tokens) == (greedy, seen)
            assert found.kept_share == pytest.approx(share)


def test_the_likeliest_answer_is_greedy(model, pairs):
    prompt, answer = pairs[0][0], []
    with torch.no_grad():
        for _ in range(4):
            answer.append(int(model(torch.tensor([[*prompt, *answer]])).logits[0, -1].argmax()))
    wrong = [*answer[:-1], (answer[-1] + 1) % 250]
    layout = model.config.layout
    assert [one.is_greedy for one in score_answers(model, layout, [(prompt, answer), (prompt, wrong)])] == [True, False]


def test_a_prompt_that_answers_share_is_read_once(model, pairs, monkeypatch):
    fed, forward = [], model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda ids, **more: fed.append(ids.shape) or forward(ids, **more))
    score_answers(model, model.config.layout.with_time("tova:50%"), pairs[:3])
    assert fed == [(1, 1)] * 20 + [(2, 1)] * 4


@pytest.mark.parametrize("wide", ["window:60+4", "h2o:40+40", "tova:64"])
def test_budgets_beyond_the_length_change_nothing(model, pairs, wide):
    full, folded_ = (score_answers(model, model.config.layout.with_time(one), pairs) for one in ("full", wide))
    assert [one.log_likelihood for one in folded_] == pytest.approx([one.log_likelihood for one in full], abs=1e-4)
    assert {one.kept_share for one in folded_} == {1.0}


def test_an_empty_prompt_or_answer_is_refused(model):
    for pair in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="give 1 or more of each"):
            score_answers(model, model.config.layout, [([1], [2]), pair])


def test_reading_is_reported_to_its_end(model, pairs):
    heard = []
    score_answers(
        model,
        model.config.layout.with_time("tova:50%"),
        pairs,
        rows=2,
        what="x",
        report=lambda *said: heard.append(said),
    )
    totals = {total for _, _, total in heard}
    assert len(totals) == 1 and heard[-1] == ("x", *totals, *totals)
    assert [done for _, done, _ in heard] == sorted(done for _, done, _ in heard)
