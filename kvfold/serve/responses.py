"""/v1/responses: OpenAI's newer API over the same chat. Nothing is stored: each request carries the whole conversation.

An answer is a list of items (reasoning, message, function calls), told as events in the order in which they come about; a
whole answer is what the last event says.
"""

import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response as HttpResponse
from openai.types.responses import Response

from kvfold.serve.answers import respond, usage_of
from kvfold.serve.calls import AnswerReader, Part
from kvfold.serve.chat import ChatCall
from kvfold.serve.errors import ApiError, unsupported
from kvfold.serve.fields import Base, ChatRequest, ResponsesRequest
from kvfold.serve.serving import Job, Serving
from kvfold.serve.streaming import PING, event

_CALLS = ("function_call",)
_ITEM_OF = {"reasoning": "reasoning", "content": "message", "call": "function_call", "arguments": "function_call"}


class _Response:
    """One request to this endpoint."""

    answers = 1

    def __init__(self, serving: Serving, body: ResponsesRequest, model: str, name: str):
        if body.n not in (None, 1):
            raise unsupported("n", "responses have one answer: send several requests")
        self.serving, self.body, self.model = serving, body, model
        self.id, self.created = f"resp_{name}", int(time.time())
        self.call = ChatCall(serving, chat_of(body))
        self.characters = self.call.characters + (len(body.input) if isinstance(body.input, str) else 0)
        self.items: list[dict[str, Any]] = []
        self._number = 0

    def submit(self, job: Job) -> None:
        """See `ChatCall`."""
        self.call.submit(job, self.id)

    # -- the response as it stands -------------------------------------------------------------------------------

    def _response(self, status: str, **extra: Any) -> dict[str, Any]:
        body = self.body
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "model": self.model,
            "output": self.items, "error": None, "incomplete_details": None, "instructions": body.instructions,
            "metadata": body.metadata or {}, "parallel_tool_calls": self.call.tools.parallel,
            "temperature": body.temperature, "top_p": body.top_p, "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [], "max_output_tokens": body.max_output_tokens, "previous_response_id": None,
            "reasoning": body.reasoning, "text": body.text or {"format": {"type": "text"}}, "store": False,
            "background": False, "truncation": "disabled", "usage": None,
        } | extra  # fmt: skip

    async def answer(self, job: Job) -> Response:
        """The whole answer."""
        last: dict[str, Any] = {}
        async for one in self._events(job):
            last = one or last
        if last["type"] == "error":
            raise ApiError(500, last["message"])
        return Response.model_validate(last["response"])

    async def events(self, job: Job) -> AsyncIterator[bytes]:
        """The same as a stream."""
        async for one in self._events(job):
            yield PING if one is None else event(one, one["type"])

    async def _events(self, job: Job) -> AsyncIterator[dict[str, Any] | None]:
        """All events; None where nothing came for a while."""
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        reader, reasoning_tokens, tokens, piece = self.call.reader(), 0, 0, None
        async for batch in self.serving.batches(job, self.serving.settings.ping_s if job.streams else None):
            if not batch:
                yield None
            for _, piece in batch:
                parts = reader.feed(piece.text) + (reader.finish() if piece.finish_reason else [])
                tokens += len(piece.token_ids)
                if parts and all(part.kind == "reasoning" for part in parts):
                    reasoning_tokens += len(piece.token_ids)
                logprobs = self._logprobs(piece) if parts else []
                for part in parts:
                    for one in self._part(part, logprobs):
                        yield one
        if not self.items:
            for one in self._open("message"):
                yield one
        for one in self._close("completed" if piece.finish_reason == "stop" else "incomplete"):
            yield one
        yield self._end(job, piece, reader, tokens, reasoning_tokens)

    def _end(self, job: Job, piece: Any, reader: AnswerReader, tokens: int, reasoning_tokens: int) -> dict[str, Any]:
        found = usage_of(job.prompt_tokens, tokens, [piece.usage])
        usage = {
            "input_tokens": job.prompt_tokens, "output_tokens": tokens, "total_tokens": job.prompt_tokens + tokens,
            "input_tokens_details": {"cached_tokens": piece.usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": reasoning_tokens}, "kvfold": found.kvfold,
        }  # fmt: skip
        if piece.finish_reason == "stop":
            return self._event("response.completed", response=self._response("completed", usage=usage))
        details = {"reason": "max_output_tokens"}
        response = self._response("incomplete", usage=usage, incomplete_details=details)
        return self._event("response.incomplete", response=response)

    # -- items ---------------------------------------------------------------------------------------------------

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1} | fields

    def _part(self, part: Part, logprobs: list[Any]) -> Iterator[dict[str, Any]]:
        kind, item = _ITEM_OF[part.kind], self.items[-1] if self.items else None
        if item is None or item["type"] != kind or item["status"] != "in_progress" or part.kind == "call":
            yield from self._close("completed")
            yield from self._open(kind, part)
            item = self.items[-1]
        place = {"item_id": item["id"], "output_index": len(self.items) - 1}
        if part.kind == "content":
            item["content"][0]["text"] += part.text
            item["content"][0]["logprobs"] += logprobs
            yield self._event(
                "response.output_text.delta", delta=part.text, content_index=0, logprobs=list(logprobs), **place
            )
            logprobs.clear()
        elif part.kind == "reasoning":
            item["content"][0]["text"] += part.text
            yield self._event("response.reasoning_text.delta", delta=part.text, content_index=0, **place)
        elif part.kind == "arguments":
            item["arguments"] += part.text
            yield self._event("response.function_call_arguments.delta", delta=part.text, **place)

    def _logprobs(self, piece: Any) -> list[dict[str, Any]]:
        if self.body.top_logprobs is None:
            return []
        return [one.model_dump() for one in self.serving.tokens.chat_logprobs(piece.logprobs)]

    def _open(self, kind: str, part: Part | None = None) -> Iterator[dict[str, Any]]:
        """Begin an item."""
        item: dict[str, Any] = {"id": f"{kind[:3]}_{secrets.token_hex(12)}", "type": kind, "status": "in_progress"}
        content: dict[str, Any] | None = None
        if kind == "message":
            content = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item |= {"role": "assistant", "content": []}
        elif kind == "reasoning":
            content = {"type": "reasoning_text", "text": ""}
            item |= {"summary": [], "content": []}
        else:
            item |= {"name": part.text, "call_id": part.id, "arguments": ""}
        self.items.append(item)
        place = {"output_index": len(self.items) - 1}
        yield self._event("response.output_item.added", item=_copied(item), **place)
        if content is not None:
            item["content"].append(content)
            yield self._event(
                "response.content_part.added", item_id=item["id"], content_index=0, part=dict(content), **place
            )

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        """End the item that is open, if one is."""
        item = self.items[-1] if self.items else None
        if item is None or item["status"] != "in_progress":
            return
        item["status"] = status
        place = {"item_id": item["id"], "output_index": len(self.items) - 1}
        if item["type"] == "function_call":
            yield self._event("response.function_call_arguments.done", arguments=item["arguments"], **place)
        else:
            part = item["content"][0]
            text = {"text": part["text"], "content_index": 0}
            if item["type"] == "message":
                yield self._event("response.output_text.done", logprobs=part["logprobs"], **text, **place)
            else:
                yield self._event("response.reasoning_text.done", **text, **place)
            yield self._event("response.content_part.done", content_index=0, part=dict(part), **place)
        yield self._event("response.output_item.done", item=_copied(item), output_index=len(self.items) - 1)


def _copied(item: Mapping[str, Any]) -> dict[str, Any]:
    """The item as it stands: more may come to it."""
    return {key: [dict(one) for one in value] if isinstance(value, list) else value for key, value in item.items()}


def chat_of(body: ResponsesRequest) -> ChatRequest:
    """The same as a request for a chat. Raises `ApiError`."""
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    for place, item in enumerate(items):
        _add_item(messages, place, item)
    if not messages:
        raise ApiError(400, "input must hold 1 item or more, got none", param="input")
    values = {name: getattr(body, name) for name in Base.model_fields if getattr(body, name) is not None}
    values |= {"messages": messages, "max_tokens": body.max_output_tokens, "tools": body.tools}
    values |= {"tool_choice": body.tool_choice, "parallel_tool_calls": body.parallel_tool_calls}
    values |= {"chat_template_kwargs": body.chat_template_kwargs}
    if body.top_logprobs is not None:
        values |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    values["reasoning_effort"] = (body.reasoning or {}).get("effort")
    form = (body.text or {}).get("format")
    if isinstance(form, dict) and form.get("type") == "json_schema":
        values["response_format"] = {"type": "json_schema", "json_schema": {"schema": form.get("schema") or {}}}
    elif isinstance(form, dict) and form.get("type") != "text":
        values["response_format"] = form
    try:
        return ChatRequest.model_validate(values)
    except ValueError:
        raise ApiError(400, "reasoning.effort must be a short text", param="reasoning") from None


def _add_item(messages: list[dict[str, Any]], place: int, item: Mapping[str, Any]) -> None:
    """One item of the input as a message; calls and reasoning belong to the assistant's message around them."""
    kind = item.get("type", "message")
    if kind == "message":
        last = messages[-1] if messages else {}
        if item.get("role") == "assistant" and "content" not in last and last.get("role") == "assistant":
            last["content"] = item.get("content")
        else:
            messages.append({"role": item.get("role"), "content": item.get("content")})
    elif kind in _CALLS:
        call = {
            "id": item.get("call_id"), "type": "function",
            "function": {"name": item.get("name"), "arguments": item.get("arguments")},
        }  # fmt: skip
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
    elif kind == "reasoning":
        texts = [one.get("text") for one in item.get("content") or () if isinstance(one, Mapping)]
        messages.append(
            {"role": "assistant", "reasoning_content": "".join(one for one in texts if isinstance(one, str))}
        )
    else:
        raise unsupported(f"input[{place}] of type {str(kind)[:40]}", "send messages, function calls and their outputs")


def add_routes(router: APIRouter, serving: Serving, extra: dict[str, Any]) -> None:
    """`extra`: what FastAPI is told about the body."""

    @router.post("/v1/responses", openapi_extra=extra, response_model=None, tags=["answers"])
    async def responses(request: Request) -> HttpResponse:
        """Answer a conversation, item by item."""
        return await respond(serving, request, ResponsesRequest, _Response)
