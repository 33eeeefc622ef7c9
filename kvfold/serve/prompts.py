"""Texts to token ids and back, and log probabilities as OpenAI's two APIs write them.

Everything goes through the tokenizer's backend, whose calls keep no state: worker threads may share it.


From a chat to token ids: messages checked, the template rendered, what it says about reasoning; and the functions that a
model may call: what a request offers, what it forces, and the grammar of forced calls.

The template is the checkpoint's or the operator's, never a request's: a template is a program. A forced call is made under a
grammar, the same for every model: a JSON list of `{"name", "arguments"}`, or the arguments alone where one function is named.
A call that the model makes of its own will comes in its own format (`calls.py`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from openai.types.chat import ChatCompletionTokenLogprob
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

from kvfold.engine.sampler import TokenLogprob
from kvfold.serve.replies import ApiError, filled, unsupported


class Tokens:
    """One tokenizer, as the server uses it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_model_len: int):
        self.tokenizer, self.max_model_len = tokenizer, max_model_len
        self._backend = tokenizer.backend_tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._longest = max((len(token) for token in self._backend.get_vocab()), default=1)
        self.vocab_size = self._backend.get_vocab_size()
        self.text_of = lru_cache(65_536)(self._text_of)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text. Raises `ApiError` at once for one that can't fit into the context, however it is cut."""
        if len(text) > self._longest * self.max_model_len:
            raise self.too_long(f"at least {len(text) // self._longest}")
        return self._backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens, special ones included."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def too_long(self, length: object) -> ApiError:
        """The error for a prompt of so many tokens, in the words by which clients know that they must shorten it."""
        return ApiError(
            400, f"This model's maximum context length is {self.max_model_len} tokens, and the prompt has {length}: shorten it",
            param="prompt", code="context_length_exceeded",
        )  # fmt: skip

    def _text_of(self, token: int) -> str:
        return self._backend.decode([token], skip_special_tokens=False)

    def bytes_of(self, token: int) -> list[int]:
        """The bytes that a token stands for: tokens can hold a part of a character."""
        text = self.text_of(token)
        if "\ufffd" in text:
            piece = self._backend.id_to_token(token) or ""
            if piece.startswith("<0x") and piece.endswith(">"):
                return [int(piece[3:-1], 16)]
            if all(letter in _BYTE_OF for letter in piece):
                return [_BYTE_OF[letter] for letter in piece]
        return list(text.encode())

    # -- log probabilities ---------------------------------------------------------------------------------------

    def chat_logprobs(self, found: Sequence[TokenLogprob], *, as_ids: bool = False) -> list[ChatCompletionTokenLogprob]:
        """As chat completions have them."""
        return [
            ChatCompletionTokenLogprob(
                token=self._name(one.token, as_ids), logprob=_finite(one.logprob), bytes=self.bytes_of(one.token),
                top_logprobs=[
                    TopLogprob(token=self._name(token, as_ids), logprob=_finite(value), bytes=self.bytes_of(token))
                    for token, value in one.top
                ],
            )
            for one in found
        ]  # fmt: skip

    def completion_logprobs(
        self, found: Sequence[TokenLogprob], offset: int, *, first: int | None = None, as_ids: bool = False
    ) -> Logprobs:
        """As completions have them. `offset`: characters before. `first`: a token before all, which has no probability."""
        tokens = [] if first is None else [first]
        tokens += [one.token for one in found]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(self.text_of(token))
        nothing = [] if first is None else [None]
        return filled(
            Logprobs,
            text_offset=offsets,
            token_logprobs=nothing + [_finite(one.logprob) for one in found],
            tokens=[self._name(token, as_ids) for token in tokens],
            top_logprobs=nothing + [self._top(one, as_ids) for one in found],
        )

    def _top(self, one: TokenLogprob, as_ids: bool) -> dict[str, float]:
        """By token, likeliest first; the chosen one is always among them."""
        top = {self._name(token, as_ids): _finite(value) for token, value in reversed(one.top)}
        top = dict(reversed(top.items()))  # of tokens that look alike the likelier one stays
        top.setdefault(self._name(one.token, as_ids), _finite(one.logprob))
        return top

    def prompt_logprobs(self, found: Sequence[TokenLogprob]) -> list[dict[str, Any] | None]:
        """As vLLM writes those of a prompt: by token id, nothing for the first."""
        rows: list[dict[str, Any] | None] = [None]
        for one in found:
            ranked = [(token, value, rank) for rank, (token, value) in enumerate(one.top, start=1)]
            if one.token not in {token for token, _ in one.top}:
                ranked.append((one.token, one.logprob, None))
            rows.append({
                str(token): {"logprob": _finite(value), "rank": rank, "decoded_token": self.text_of(token)}
                for token, value, rank in ranked
            })  # fmt: skip
        return rows

    def _name(self, token: int, as_ids: bool) -> str:
        return f"token_id:{token}" if as_ids else self.text_of(token)


def _finite(value: float) -> float:
    """JSON has no word for minus infinity."""
    return max(value, -9999.0)


def _byte_alphabet() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes: printable ones stand for themselves, others come from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
assert set(_BYTE_OF) == set(ByteLevel.alphabet())


_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_RESERVED = {
    "conversation", "messages", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt",
    "continue_final_message", "return_dict", "return_tensors", "padding", "truncation", "max_length",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip
"""Variables of a template that have fields of their own, and options of transformers."""
REASONING = ("<think>", "</think>")
"""Around what a reasoning model says to itself, in all families whose templates we read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A rendered chat."""

    ids: list[int]
    reasons: bool
    """Whether the model's template knows reasoning."""
    in_reasoning: bool
    """Whether the prompt ends inside of it."""


class ChatTemplate:
    """One model's way to write a chat."""

    def __init__(self, tokens: Tokens, template: str | None):
        """`template` in place of the tokenizer's own."""
        self._tokens = tokens
        self._given = template
        text = template or tokens.tokenizer.chat_template
        self._text = "\n".join(text.values()) if isinstance(text, dict) else text
        self.exists = bool(self._text)
        self.reasons = self.exists and REASONING[1] in self._text
        self.tags_calls = self.exists and "<tool_call>" in self._text

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] = (),
        documents: Sequence[Mapping[str, Any]] = (), kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool | None = None, continue_final_message: bool = False,
        add_special_tokens: bool = False, structured: bool = False,
    ) -> Prompt:  # fmt: skip
        """Token ids of a chat. `structured`: the answer must match a grammar, so reasoning is closed before it begins."""
        if not self.exists:
            raise ApiError(
                400, "the model has no chat template: use /v1/completions, or start the server with --chat-template"
            )
        if continue_final_message and add_generation_prompt:
            raise ApiError(
                400, "add_generation_prompt and continue_final_message exclude each other: give one of the two",
                param="continue_final_message",
            )  # fmt: skip
        reserved = _RESERVED & set(kwargs or {})
        if reserved:
            raise ApiError(
                400, f"chat_template_kwargs must not name {sorted(reserved)[0]}: there is a field for it",
                param="chat_template_kwargs",
            )  # fmt: skip
        chat = [_message(place, one) for place, one in enumerate(messages)]
        opens = not continue_final_message and add_generation_prompt is not False
        try:
            text = self._tokens.tokenizer.apply_chat_template(
                chat, tools=list(tools) or None, documents=list(documents) or None, chat_template=self._given,
                tokenize=False, add_generation_prompt=opens, continue_final_message=continue_final_message,
                **(kwargs or {}),
            )  # fmt: skip
        except Exception as error:  # a template may raise anything, and does so to refuse an order of roles
            message = " ".join(str(error).split()) or type(error).__name__
            raise ApiError(400, f"messages don't fit the chat template: {message}", param="messages") from None
        in_reasoning = self.reasons and text.rstrip().endswith(REASONING[0])
        if in_reasoning and structured:
            text, in_reasoning = text.rstrip() + f"\n\n{REASONING[1]}\n\n", False
        ids = self._tokens.encode(text, special=add_special_tokens)
        return Prompt(ids=ids, reasons=self.reasons, in_reasoning=in_reasoning)


def _message(place: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """One message as templates expect it: content a text, arguments of calls an object."""
    name = f"messages[{place}]"
    role = message.get("role")
    if role not in _ROLES:
        raise ApiError(400, f"{name}.role must be one of {', '.join(_ROLES)}, got {_short(role)}", param="messages")
    found = dict(message) | {"role": "system" if role == "developer" else role}
    found["content"] = _content(name, message.get("content"))
    if found["content"] is None and not message.get("tool_calls"):
        if role != "assistant":
            raise ApiError(400, f"{name}.content must be a text or a list of parts, got none", param="messages")
        found["content"] = ""
    if message.get("tool_calls") is not None:
        calls = message["tool_calls"]
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            raise ApiError(400, f"{name}.tool_calls must be a list of objects", param="messages")
        found["tool_calls"] = [_call(f"{name}.tool_calls", call) for call in calls]
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(reasoning, str):
        found["reasoning_content"] = reasoning
    return found


def _content(name: str, content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(
            400, f"{name}.content must be a text or a list of parts, got {_short(content)}", param="messages"
        )
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if kind in ("text", "input_text", "output_text") else None
        if kind == "refusal":
            text = part.get("refusal")
        if kind in ("image_url", "input_image", "input_audio", "audio_url", "video_url", "file", "input_file"):
            raise unsupported(f"{name}.content of type {kind}", "this model reads text alone")
        if not isinstance(text, str):
            raise ApiError(400, f"{name}.content must hold parts of type text, got {_short(kind)}", param="messages")
        texts.append(text)
    return "\n".join(texts)


def _call(name: str, call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"{name} must hold functions with a name", param="messages")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise ApiError(400, f"{name} must hold arguments that are JSON", param="messages") from None
    return dict(call) | {"function": dict(function) | {"arguments": arguments if arguments is not None else {}}}


def _short(value: Any) -> str:
    return json.dumps(value, default=str)[:60]


_NO_BLANKS = {"x-guidance": {"whitespace_flexible": False}}
"""Nobody reads the JSON of a call: no line breaks, of which a model could write without end."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolChoice:
    """The tools of one request."""

    tools: tuple[Mapping[str, Any], ...] = ()
    """As chat templates take them; none where nothing may be called."""
    mode: str = "none"
    """`none`, `auto`, `required`, or `named`."""
    name: str | None = None
    """The function that must be called."""
    parallel: bool = True
    """Whether several calls may come in one answer."""

    @property
    def names(self) -> frozenset[str]:
        """Functions that may be called."""
        return frozenset(tool["function"]["name"] for tool in self.tools)

    @property
    def forced(self) -> bool:
        """Whether a call must be made."""
        return self.mode in ("required", "named")

    def schema(self) -> str | None:
        """JSON schema of the whole answer where a call is forced."""
        parameters = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in self.tools}
        if self.mode == "named":
            return json.dumps({"type": "object"} | dict(parameters[self.name]) | _NO_BLANKS)
        if self.mode != "required":
            return None
        definitions: dict[str, Any] = {}
        calls = []
        for name, arguments in parameters.items():
            arguments = {"type": "object"} | dict(arguments)
            for key in ("$defs", "definitions"):  # references in them are from the root
                definitions.setdefault(key, {}).update(arguments.pop(key, {}) or {})
            calls.append({
                "type": "object", "additionalProperties": False, "required": ["name", "arguments"],
                "properties": {"name": {"const": name}, "arguments": arguments},
            })  # fmt: skip
        schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
        schema |= {key: found for key, found in definitions.items() if found} | _NO_BLANKS
        return json.dumps(schema if self.parallel else schema | {"maxItems": 1})


def tool_choice(tools: Sequence[Mapping[str, Any]] | None, choice: Any, parallel: bool | None) -> ToolChoice:
    """What a request's fields say, checked. Raises `ApiError`."""
    offered = [_tool(place, tool) for place, tool in enumerate(tools or ())]
    names = [tool["function"]["name"] for tool in offered]
    if len(set(names)) != len(names):
        raise ApiError(400, "tools must have names of their own, got one twice", param="tools")
    mode, name = _mode(choice, bool(offered))
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools") if isinstance(choice.get("allowed_tools"), Mapping) else choice
        mode = "required" if allowed.get("mode") == "required" else "auto"
        wanted = {_named(one) for one in allowed.get("tools") or () if isinstance(one, Mapping)}
        offered = [tool for tool in offered if tool["function"]["name"] in wanted]
    if mode in ("required", "named") and not offered:
        raise ApiError(400, "tool_choice must be none or auto where no tools are given", param="tool_choice")
    if mode == "named" and name not in names:
        raise ApiError(400, f"tool_choice must name one of the tools, got {json.dumps(name)[:60]}", param="tool_choice")
    if mode == "none" or not offered:
        return ToolChoice()
    return ToolChoice(tools=tuple(offered), mode=mode, name=name, parallel=parallel is not False)


def _mode(choice: Any, has_tools: bool) -> tuple[str, str | None]:
    if choice is None:
        return ("auto" if has_tools else "none"), None
    if choice in ("none", "auto", "required"):
        return choice, None
    if isinstance(choice, Mapping):
        kind = choice.get("type", "function")
        if kind == "function" and isinstance(_named(choice), str):
            return "named", _named(choice)
        if kind == "allowed_tools":
            return "auto", None
        raise unsupported(f"tool_choice of type {json.dumps(kind)[:40]}", "use none, auto, required or a function")
    raise ApiError(400, "tool_choice must be none, auto, required or a function", param="tool_choice")


def _named(one: Mapping[str, Any]) -> str | None:
    """The name in chat completions' form or in that of responses."""
    function = one.get("function")
    return function.get("name") if isinstance(function, Mapping) else one.get("name")


def _tool(place: int, tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type", "function") != "function":
        raise unsupported(f"tools[{place}] of type {json.dumps(tool.get('type'))[:40]}", "offer functions")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        # Responses have the function's fields beside the type.
        function = {key: tool[key] for key in ("name", "description", "parameters", "strict") if key in tool}
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ApiError(
            400, f"tools[{place}].function.name must be 1 to 128 letters, digits, '_', '.' or '-'", param="tools"
        )
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ApiError(400, f"tools[{place}].function.parameters must be a JSON schema, an object", param="tools")
    if not isinstance(function.get("description") or "", str):
        raise ApiError(400, f"tools[{place}].function.description must be a text", param="tools")
    return {"type": "function", "function": dict(function)}
