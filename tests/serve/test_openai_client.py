"""The official client, unchanged: what it sends is understood, what it gets it can read."""

import json

import openai
import pytest

from serving_kit import METHODS

MESSAGES = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"enum": [1, 2]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


def test_a_completion_is_the_engines_answer(client, server):
    ours = client.completions.create(model="tiny", prompt="hello", max_tokens=8, temperature=0)
    theirs = server.engine.generate([{"prompt": "hello", "max_tokens": 8, "temperature": 0}])[0]
    assert ours.choices[0].text == theirs.text and ours.id.startswith("cmpl-") and ours.model == "tiny"
    assert ours.usage.prompt_tokens == 5 and ours.usage.completion_tokens == len(theirs.token_ids)
    assert ours.usage.kvfold["seen_tokens"] == theirs.usage.seen_tokens and ours.usage.kvfold["kv_bytes"] > 0


def test_a_stream_is_the_same_answer_and_ends_with_its_usage(client):
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 12, "temperature": 0, "n": 2}
    whole = client.completions.create(**asked)
    texts, chunks = ["", ""], list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )  # fmt: skip
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [one.text for one in whole.choices] and len(chunks) > 6
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.kvfold == whole.usage.kvfold and all(one.usage is None for one in chunks[:-1])


def test_several_prompts_texts_or_token_ids(client):
    texts = client.completions.create(model="tiny", prompt=["ab", "cde"], max_tokens=4, temperature=0, n=2)
    ids = client.completions.create(
        model="tiny", prompt=[client_ids(client, "ab"), client_ids(client, "cde")], max_tokens=4, temperature=0, n=2
    )
    assert [one.index for one in texts.choices] == [0, 1, 2, 3] and texts.usage.prompt_tokens == 5
    assert [one.text for one in texts.choices] == [one.text for one in ids.choices]


def client_ids(client, text):
    url = str(client.base_url).removesuffix("/v1/") + "/tokenize"
    return client.post(url, body={"prompt": text}, cast_to=object)["tokens"]


def test_echo_and_log_probabilities_line_up(client):
    answer = client.completions.create(
        model="tiny",
        prompt="hello",
        max_tokens=3,
        temperature=0,
        logprobs=2,
        echo=True,
        extra_body={"ignore_eos": True},
    )
    choice = answer.choices[0]
    found = choice.logprobs
    assert choice.text.startswith("hello") and len(found.tokens) == 8
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert found.tokens[:5] == list("hello") and found.text_offset[:6] == [0, 1, 2, 3, 4, 5]
    for token, logprob, top in list(zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True))[1:]:
        assert logprob <= 0 and top[token] == logprob and len(top) <= 3
    scored = client.completions.create(
        model="tiny", prompt="hello", max_tokens=0, temperature=0, logprobs=2, echo=True
    ).choices[0]
    assert scored.text == "hello" and scored.logprobs.token_logprobs == found.token_logprobs[:5]
    streamed = client.completions.create(
        model="tiny", prompt="hello", max_tokens=3, temperature=0, logprobs=2, echo=True, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    offsets = [offset for chunk in streamed for offset in chunk.choices[0].logprobs.text_offset]
    assert offsets == found.text_offset


def test_chat_whole_and_streamed(client):
    asked = {
        "model": "alias",
        "messages": MESSAGES,
        "temperature": 0,
        "max_tokens": 10,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**asked)
    message = whole.choices[0].message
    assert whole.model == "alias" and message.role == "assistant" and message.tool_calls is None
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    one = whole.choices[0].logprobs.content[0]
    assert one.top_logprobs[0].logprob == one.logprob and one.bytes
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        for _ in stream:
            pass
        final = stream.current_completion_snapshot
    assert final.choices[0].message.content == message.content
    assert len(final.choices[0].logprobs.content) == len(whole.choices[0].logprobs.content)
    assert final.usage.completion_tokens == whole.usage.completion_tokens


def test_what_was_asked_before_is_not_read_again(client):
    messages = [{"role": "user", "content": "a long first message. " * 8}]
    for _ in range(2):  # the second shows where others may part from the first
        client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=4)
    again = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=4)
    assert again.usage.prompt_tokens_details.cached_tokens >= 64


def test_methods_by_request_and_what_they_kept(client):
    kept = {}
    for time in METHODS:
        answer = client.completions.create(
            model="tiny", prompt="hello " * 20, max_tokens=20, seed=1, extra_body={"kvfold": {"time": time}}
        )
        kept[time] = answer.usage.kvfold
        assert answer.usage.kvfold["seen_tokens"] == answer.usage.total_tokens - 1
    assert kept["full"]["compression"] == 1 and kept["h2o:16+16"]["kept_tokens"] == 32
    assert kept["dms:8"]["kept_tokens"] < kept["full"]["kept_tokens"]
    with pytest.raises(openai.BadRequestError, match="one of the methods loaded"):
        client.completions.create(model="tiny", prompt="a", extra_body={"kvfold": {"time": "window:3+1"}})
    with pytest.raises(openai.BadRequestError, match=r"kvfold\.tiem"):
        client.completions.create(model="tiny", prompt="a", extra_body={"kvfold": {"tiem": "full"}})


def test_seeds_stops_and_continued_messages(client):
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 24, "seed": 5}
    first, again = (client.chat.completions.create(**asked).choices[0].message.content for _ in range(2))
    assert first == again
    stop = first[4:6]
    assert client.chat.completions.create(**asked, stop=[stop]).choices[0].message.content == first.partition(stop)[0]
    continued = client.chat.completions.create(
        model="tiny", messages=[*MESSAGES, {"role": "assistant", "content": "I say"}], max_tokens=4, temperature=0,
        extra_body={"continue_final_message": True, "return_token_ids": True},
    )  # fmt: skip
    plain = client.completions.create(
        model="tiny",
        prompt=continued.prompt_token_ids,
        max_tokens=4,
        temperature=0,
        extra_body={"return_token_ids": True},
    )
    assert continued.choices[0].token_ids == plain.choices[0].token_ids


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_calls(client, choice, stream):
    asked = {
        "model": "tiny", "messages": MESSAGES, "tools": [WEATHER], "tool_choice": choice, "max_tokens": 200,
        "parallel_tool_calls": False, "seed": 3,
    }  # fmt: skip
    if stream:
        with client.chat.completions.stream(**asked) as events:
            names = {event.type for event in events}
            answer = events.get_final_completion().choices[0]
        assert "tool_calls.function.arguments.delta" in names
    else:
        answer = client.chat.completions.create(**asked).choices[0]
    call = answer.message.tool_calls[0]
    arguments = json.loads(call.function.arguments)
    assert call.id.startswith("call_") and call.function.name == "weather" and len(answer.message.tool_calls) == 1
    assert arguments["city"] in ("Oslo", "Rome") and arguments["days"] in (1, 2)
    assert answer.finish_reason == ("tool_calls" if choice == "required" else "stop")


def test_structured_answers(client):
    schema = {
        "type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"],
        "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=form, max_tokens=100)
    assert json.loads(answer.choices[0].message.content)["colour"] in ("red", "blue")
    chosen = client.completions.create(
        model="tiny", prompt="a", max_tokens=20, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
    )
    assert chosen.choices[0].text in ("yes", "no")
    with pytest.raises(openai.BadRequestError, match="structured output"):
        bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
        client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=bad)


def test_responses(client):
    whole = client.responses.create(model="tiny", input="hello", max_output_tokens=8, temperature=0)
    assert whole.status == "incomplete" and whole.usage.output_tokens == 8 and whole.output[0].type == "message"
    same = [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}]
    with client.responses.stream(model="tiny", input=same, max_output_tokens=8, temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response() if kinds[-1] == "response.completed" else None
    assert (
        kinds[0] == "response.created" and "response.output_text.delta" in kinds and kinds[-1] == "response.incomplete"
    )
    assert final is None
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, temperature=0)
    assert whole.output_text == chat.choices[0].message.content


def test_responses_say_the_form_that_was_asked_for(client):
    form = {"type": "json_schema", "name": "truth", "schema": {"type": "boolean"}}
    answer = client.responses.with_raw_response.create(
        model="tiny", input="hello", max_output_tokens=20, text={"format": form}
    )
    assert json.loads(answer.text)["text"]["format"]["schema"] == form["schema"]


def test_responses_call_functions(client):
    tool = {"type": "function", **WEATHER["function"]}
    tool["strict"] = True
    asked = {
        "model": "tiny",
        "input": "hello",
        "tools": [tool],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    answer = client.responses.create(**asked)
    call = answer.output[0]
    assert answer.status == "completed" and call.type == "function_call" and json.loads(call.arguments)["city"]
    with client.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_response().output[0]
    assert "response.function_call_arguments.delta" in kinds and json.loads(streamed.arguments)["days"] in (1, 2)
    following = client.responses.create(
        model="tiny", max_output_tokens=3,
        input=[
            {"role": "user", "content": "hello"}, call.model_dump(exclude_none=True),
            {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
        ],
    )  # fmt: skip
    assert 1 <= following.usage.output_tokens <= 3


def test_models_and_errors(client):
    assert [one.id for one in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").max_model_len == 512
    with pytest.raises(openai.NotFoundError, match="must be one of tiny, alias"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="a", temperature=-1)
    assert refused.value.param == "temperature" and refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="a " * 600)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="no embeddings"):
        client.embeddings.create(model="tiny", input="a")


@pytest.mark.parametrize(
    ("field", "value"), [("best_of", 3), ("suffix", "x"), ("use_beam_search", True), ("truncate_prompt_tokens", 4)]
)
def test_what_would_change_the_answer_is_refused_by_name(client, field, value):
    with pytest.raises(openai.BadRequestError, match=f"{field} is not supported") as refused:
        client.completions.create(model="tiny", prompt="a", extra_body={field: value})
    assert refused.value.param == field
    client.completions.create(model="tiny", prompt="a", max_tokens=1, extra_body={field: None, "something_new": 3})
