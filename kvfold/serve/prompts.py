"""From texts and chats to token ids and back: messages checked, the template rendered, what it says about reasoning; log
probabilities as OpenAI's two APIs write them; and the functions that a model may call: what a request offers, what it
forces, and the grammar of forced calls.

Texts go through the tokenizer's backend, whose calls keep no state: worker threads may share it. The template is the
checkpoint's or the operator's, never a request's: a template is a program. A forced call is made under a grammar, the same
for every model: a JSON list of `{"name", "arguments"}`, or the arguments alone where one function is named. A call that the
model makes of its own will comes in its own format (`calls.py`).
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
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kvfold.engine.sampler import TokenLogprob
from kvfold.errors import one_line
from kvfold.serve.fields import ChatRequest, TokenizeRequest
from kvfold.serve.replies import ApiError, filled, invalid, unsupported


class Tokens:
    """One tokenizer, as the server uses it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_model_len: int):
        self.tokenizer, self.max_model_len = tokenizer, max_model_len
        self._backend = tokenizer.backend_tokenizer
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
    ) -> tuple[Logprobs, int]:
        """As completions have them, and the offset behind them. `offset`: characters before. `first`: a token before all, which
        has no probability.
        """
        tokens = [] if first is None else [first]
        tokens += [one.token for one in found]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(self.text_of(token))
        nothing = [] if first is None else [None]
        logprobs = filled(
            Logprobs, text_offset=offsets, tokens=[self._name(token, as_ids) for token in tokens],
            token_logprobs=nothing + [_finite(one.logprob) for one in found],
            top_logprobs=nothing + [self._top(one, as_ids) for one in found],
        )  # fmt: skip
        return logprobs, offset

    def _top(self, one: TokenLogprob, as_ids: bool) -> dict[str, float]:
        """By token, likeliest first; the chosen one is always among them."""
        top: dict[str, float] = {}
        for token, value in (*one.top, (one.token, one.logprob)):  # of tokens that look alike the likelier one stays
            top.setdefault(self._name(token, as_ids), _finite(value))
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


_BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}
"""The letters by which byte-level tokenizers write bytes."""


_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_RESERVED = {
    "conversation", "messages", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt",
    "continue_final_message", "return_dict", "return_tensors", "padding", "truncation", "max_length",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip
"""Variables of a template that have fields of their own, and options of transformers."""
REASONING = ("<think>", "</think>")
"""Around what a reasoning model says to itself, in all families whose templates we read."""


class ChatTemplate:
    """One model's way to write a chat."""

    def __init__(self, tokens: Tokens, template: str | None):
        """`template` in place of the tokenizer's own."""
        self._tokens, self._given = tokens, template
        text = template or tokens.tokenizer.chat_template or ""
        self.exists = bool(text)
        self.reasons = REASONING[1] in ("\n".join(text.values()) if isinstance(text, dict) else text)
        """Whether it knows reasoning."""

    def render(
        self, body: ChatRequest | TokenizeRequest, tools: Sequence[Mapping[str, Any]], *, structured: bool = False
    ) -> tuple[list[int], bool]:
        """Token ids of a chat, and whether they end inside of reasoning. `structured`: the answer must match a grammar, so
        reasoning is closed before it begins.
        """
        if not self.exists:
            raise invalid(
                None, "the model has no chat template: use /v1/completions, or start the server with --chat-template"
            )
        goes_on, kwargs = bool(body.continue_final_message), dict(body.chat_template_kwargs or {})
        if goes_on and body.add_generation_prompt:
            message = "add_generation_prompt and continue_final_message exclude each other: give one of the two"
            raise invalid("continue_final_message", message)
        for name in sorted(_RESERVED & set(kwargs)):
            message = f"chat_template_kwargs must not name {name}: there is a field for it"
            raise invalid("chat_template_kwargs", message)
        if body.reasoning_effort is not None:
            kwargs.setdefault("reasoning_effort", body.reasoning_effort)
        chat = [_message(place, one) for place, one in enumerate(body.messages)]
        try:
            text = self._tokens.tokenizer.apply_chat_template(
                chat, tools=list(tools) or None, documents=body.documents or None, chat_template=self._given,
                tokenize=False, add_generation_prompt=not goes_on and body.add_generation_prompt is not False,
                continue_final_message=goes_on, **kwargs,
            )  # fmt: skip
        except Exception as error:  # a template may raise anything, and does so to refuse an order of roles
            message = f"messages don't fit the chat template: {one_line(error) or type(error).__name__}"
            raise invalid("messages", message) from None
        in_reasoning = self.reasons and text.rstrip().endswith(REASONING[0])
        if in_reasoning and structured:
            text, in_reasoning = text.rstrip() + f"\n\n{REASONING[1]}\n\n", False
        return self._tokens.encode(text, special=bool(body.add_special_tokens)), in_reasoning


def _message(place: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """One message as templates expect it: content a text, arguments of calls an object."""
    name = f"messages[{place}]"
    role = message.get("role")
    if role not in _ROLES:
        raise invalid("messages", f"{name}.role must be one of {', '.join(_ROLES)}, got {_short(role)}")
    found = dict(message) | {"role": "system" if role == "developer" else role}
    found["content"] = _content(name, message.get("content"))
    if found["content"] is None and not message.get("tool_calls"):
        if role != "assistant":
            raise invalid("messages", f"{name}.content must be a text or a list of parts, got none")
        found["content"] = ""
    if message.get("tool_calls") is not None:
        calls = message["tool_calls"]
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            raise invalid("messages", f"{name}.tool_calls must be a list of objects")
        found["tool_calls"] = [_call(f"{name}.tool_calls", call) for call in calls]
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(reasoning, str):
        found["reasoning_content"] = reasoning
    return found


_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""By type of a part: where its text is."""


def _content(name: str, content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid("messages", f"{name}.content must be a text or a list of parts, got {_short(content)}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("image_url", "input_image", "input_audio", "audio_url", "video_url", "file", "input_file"):
            raise unsupported(f"{name}.content of type {kind}", "this model reads text alone")
        text = part.get(_TEXTS[kind]) if kind in _TEXTS else None
        if not isinstance(text, str):
            raise invalid("messages", f"{name}.content must hold parts of type text, got {_short(kind)}")
        texts.append(text)
    return "\n".join(texts)


def _call(name: str, call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise invalid("messages", f"{name} must hold functions with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise invalid("messages", f"{name} must hold arguments that are JSON") from None
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

    def schema(self) -> str:
        """JSON schema of the whole answer where a call is forced."""
        parameters = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in self.tools}
        if self.mode == "named":
            return json.dumps({"type": "object"} | dict(parameters[self.name]) | _NO_BLANKS)
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
        raise invalid("tools", "tools must have names of their own, got one twice")
    mode, name = "auto", None
    kind = choice.get("type", "function") if isinstance(choice, Mapping) else None
    if kind == "allowed_tools":
        allowed = choice.get("allowed_tools") if isinstance(choice.get("allowed_tools"), Mapping) else choice
        mode = "required" if allowed.get("mode") == "required" else "auto"
        wanted = {_named(one) for one in allowed.get("tools") or () if isinstance(one, Mapping)}
        offered = [tool for tool in offered if tool["function"]["name"] in wanted]
    elif kind == "function" and isinstance(_named(choice), str):
        mode, name = "named", _named(choice)
    elif kind is not None:
        raise unsupported(f"tool_choice of type {json.dumps(kind)[:40]}", "use none, auto, required or a function")
    elif choice in ("none", "auto", "required"):
        mode = choice
    elif choice is not None:
        raise invalid("tool_choice", "tool_choice must be none, auto, required or a function")
    if mode in ("required", "named") and not offered:
        raise invalid("tool_choice", "tool_choice must be none or auto where no tools are given")
    if mode == "named" and name not in names:
        raise invalid("tool_choice", f"tool_choice must name one of the tools, got {json.dumps(name)[:60]}")
    if mode == "none" or not offered:
        return ToolChoice()
    return ToolChoice(tools=tuple(offered), mode=mode, name=name, parallel=parallel is not False)


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
        raise invalid("tools", f"tools[{place}].function.name must be 1 to 128 letters, digits, '_', '.' or '-'")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise invalid("tools", f"tools[{place}].function.parameters must be a JSON schema, an object")
    if not isinstance(function.get("description") or "", str):
        raise invalid("tools", f"tools[{place}].function.description must be a text")
    return {"type": "function", "function": dict(function)}
