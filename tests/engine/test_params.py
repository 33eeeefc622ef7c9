"""Requests as people write them: OpenAI's and vLLM's names, and one line for each mistake."""

import pytest

from kvfold.engine.request import SamplingParams, parse_question


def test_a_text_and_token_ids_are_short_for_a_prompt():
    assert parse_question("hello").prompt == "hello" and parse_question([1, 2]).prompt == (1, 2)
    assert parse_question({"prompt": "hello"}).params == SamplingParams()


def test_spellings_of_openai_and_vllm():
    asked = {
        "messages": [{"role": "user", "content": "hi"}], "model": "any", "user": "me", "max_completion_tokens": 5, "stop": "x",
        "logit_bias": {"7": 2}, "logprobs": True, "bad_words": ["a", [3, 4]], "time": "full", "priority": -1, "timeout": 2,
        "response_format": {"type": "json_object"}, "temperature": None,
    }  # fmt: skip
    question = parse_question(asked)
    params = question.params
    assert (params.max_tokens, params.stop, params.logit_bias) == (5, ("x",), ((7, 2.0),))
    assert params.logprobs == 0 and params.bad_words == ("a", (3, 4)) and params.temperature == 1.0
    assert params.structured == ("json", '{"type": "object"}')
    assert (question.time, question.priority, question.timeout) == ("full", -1, 2)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"prompt": ""}, "prompt must have 1 token or more, got none"),
        ([], "prompt must have 1 token or more, got none"),
        ({}, "a request must have a prompt or messages"),
        ({"prompt": "a", "messages": [{}]}, "a request must have a prompt or messages"),
        ({"messages": []}, "messages must be a list of 1 or more"),
        ({"prompt": [1, -2]}, "prompt must hold token ids, whole numbers from 0, got -2"),
        ({"prompt": "a", "temprature": 1}, "unknown field 'temprature' .did you mean 'temperature'"),
        ({"prompt": "a", "temperature": -0.5}, "temperature must be at least 0, got -0.5"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature must be a number, got NaN"),
        ({"prompt": "a", "temperature": True}, "temperature must be a number, got true"),
        ({"prompt": "a", "top_p": 0}, "top_p must be more than 0 and at most 1, got 0"),
        ({"prompt": "a", "top_k": 1.5}, "top_k must be a whole number, got 1.5"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"prompt": "a", "min_tokens": 20}, "min_tokens must be at most max_tokens .16., got 20"),
        ({"prompt": "a", "n": 0}, "n must be at least 1 and at most 128, got 0"),
        ({"prompt": "a", "stop": [""]}, "stop and bad_words must hold texts of 1 character or more"),
        ({"prompt": "a", "stop": 3}, "stop must be a text or a list of texts, got 3"),
        ({"prompt": "a", "bad_words": [["x"]]}, "bad_words must hold token ids"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias must map token ids to numbers"),
        ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias must give tokens from 0 at least -100 and at most 100"),
        ({"prompt": "a", "allowed_token_ids": []}, "allowed_token_ids must name 1 token or more"),
        ({"prompt": "a", "ignore_eos": "yes"}, "ignore_eos must be true or false"),
        ({"prompt": "a", "timeout": 0}, "timeout must be more than 0, got 0"),
        ({"prompt": "a", "time": 3}, "time must be a method's text form"),
        ({"prompt": "a", "structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs must have one of"),
        ({"prompt": "a", "structured_outputs": 3}, "structured_outputs must have one of"),
        ({"prompt": "a", "structured_outputs": {"choice": []}}, "choice must be a list"),
        ({"prompt": "a", "response_format": {"type": "xml"}}, "response_format must be of type"),
        (7, "a request must be a text, token ids or an object, got int"),
    ],
)
def test_mistakes_are_one_line(asked, said):
    with pytest.raises(ValueError, match=said) as found:
        parse_question(asked)
    assert "\n" not in str(found.value)
