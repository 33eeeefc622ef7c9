"""What clients send, from the bytes of a request to checked fields: OpenAI's and vLLM's names, which of them the engine gets, and
which are refused.

Ranges are the engine's business (`kvfold.engine.request`); here is what a field may look like at all. A field that nobody
knows is ignored, as OpenAI's servers do; one that would change the answer and can't be honoured is an error. So is an
answer's form whose grammar takes too long to compile: the time grows with the square of a schema's size.
"""

import asyncio
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError
from pydantic_core import from_json

from kvfold.serve.replies import ApiError, invalid, unsupported

MAX_STOPS = 64
MAX_TOOLS = 128

Int = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
"""A whole number is one too; a text or a truth value is none."""
Texts = Annotated[list[Annotated[str, Field(max_length=4096)]], Field(max_length=MAX_STOPS)]
TokenIds = Annotated[list[Annotated[int, Strict(), Field(ge=0)]], Field(max_length=8192)]

_NEUTRAL: tuple[Any, ...] = (None, False, 0, [], {}, "")
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    name: (neutral, remedy)
    for names, neutral, remedy in (
        ("best_of", (None, 1), "ask for n answers and choose"),
        ("suffix", _NEUTRAL, "write what follows into the prompt"),
        ("use_beam_search", _NEUTRAL, "sample instead"),
        ("length_penalty", (None, 1, 1.0), "it belongs to beam search"),
        ("audio", _NEUTRAL, "this model writes text"),
        ("modalities", (None, ["text"], []), "this model writes text"),
        ("functions", _NEUTRAL, "use tools"),
        ("function_call", (None, "none", "auto"), "use tool_choice"),
        ("web_search_options max_tool_calls", (None,), "the server has no tools of its own"),
        ("moderation", _NEUTRAL, "the server moderates nothing"),
        ("logits_processors", _NEUTRAL, "use logit_bias, bad_words or structured_outputs"),
        ("truncate_prompt_tokens", (None,), "shorten the prompt"),
        ("prompt_embeds", _NEUTRAL, "send text or token ids"),
        ("chat_template", (None,), "start the server with --chat-template"),
        ("cache_salt", (None,), "stored prefixes are shared by all who may ask"),
        ("kv_transfer_params", _NEUTRAL, "one engine serves the whole request"),
        ("repetition_detection", _NEUTRAL, "use repetition_penalty"),
        ("thinking_token_budget", (None,), "use max_tokens"),
        ("guided_json guided_regex guided_choice guided_grammar structural_tag", (None,), "use structured_outputs"),
        ("previous_response_id conversation", (None,), "the server keeps no conversations: send the whole input"),
        ("background", (None, False), "stream the answer"),
        ("truncation", (None, "disabled"), "shorten the input"),
        ("encoding_format", (None, "float"), "this model gives no embeddings"),
    )
    for name in names.split()
}
"""By field: the values that change nothing, and what to do instead."""


class KvfoldFields(BaseModel):
    """What only kvfold knows."""

    model_config = ConfigDict(extra="forbid")

    time: str | None = Field(None, description="Text form of one of the methods that the server has loaded.")


class StreamOptions(BaseModel):
    """What a stream carries besides the answer."""

    include_usage: bool | None = Field(None, description="End the stream with the usage.")
    continuous_usage_stats: bool | None = Field(None, description="Put the usage so far into every chunk.")


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = Field(None, description="One of the names under /v1/models; none = the first.")


class Base(_Body):
    """Fields of every request for an answer."""

    stream: bool | None = Field(None, description="Send the answer as it is made, as server-sent events.")
    temperature: Number | None = Field(None, description="0 = the likeliest token.")
    top_p: Number | None = Field(
        None, description="Draw from the likeliest tokens that together have this probability."
    )
    top_k: Int | None = Field(None, description="Draw from the k likeliest tokens; 0 or -1 = from all.")
    min_p: Number | None = Field(
        None, description="Draw from tokens with this share of the likeliest one's probability."
    )
    presence_penalty: Number | None = Field(None, description="Subtracted from the logit of tokens generated before.")
    frequency_penalty: Number | None = Field(None, description="Subtracted once for each time a token was generated.")
    repetition_penalty: Number | None = Field(None, description="Divides logits of tokens in the prompt or the answer.")
    logit_bias: dict[str, Number] | None = Field(None, max_length=1024, description="Added to the logits of these ids.")
    allowed_token_ids: TokenIds | None = Field(None, description="The only tokens that may be drawn.")
    bad_words: Texts | None = Field(None, description="Texts that the answer must not contain.")
    stop: str | Texts | None = Field(None, description="Strings that end the answer.")
    stop_token_ids: TokenIds | None = Field(None, description="Tokens that end the answer.")
    include_stop_str_in_output: bool | None = Field(None, description="Leave the stop string in the text.")
    ignore_eos: bool | None = Field(None, description="Go on after the model's end tokens.")
    skip_special_tokens: bool | None = Field(None, description="Leave end tokens and their like out of the text.")
    min_tokens: Int | None = Field(None, description="Tokens before which nothing ends the answer.")
    seed: Int | None = Field(None, description="The same seed draws the same answer.")
    n: Int | None = Field(None, description="Answers to one prompt.")
    prompt_logprobs: Int | None = Field(None, description="Log probabilities of the prompt's tokens.")
    response_format: dict[str, Any] | None = Field(None, description="text, json_object or json_schema.")
    structured_outputs: dict[str, Any] | None = Field(None, description="json, regex, choice, grammar or json_object.")
    priority: Int | None = Field(None, description="Lower ones run first.")
    stream_options: StreamOptions | None = None
    request_id: str | None = Field(None, max_length=128, description="A name for the request; default: X-Request-Id.")
    return_token_ids: bool | None = Field(None, description="Give the ids of prompt and answer too.")
    return_tokens_as_token_ids: bool | None = Field(
        None, description="Write tokens in log probabilities as token_id:7."
    )
    kvfold: KvfoldFields | None = Field(None, description="What only kvfold knows: the method of this request.")

    def refuse_unsupported(self) -> None:
        """Raise `ApiError` for a field that would change the answer and can't be honoured."""
        for name, value in (self.model_extra or {}).items():
            neutral, remedy = _REFUSED.get(name, ((value,), ""))
            if not any(value == one and type(value) is type(one) for one in neutral):
                raise unsupported(name, remedy)

    def sampling(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The engine's fields, `defaults` where this request is silent."""
        passed = {*Base.model_fields, "max_tokens"} - _NOT_THE_ENGINES
        asked = {name: value for name in passed if (value := getattr(self, name, None)) is not None}
        time = self.kvfold.time if self.kvfold else None
        return {**defaults, **asked} | ({} if time is None else {"time": time})


_NOT_THE_ENGINES = {
    "model", "stream", "stream_options", "request_id", "return_token_ids", "return_tokens_as_token_ids", "kvfold",
}  # fmt: skip


class CompletionRequest(Base):
    """Body of /v1/completions."""

    prompt: Any = Field(
        None, description="A text, token ids, or a list of either.",
        json_schema_extra={
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        },
    )  # fmt: skip
    max_tokens: Int | None = Field(None, description="Tokens of the answer at most; default 16.")
    logprobs: Int | None = Field(None, description="Log probabilities of the chosen and of so many likeliest tokens.")
    echo: bool | None = Field(None, description="Begin the answer with the prompt.")
    add_special_tokens: bool | None = Field(None, description="Add the tokenizer's own special tokens; default true.")


class _Chat(Base):
    """What both APIs for chats have."""

    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS, description="Functions the model may call.")
    tool_choice: str | dict[str, Any] | None = Field(None, description="auto, none, required, or one function.")
    parallel_tool_calls: bool | None = Field(None, description="Whether several calls may come in one answer.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="More variables for the chat template.")
    top_logprobs: Int | None = Field(None, description="Of so many likeliest tokens at each position.")


class ChatRequest(_Chat):
    """Body of /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=4096, description="The conversation so far.")
    max_tokens: Int | None = Field(None, description="Tokens of the answer at most; default: all that fit.")
    max_completion_tokens: Int | None = Field(None, description="OpenAI's newer name of max_tokens.")
    logprobs: bool | None = Field(None, description="Give log probabilities.")
    documents: list[dict[str, Any]] | None = Field(None, max_length=256, description="For templates that read them.")
    reasoning_effort: str | None = Field(None, max_length=32, description="For templates that read it.")
    add_generation_prompt: bool | None = Field(None, description="Open the assistant's turn; default true.")
    continue_final_message: bool | None = Field(None, description="Go on with the last message instead.")
    add_special_tokens: bool | None = Field(None, description="On top of the template's; default false.")
    echo: Literal[False] | None = None

    def sampling(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """See `Base`."""
        values = super().sampling(defaults)
        if self.max_completion_tokens is not None:
            values["max_tokens"] = self.max_completion_tokens
        return values


class ResponsesRequest(_Chat):
    """Body of /v1/responses. Nothing is stored: each request carries the whole conversation."""

    input: str | list[dict[str, Any]] = Field(description="A text, or the items of the conversation so far.")
    instructions: str | None = Field(None, description="What a system message would say.")
    max_output_tokens: Int | None = Field(None, description="Tokens of the answer at most; default: all that fit.")
    text: dict[str, Any] | None = Field(None, description="format: text, json_object or json_schema.")
    reasoning: dict[str, Any] | None = Field(None, description="effort, for templates that read it.")
    include: list[str] | None = Field(None, max_length=32)
    metadata: dict[str, Any] | None = None


class TokenizeRequest(_Body):
    """Body of /tokenize: a prompt, or messages."""

    prompt: str | None = Field(None, description="The text.")
    messages: list[dict[str, Any]] | None = Field(None, min_length=1, max_length=4096)
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    add_special_tokens: bool | None = Field(None, description="Default true for a prompt, false for messages.")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = Field(None, max_length=256)
    reasoning_effort: str | None = Field(None, max_length=32)
    return_token_strs: bool | None = Field(None, description="Give the tokens as texts too.")


class DetokenizeRequest(_Body):
    """Body of /detokenize."""

    tokens: Any = Field(
        description="Token ids.", json_schema_extra={"type": "array", "items": {"type": "integer", "minimum": 0}}
    )


MAX_DEPTH = 64
"""Levels of lists and objects in a body."""
LONG_BYTES = 1 << 16
"""Bodies from this size on are parsed on a thread of their own: other clients' streams go on meanwhile."""
MAX_INTEGER = 2**64
"""No field needs a larger whole number."""

Fields = TypeVar("Fields", bound=BaseModel)


async def read(request: Request, kind: type[Fields], timeout_s: float) -> Fields:
    """The body as fields. Raises `ApiError` for one that is no JSON, too deep, too slow to arrive, or of the wrong form."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A page of another origin can send text or forms to a server on this machine, but no JSON, without being let in first.
    if media != "application/json" and not media.endswith("+json"):
        raise ApiError(415, f"content-type must be application/json, got {media[:80] or 'none'}")
    try:
        async with asyncio.timeout(timeout_s):
            body = await request.body()
    except TimeoutError:
        message = f"the body must arrive within {timeout_s:g} seconds"
        raise ApiError(408, message, headers={"Connection": "close"}) from None
    return await asyncio.to_thread(_fields, body, kind) if len(body) > LONG_BYTES else _fields(body, kind)


def _fields(body: bytes, kind: type[Fields]) -> Fields:
    """Checked fields from JSON."""
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body must be valid JSON in UTF-8: {error}") from None
    if not isinstance(data, dict):
        raise ApiError(400, f"the body must be a JSON object, got {type(data).__name__}")
    _check(data)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        parts = [str(part) for part in first["loc"]]
        place = ".".join(part for part in parts if not part.startswith(("list[", "str", "constrained")))
        what = " is missing" if first["type"] == "missing" else f": {first['msg'][:1].lower()}{first['msg'][1:]}"
        raise invalid(place.partition(".")[0], place + what) from None


def _check(data: dict[str, Any] | list[Any], depth: int = 1) -> None:
    """Refuse what would only fail further in: deep nesting, numbers that no field needs."""
    if depth > MAX_DEPTH:
        raise ApiError(400, f"the body must be nested at most {MAX_DEPTH} deep")
    values = data.values() if isinstance(data, dict) else data
    kinds = set(map(type, values))  # a list of a million ids is looked at without a loop of Python's
    if int in kinds:
        numbers = [value for value in values if type(value) is int]
        if not -MAX_INTEGER < min(numbers) <= max(numbers) < MAX_INTEGER:
            raise ApiError(400, "numbers must be smaller than 2^64 in magnitude, got a larger one")
    if float in kinds and any(type(value) is float and math.isinf(value) for value in values):
        raise ApiError(400, "numbers must fit into double precision, got a larger one")
    for value in values if kinds & {dict, list} else ():
        if isinstance(value, dict | list):
            _check(value, depth + 1)


MAX_CHARACTERS = 128 << 10
"""Of a schema, a regex, a grammar or a list of choices."""
MAX_PROPERTIES = 1000
"""Of all objects of a schema together; a thousand compile in a quarter of a second."""
MAX_PATTERN_CHARACTERS = 16 << 10
"""Of a regex or a grammar."""


def check_structured(asked: Mapping[str, Any]) -> None:
    """Raise `ApiError` where an engine's request asks for an answer that takes too long to prepare."""
    outputs = asked.get("structured_outputs")
    forms = {f"structured_outputs.{kind}": form for kind, form in (outputs or {}).items()}
    for field, form in (forms | {"response_format": asked.get("response_format")}).items():
        param, _, kind = field.partition(".")
        text = form if isinstance(form, str) else json.dumps(form)
        most = MAX_PATTERN_CHARACTERS if kind in ("regex", "grammar") else MAX_CHARACTERS
        if len(text) > most:
            raise invalid(param, f"{field} must have at most {most} characters, got {len(text)}")
        # A name is followed by a colon: at most so many properties, without reading the schema.
        number = _num_properties(text) if text.count(":") > MAX_PROPERTIES else 0
        if number > MAX_PROPERTIES:
            raise invalid(param, f"{field} must have at most {MAX_PROPERTIES} properties, got {number}")


def _num_properties(text: str) -> int:
    try:
        number, open_ones = 0, [json.loads(text)]
    except (ValueError, RecursionError):
        return 0  # no JSON: the engine says so
    while open_ones:
        one = open_ones.pop()
        if isinstance(one, dict):
            named = (one.get(key) for key in ("properties", "patternProperties", "$defs", "definitions"))
            number += sum(len(found) for found in named if isinstance(found, dict))
            open_ones += one.values()
        elif isinstance(one, list):
            open_ones += one
    return number
