"""Answers as objects of OpenAI's types and as server-sent events, and what happens when a client leaves early."""

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from kvfold.serve.errors import ApiError

DONE = format_sse_event(data_str="[DONE]")
PING = KEEPALIVE_COMMENT
Kind = TypeVar("Kind", bound=BaseModel)


def filled(kind: type[Kind], **fields: Any) -> Kind:
    """An object with just these fields, unchecked, as pydantic's `model_construct` makes it in a tenth of the time: `openai` puts
    a constructor in its place that walks through the type of every field, which costs more than all else that is done for a
    streamed token.
    """
    blank, names = _form(kind)
    extra = {name: fields.pop(name) for name in fields.keys() - names}
    made = kind.__new__(kind)
    for name, value in (
        ("__dict__", blank | fields), ("__pydantic_fields_set__", set(fields)), ("__pydantic_extra__", extra),
        ("__pydantic_private__", None),
    ):  # fmt: skip
        object.__setattr__(made, name, value)
    return made


@functools.cache
def _form(kind: type[BaseModel]) -> tuple[dict[str, Any], frozenset[str]]:
    """What a kind's optional fields are where nobody fills them, and the names of all."""
    fields = kind.model_fields
    blank = {name: one.get_default(call_default_factory=True) for name, one in fields.items() if not one.is_required()}
    return blank, frozenset(fields)


def event(data: BaseModel | dict[str, Any], name: str | None = None) -> bytes:
    """One event with JSON data."""
    if isinstance(data, dict):
        return format_sse_event(data_str=json.dumps(data, ensure_ascii=False), event=name)
    # Pydantic's JSON has no line breaks of its own, so that nothing is to be split for the wire.
    text = type(data).__pydantic_serializer__.to_json(data, exclude_unset=True)
    return b"%bdata: %b\n\n" % (b"event: %b\n" % name.encode() if name else b"", text)


def error_event(error: ApiError) -> bytes:
    """An error in a stream that has begun: the status is sent already."""
    body = error.body()
    body["error"]["code"] = body["error"]["code"] or error.status
    return event(body)


class Stream(EventSourceResponse):
    """A stream of events; whoever made it is told when it is over."""

    def __init__(self, content: AsyncIterator[bytes], *, leave: Callable[[], None], headers: dict[str, str]):
        """`leave` is called when the response is over, however that was."""
        super().__init__(content, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"} | headers)
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `StreamingResponse`."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


async def unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """What `work` gives; where the client leaves first, `work` is cancelled and `Gone` raised."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request))
    try:
        done, _ = await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        raise Gone
    finally:
        for one in (task, watcher):
            if not one.done():
                one.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


class Gone(Exception):
    """The client left before its answer was ready."""


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
