"""From a chat to token ids: messages checked, the template rendered, and what it says about reasoning and tool calls.

The template is the checkpoint's or the operator's, never a request's: a template is a program.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvfold.serve.errors import ApiError, unsupported
from kvfold.serve.tokens import Tokens

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
