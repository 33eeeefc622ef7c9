"""/v1/responses: OpenAI's newer API over the same chat. Nothing is stored: each request carries the whole conversation.

An answer is a list of items (reasoning, message, function calls), told as events in the order in which they come about; a
whole answer is what the last event says.
"""

import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from openai.types.responses import Response

from kvfold.serve.answers import ChatCall, held
from kvfold.serve.calls import Part
from kvfold.serve.fields import ChatRequest, ResponsesRequest
from kvfold.serve.replies import PING, event, invalid, unsupported
from kvfold.serve.serving import Job, Serving

_ITEM_OF = {"reasoning": "reasoning", "content": "message", "call": "function_call", "arguments": "function_call"}
_EVENT_OF = {"reasoning": "reasoning_text", "message": "output_text", "function_call": "function_call_arguments"}


class ResponseCall(ChatCall):
    """One request to this endpoint."""

    prefix = "resp_"

    def __init__(self, serving: Serving, body: ResponsesRequest, model: str, name: str):
        if body.n not in (None, 1):
            raise unsupported("n", "responses have one answer: send several requests")
        super().__init__(serving, _chat(body), model, name)
        self._asked = body
        self.items: list[dict[str, Any]] = []
        self._number = 0

    def _response(self, status: str, **extra: Any) -> dict[str, Any]:
        body = self._asked
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "model": self.model,
            "output": self.items, "error": None, "incomplete_details": None, "instructions": body.instructions,
            "metadata": body.metadata or {}, "parallel_tool_calls": self.tools.parallel,
            "temperature": body.temperature, "top_p": body.top_p, "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [], "max_output_tokens": body.max_output_tokens, "previous_response_id": None,
            "reasoning": body.reasoning, "text": body.text or {"format": {"type": "text"}}, "store": False,
            "background": False, "truncation": "disabled", "usage": None,
        } | extra  # fmt: skip

    async def answer(self, job: Job) -> Response:
        """See `Call`."""
        last: dict[str, Any] = {}
        async for one in self._events(job):
            last = one or last
        return Response.model_validate(last["response"])

    async def events(self, job: Job) -> AsyncIterator[bytes]:
        """See `Call`."""
        async for one in self._events(job):
            yield PING if one is None else event(one, one["type"])

    async def _events(self, job: Job) -> AsyncIterator[dict[str, Any] | None]:
        """All events; None where nothing came for a while."""
        yield self._event("created", response=self._response("in_progress"))
        yield self._event("in_progress", response=self._response("in_progress"))
        reader, reasoning_tokens, piece = self.reader(), 0, None
        async for batch in job.batches(self.serving.settings.ping_s if job.streams else None):
            if not batch:
                yield None
            for _, piece in batch:
                parts = reader.feed(piece.text) + (reader.finish() if piece.finish_reason else [])
                self.num_tokens += len(piece.token_ids)
                if parts and all(part.kind == "reasoning" for part in parts):
                    reasoning_tokens += len(piece.token_ids)
                logprobs = [one.model_dump() for one in self.logprobs(piece)] if parts else []
                for part in parts:
                    for one in self._part(part, logprobs):
                        yield one
        whole = piece.finish_reason == "stop"
        status = "completed" if whole else "incomplete"
        for one in [*([] if self.items else self._open("message")), *self._close(status)]:
            yield one
        usage = {
            "input_tokens": job.prompt_tokens, "output_tokens": self.num_tokens,
            "total_tokens": job.prompt_tokens + self.num_tokens, "kvfold": held([piece.usage]),
            "input_tokens_details": {"cached_tokens": piece.usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        }  # fmt: skip
        details = None if whole else {"reason": "max_output_tokens"}
        yield self._event(status, response=self._response(status, usage=usage, incomplete_details=details))

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": f"response.{kind}", "sequence_number": self._number - 1} | fields

    def _place(self) -> dict[str, Any]:
        """Of the newest item."""
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _part(self, part: Part, logprobs: list[Any]) -> Iterator[dict[str, Any]]:
        kind, item = _ITEM_OF[part.kind], self.items[-1] if self.items else None
        if item is None or item["type"] != kind or item["status"] != "in_progress" or part.kind == "call":
            yield from self._close("completed")
            yield from self._open(kind, part)
            item = self.items[-1]
        if part.kind == "call":
            return
        more: dict[str, Any] = {}
        if part.kind == "arguments":
            item["arguments"] += part.text
        else:
            item["content"][0]["text"] += part.text
            more["content_index"] = 0
        if part.kind == "content":
            item["content"][0]["logprobs"] += logprobs
            more["logprobs"] = list(logprobs)
            logprobs.clear()
        yield self._event(f"{_EVENT_OF[kind]}.delta", delta=part.text, **more, **self._place())

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
        yield self._event("output_item.added", item=_copied(item), output_index=len(self.items) - 1)
        if content is not None:
            item["content"].append(content)
            yield self._event("content_part.added", content_index=0, part=dict(content), **self._place())

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        """End the item that is open, if one is."""
        item = self.items[-1] if self.items else None
        if item is None or item["status"] != "in_progress":
            return
        item["status"] = status
        done, place = f"{_EVENT_OF[item['type']]}.done", self._place()
        if item["type"] == "function_call":
            yield self._event(done, arguments=item["arguments"], **place)
        else:
            part = item["content"][0]
            more = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            yield self._event(done, text=part["text"], content_index=0, **more, **place)
            yield self._event("content_part.done", content_index=0, part=dict(part), **place)
        yield self._event("output_item.done", item=_copied(item), output_index=place["output_index"])


def _copied(item: Mapping[str, Any]) -> dict[str, Any]:
    """The item as it stands: more may come to it."""
    return {key: [dict(one) for one in value] if isinstance(value, list) else value for key, value in item.items()}


def _chat(body: ResponsesRequest) -> ChatRequest:
    """The same as a request for a chat. Raises `ApiError`."""
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    for place, item in enumerate(items):
        _add_item(messages, place, item)
    if not messages:
        raise invalid("input", "input must hold 1 item or more, got none")
    both = ChatRequest.model_fields.keys() & ResponsesRequest.model_fields.keys()
    values = {name: value for name in both if (value := getattr(body, name)) is not None}
    values |= {"messages": messages, "max_tokens": body.max_output_tokens, "logprobs": body.top_logprobs is not None}
    values["reasoning_effort"] = (body.reasoning or {}).get("effort")
    form = (body.text or {}).get("format")
    if isinstance(form, dict) and form.get("type") == "json_schema":
        values["response_format"] = {"type": "json_schema", "json_schema": {"schema": form.get("schema") or {}}}
    elif isinstance(form, dict) and form.get("type") != "text":
        values["response_format"] = form
    try:
        return ChatRequest.model_validate(values)
    except ValueError:
        raise invalid("reasoning", "reasoning.effort must be a short text") from None


def _add_item(messages: list[dict[str, Any]], place: int, item: Mapping[str, Any]) -> None:
    """One item of the input as a message; calls and reasoning belong to the assistant's message around them."""
    kind = item.get("type", "message")
    if kind == "message":
        last = messages[-1] if messages else {}
        if item.get("role") == "assistant" and "content" not in last and last.get("role") == "assistant":
            last["content"] = item.get("content")
        else:
            messages.append({"role": item.get("role"), "content": item.get("content")})
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
    elif kind == "reasoning":
        texts = [one.get("text") for one in item.get("content") or () if isinstance(one, Mapping)]
        reasoning = "".join(one for one in texts if isinstance(one, str))
        messages.append({"role": "assistant", "reasoning_content": reasoning})
    else:
        raise unsupported(f"input[{place}] of type {str(kind)[:40]}", "send messages, function calls and their outputs")
