"""A request: what a caller asks for, checked in one place under OpenAI's and vLLM's names, every mistake in one line; and its
life inside the engine: its tokens, its sequence in the store, how far it was read, how it ended. No torch.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from json import dumps
from typing import Any, Literal

from kvfold.errors import UserError, unknown_name

_RANGES: dict[str, tuple[float, float, str]] = {
    "max_tokens": (1, math.inf, "64"),
    "min_tokens": (0, math.inf, "0"),
    "temperature": (0, math.inf, "0.7"),
    "top_k": (-1, math.inf, "40, or 0 for all tokens"),
    "top_p": (0, 1, "0.9"),
    "min_p": (0, 1, "0.05"),
    "presence_penalty": (-2, 2, "0.5"),
    "frequency_penalty": (-2, 2, "0.5"),
    "repetition_penalty": (0, math.inf, "1.1"),
    "seed": (-(2**63), 2**64 - 1, "7"),
    "n": (1, 128, "1"),
    "logprobs": (0, 1000, "5"),
    "prompt_logprobs": (0, 1000, "5"),
    "timeout": (0, math.inf, "30"),
    "priority": (-(2**31), 2**31, "0"),
}
"""Least, most and an example of each number."""
_POSITIVE = {"top_p", "repetition_penalty", "timeout"}
"""Numbers that may not be 0."""
_WHOLE = {"max_tokens", "min_tokens", "top_k", "seed", "n", "logprobs", "prompt_logprobs", "priority"}
MOST_STOP_CHARACTERS = 4096
"""Of one stop string: text that may be its beginning is held back from whoever reads along."""
_STRUCTURED = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How a request's tokens are chosen, and when they end."""

    max_tokens: int | None = 16
    """Tokens to generate at most; None = as many as the context and the memory allow."""
    min_tokens: int = 0
    """Tokens before which no end token and no stop string ends the answer."""
    temperature: float = 1.0
    """0 = the likeliest token."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0 or -1 = from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Draw from tokens with at least this share of the likeliest one's probability."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token generated before."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time that a token was generated before."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the answer."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of these tokens."""
    allowed_token_ids: tuple[int, ...] | None = None
    """The only tokens that may be drawn."""
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    """Texts, or runs of token ids, that the answer must not contain."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer besides the model's own end tokens."""
    include_stop_str_in_output: bool = False
    """Leave the stop string in the text."""
    ignore_eos: bool = False
    """Go on after the model's end tokens."""
    seed: int | None = None
    """Draws depend on it and the token's index alone; None = a fresh one each time."""
    n: int = 1
    """Answers to one prompt."""
    logprobs: int | None = None
    """Log probabilities of the chosen and of so many likeliest tokens, before penalties and temperature."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    structured: tuple[str, str] | None = None
    """Kind (`json`, `regex`, `grammar`) and text of what the answer must match."""
    skip_special_tokens: bool = True
    """Leave end tokens and their like out of the text."""

    def __post_init__(self) -> None:
        for name in _RANGES:
            if hasattr(self, name):
                check_number(name, getattr(self, name))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UserError(f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}")
        if any(not text for text in self.stop) or any(not word for word in self.bad_words):
            raise UserError("stop and bad_words must hold texts of 1 character or more, got an empty one: leave it out")
        longest = max(map(len, self.stop), default=0)
        if longest > MOST_STOP_CHARACTERS:
            raise UserError(
                f"stop must hold texts of at most {MOST_STOP_CHARACTERS:,} characters, got one of {longest:,}: "
                "give the first words that end an answer"
            )
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise UserError("allowed_token_ids must name 1 token or more, got none: leave it out")


def check_number(name: str, value: Any) -> None:
    """Raise `UserError` where a number is none, or out of its range."""
    least, most, example = _RANGES[name]
    if value is None:
        if name in ("max_tokens", "seed", "logprobs", "prompt_logprobs", "timeout"):
            return
        raise UserError(f"{name} must be a number, got null (for example {example})")
    kinds, kind = ((int,), "a whole number") if name in _WHOLE else ((int, float), "a number")
    if isinstance(value, bool) or not isinstance(value, kinds) or value != value:
        raise UserError(f"{name} must be {kind}, got {dumps(value, default=str)} (for example {example})")
    too_low = value <= 0 if name in _POSITIVE else value < least
    if too_low or value > most or math.isinf(value):
        low = f"more than {least}" if name in _POSITIVE else f"at least {least}"
        high = "" if math.isinf(most) else f" and at most {most}"
        raise UserError(f"{name} must be {low}{high}, got {value} (for example {example})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One request as it was asked: a prompt, how to sample, and how it is to be run."""

    prompt: str | tuple[int, ...] | None = None
    """Text, or token ids."""
    messages: tuple[Mapping[str, Any], ...] | None = None
    """A chat instead of a prompt, for the tokenizer's chat template."""
    params: SamplingParams
    time: str | None = None
    """The method's text form; None = the model's own."""
    priority: int = 0
    """Lower ones run first, as in vLLM."""
    timeout: float | None = None
    """Seconds from submission after which it ends with what it has."""


_ASKED = {"prompt", "messages", "time", "priority", "timeout"}
_TRANSLATED = {"structured_outputs", "response_format", "max_completion_tokens"}
_IGNORED = {"model", "user", "stream", "stream_options", "request_id", "metadata", "store"}
"""Fields of OpenAI's requests that say nothing about the answer."""


def parse_question(asked: "str | Sequence[int] | Mapping[str, Any]") -> Question:
    """A checked request from a text, token ids or a dict of OpenAI's field names. Raises `UserError`, in one line."""
    if isinstance(asked, str) or (isinstance(asked, Sequence) and not isinstance(asked, bytes)):
        asked = {"prompt": asked}
    if not isinstance(asked, Mapping):
        raise UserError(f"a request must be a text, token ids or an object, got {type(asked).__name__}")
    known = {one.name for one in fields(SamplingParams)} - {"structured"} | _ASKED | _TRANSLATED
    for name in asked:
        if name not in known | _IGNORED:
            raise unknown_name("field", str(name), known)
    values = {name: value for name, value in asked.items() if name not in _IGNORED}
    prompt, messages = _prompt(values.pop("prompt", None)), values.pop("messages", None)
    if (prompt is None) == (messages is None):
        raise UserError(
            "a request must have a prompt or messages, one of the two: give for example {'prompt': 'Hello'}"
        )
    if messages is not None and not (isinstance(messages, Sequence) and messages and not isinstance(messages, str)):
        raise UserError(
            "messages must be a list of 1 or more, got none: give for example [{'role': ..., 'content': ...}]"
        )
    time, priority, timeout = values.pop("time", None), values.pop("priority", 0), values.pop("timeout", None)
    check_number("priority", priority)
    check_number("timeout", timeout)
    if time is not None and not isinstance(time, str):
        raise UserError(f"time must be a method's text form, got {time!r} (for example 'full')")
    return Question(
        prompt=prompt, messages=None if messages is None else tuple(messages), params=_params(values),
        time=time, priority=priority, timeout=timeout,
    )  # fmt: skip


def _prompt(prompt: Any) -> str | tuple[int, ...] | None:
    prompt = prompt if prompt is None or isinstance(prompt, str) else _ids("prompt", prompt)
    if prompt is not None and not prompt:
        raise UserError("prompt must have 1 token or more, got none")
    return prompt


def _ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UserError(f"{name} must be a list of token ids, got {dumps(value, default=str)}")
    for one in value:
        if isinstance(one, bool) or not isinstance(one, int) or one < 0:
            raise UserError(f"{name} must hold token ids, whole numbers from 0, got {dumps(one, default=str)}")
    return tuple(value)


def _params(values: dict[str, Any]) -> SamplingParams:
    """`SamplingParams` from OpenAI's and vLLM's spellings."""
    if "max_completion_tokens" in values:
        values["max_tokens"] = values.pop("max_completion_tokens")
    structured = _structured(values.pop("structured_outputs", None), values.pop("response_format", None))
    values = {name: value for name, value in values.items() if value is not None or name == "max_tokens"}
    for name in ("stop", "bad_words"):
        if name in values:
            given = values[name]
            given = [given] if isinstance(given, str) else given
            ids = name == "bad_words"
            if not isinstance(given, Sequence) or not all(isinstance(one, str) or ids for one in given):
                raise UserError(f"{name} must be a text or a list of texts, got {dumps(given, default=str)}")
            values[name] = tuple(one if isinstance(one, str) else _ids(name, one) for one in given)
    for name in ("stop_token_ids", "allowed_token_ids"):
        if name in values:
            values[name] = _ids(name, values[name])
    if "logit_bias" in values:
        values["logit_bias"] = _bias(values["logit_bias"])
    for name in ("logprobs", "prompt_logprobs"):
        if isinstance(values.get(name), bool):  # the chat API's spelling
            values[name] = 0 if values[name] else None
    for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
        if not isinstance(values.get(name, False), bool):
            raise UserError(f"{name} must be true or false, got {dumps(values[name], default=str)}")
    return SamplingParams(**values, structured=structured)


def _bias(given: Any) -> tuple[tuple[int, float], ...]:
    try:
        found = tuple((int(token), float(bias)) for token, bias in given.items())
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"logit_bias must map token ids to numbers, got {dumps(given, default=str)}") from error
    for token, bias in found:
        if token < 0 or not -100 <= bias <= 100:
            raise UserError(f"logit_bias must give tokens from 0 at least -100 and at most 100, got {token}: {bias:g}")
    return found


def _structured(outputs: Any, response: Any) -> tuple[str, str] | None:
    """(kind, text) from vLLM's `structured_outputs` or OpenAI's `response_format`."""
    if response is not None and response != {"type": "text"}:
        if outputs is not None:
            raise UserError("structured_outputs and response_format say the same: give one of the two")
        kind = response.get("type") if isinstance(response, Mapping) else None
        if kind == "json_object":
            outputs = {"json_object": True}
        elif kind == "json_schema" and isinstance(response.get("json_schema"), Mapping):
            outputs = {"json": response["json_schema"].get("schema", {})}
        else:
            raise UserError(f"response_format must be of type text, json_object or json_schema, got {kind!r}")
    if outputs is None:
        return None
    outputs = outputs if isinstance(outputs, Mapping) else {}
    given = {name: value for name, value in outputs.items() if value not in (None, False)}
    if len(given) != 1 or not given.keys() <= set(_STRUCTURED):
        raise UserError(f"structured_outputs must have one of {', '.join(_STRUCTURED)}, got {sorted(given) or 'none'}")
    ((kind, value),) = given.items()
    if kind == "json_object":
        return "json", dumps({"type": "object"})
    if kind == "choice":
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise UserError("choice must be a list of 1 text or more (for example ['yes', 'no'])")
        return "grammar", "start: " + " | ".join(dumps(str(one)) for one in value)
    if kind == "json":
        return kind, value if isinstance(value, str) else dumps(value)
    if not isinstance(value, str):
        raise UserError(f"{kind} must be a text, got {dumps(value, default=str)}")
    return kind, value


FinishReason = Literal["stop", "length", "abort", "timeout", "error"]
"""`stop`: an end token or a stop string; `length`: max_tokens or the context; `abort`: cancelled; `timeout`: its deadline."""


@dataclass(kw_only=True, slots=True, eq=False)
class Request:
    """One sequence that the engine runs. An `n` of 4 makes four of them."""

    id: str
    tokens: list[int]
    """Prompt, then answer."""
    prompt_tokens: int
    """Length of the prompt."""
    params: SamplingParams
    method: str
    """The method's text form, of those that the engine has loaded."""
    max_tokens: int
    """Tokens of the answer at most, once the context is taken into account."""
    seed: int = field(default_factory=lambda: int.from_bytes(os.urandom(8), "little"))
    priority: int = 0
    deadline: float = math.inf
    """On the engine's clock, in seconds."""
    arrival: float = 0.0
    """On the engine's clock."""
    reuse: bool = True
    """Whether it may begin from a stored prefix; not where the prompt's own log probabilities are wanted."""

    handle: int | None = None
    """Its sequence in the store; None while it waits."""
    seen: int = 0
    """Tokens that the store has seen of it."""
    read_until: int = 0
    """Tokens to be read as a prompt; what lies behind is fed one by one."""
    cached_tokens: int = 0
    """Tokens that a stored prefix saved it from reading."""
    rank: tuple = ()
    """Its place in the order, smaller first; set when it is admitted."""
    preemptions: int = 0
    predicted_bytes: int = 0
    """Estimated at admission for its prompt, to be compared with what it held."""
    kept_tokens: float = 0.0
    """Mean over KV heads of the entries held at its end."""
    kv_bytes: int = 0
    """Bytes held at its end."""
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def outputs(self) -> list[int]:
        """The answer so far."""
        return self.tokens[self.prompt_tokens :]

    @property
    def num_outputs(self) -> int:
        """Length of the answer so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def final_tokens(self) -> int:
        """Tokens that the store will have seen at the end, at most: the last token is not fed."""
        return self.prompt_tokens + self.max_tokens - 1

    @property
    def certain_tokens(self) -> int:
        """Tokens that the store will have seen at the end, at least."""
        params = self.params
        may_end = not params.ignore_eos or params.stop or params.stop_token_ids or params.structured
        return self.prompt_tokens + (params.min_tokens if may_end else self.max_tokens) - 1

    @property
    def is_reading(self) -> bool:
        """Whether a part of the prompt is still to be read."""
        return self.seen < self.read_until

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, however that was."""
        return self.finish_reason is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What an answer cost."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens that a stored prefix saved."""
    seen_tokens: int
    """Tokens that the cache has seen."""
    kept_tokens: float
    """Mean over KV heads of the entries that it still held at the end."""
    kv_bytes: int
    """Bytes that the cache held for it at the end."""
