import pytest
import torch

from byte_tokenizer import BOS, byte_tokenizer
from kvfold.eval import passkey
from kvfold.eval.passkey import continuations, measure_passkey, passkey_prompt
from tiny_model import tiny_model

LENGTH = 300


@pytest.fixture(scope="module")
def long_model():
    return tiny_model(max_position_embeddings=512)


def test_a_prompt_holds_the_key_at_its_depth_and_asks_for_it(tokenizer):
    for depth, low, high in ((0.0, 0.0, 0.3), (0.5, 0.3, 0.7), (1.0, 0.6, 1.0)):
        ids = passkey_prompt(tokenizer, "48213", 1000, depth)
        text = tokenizer.decode(ids)
        assert 900 < len(ids) <= 1000
        assert text.count("48213") == 2
        assert low <= text.index("48213") / len(text) <= high
        assert text.endswith("is")
        assert not text[-30:].count("48213")


def test_a_prompt_opens_as_the_tokenizer_opens_texts():
    ids = passkey_prompt(byte_tokenizer(adds_bos=True), "48213", 500, 0.5)
    assert ids[0] == BOS
    assert BOS not in ids[1:]


def test_prompts_that_do_not_fit_are_refused(long_model, tokenizer):
    with pytest.raises(ValueError, match="passkey prompt of 100 tokens: the shortest has"):
        measure_passkey(long_model, tokenizer, [], name="tiny", lengths=[100])
    with pytest.raises(ValueError, match="the model reads 512 at most"):
        measure_passkey(long_model, tokenizer, [], name="tiny", lengths=[513])


@pytest.mark.parametrize("method", ["full", "window:8+2", "h2o:6+6", "tova:12", "tova:50%"])
def test_rows_of_several_lengths_read_as_each_alone(model, method):
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 250, (length,), generator=draw).tolist() for length in (31, 17, 24)]
    layout = model.config.layout.with_time(method)
    together = continuations(model, layout, prompts, 6, what="")
    assert together == [continuations(model, layout, [prompt], 6, what="")[0] for prompt in prompts]


@pytest.mark.parametrize("method", ["full", "h2o:6+6", "tova:12"])
def test_continuations_are_those_of_one_token_a_call(model, method):
    prompt = list(range(40, 70))
    layout, fed = model.config.layout.with_time(method), list(prompt)
    with torch.no_grad():
        cache = model.new_cache(rows=1, time=layout.time_text())
        for index in range(len(prompt) + 5):
            logits = model(torch.tensor([[fed[index]]]), past_key_values=cache).logits
            if index >= len(prompt) - 1:
                fed.append(int(logits[0, -1].argmax()))
    assert continuations(model, layout, [prompt], 6, what="") == [fed[len(prompt) :]]


def answering(monkeypatch, answers: dict[str, str], tokenizer) -> None:
    """Let a model stand in that answers every prompt by the key in it, or by what `answers` says instead."""

    def told(model, layout, prompts, new_tokens, **kwargs):
        said = []
        for prompt in prompts:
            key = tokenizer.decode(prompt).partition("secret number is ")[2][:5]
            said.append(tokenizer(answers.get(layout.time_text(), " {key}.").format(key=key)).input_ids[:new_tokens])
        return said

    monkeypatch.setattr(passkey, "continuations", told)


def test_rows_count_the_keys_found_at_each_length_and_depth(long_model, tokenizer, monkeypatch):
    answering(monkeypatch, {"tova:4": " I can't say"}, tokenizer)
    rows = measure_passkey(
        long_model, tokenizer, ["tova:4"], name="tiny", lengths=[300, 400], depths=[0.1, 0.9], tries=3
    )
    assert [tuple(row.values())[:-2] for row in rows] == [
        (method, length, depth, found, 3)
        for method, found in (("full", 3), ("tova:4", 0))
        for length in (300, 400)
        for depth in (0.1, 0.9)
    ]
    assert list(rows[0]) == ["method", "length_tokens", "depth", "found", "tries", "seconds", "made"]


@pytest.mark.parametrize(
    ("answer", "found"),
    [(" {key}", 2), (": {key}!", 2), ("{key}1", 0), (" 1{key}", 0), (" 12 {key}", 0), ("", 0), (" no number", 0)],
)
def test_an_answer_counts_if_its_first_number_is_the_key(long_model, tokenizer, monkeypatch, answer, found):
    answering(monkeypatch, {"full": answer}, tokenizer)
    rows = measure_passkey(long_model, tokenizer, [], name="tiny", lengths=[LENGTH], depths=[0.5], tries=2)
    assert rows[0]["found"] == found


def test_finished_lengths_are_not_asked_again(long_model, tokenizer, monkeypatch, tmp_path):
    settings = {"name": "tiny", "depths": [0.5], "tries": 1, "cells": tmp_path}
    answering(monkeypatch, {}, tokenizer)
    first = measure_passkey(long_model, tokenizer, ["tova:4"], lengths=[LENGTH], **settings)
    asked = []
    answering(monkeypatch, {}, tokenizer)
    monkeypatch.setattr(passkey, "_found", lambda *args: asked.append(args[5]) or {"found": [0], "seconds": 0.0})
    again = measure_passkey(long_model, tokenizer, ["tova:4"], lengths=[LENGTH, LENGTH + 50], **settings)
    assert asked == [f"passkey {LENGTH + 50}, {method}" for method in ("full", "tova:4")]
    assert [row for row in again if row["length_tokens"] == LENGTH] == first


def test_the_keys_are_the_same_for_every_method_and_differ_by_seed(long_model, tokenizer, monkeypatch):
    asked = []

    def noted(model, layout, prompts, new_tokens, **kwargs):
        asked.append(prompts)
        return [[] for _ in prompts]

    monkeypatch.setattr(passkey, "continuations", noted)
    measure_passkey(long_model, tokenizer, ["tova:4"], name="tiny", lengths=[LENGTH])
    measure_passkey(long_model, tokenizer, [], name="tiny", lengths=[LENGTH], seed=1)
    assert asked[0] == asked[1] != asked[2]
