"""An HTTP request as a value that can be sent to another process, and a web application that answers it there without a
socket. No Ray here.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message

Header = tuple[bytes, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One request."""

    method: str
    path: str
    query: bytes = b""
    headers: tuple[Header, ...] = ()
    body: bytes = b""
    prompt: bytes = b""
    """What a router may compare with other calls, see prefix_routing.py."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """As much of a response as was there: its head with the first part, some of its body."""

    status: int = 0
    """0 in all parts but the first."""
    headers: tuple[Header, ...] = field(default=())
    body: bytes = b""


async def answered(app: ASGIApp, call: Call) -> AsyncIterator[Part]:
    """The application's response, part by part: all that it has sent since the last. Left early, the application is told
    that the client is gone, as a server would. Raises `RuntimeError` where the application fails in between.
    """
    sent: list[Message] = []
    news, gone = asyncio.Event(), asyncio.Event()
    body_left = True

    async def receive() -> Message:
        nonlocal body_left
        if body_left:
            body_left = False
            return {"type": "http.request", "body": call.body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        news.set()

    task = asyncio.ensure_future(app(_scope(call), receive, send))
    task.add_done_callback(lambda _: news.set())
    head: Message | None = None
    begun = whole = False
    try:
        while not whole:
            await news.wait()
            news.clear()
            failed, body = task.done(), b""
            taken, sent[:] = list(sent), []
            for message in taken:
                if message["type"] == "http.response.start":
                    head = message
                elif message["type"] == "http.response.body":
                    body += message.get("body", b"")
                    whole = not message.get("more_body", False)
            if begun and body:
                yield Part(body=body)
            elif not begun and head is not None and (body or whole):
                # The head waits for the first of the body, so that nothing has begun where an answer fails early.
                begun = True
                yield Part(status=head["status"], headers=tuple(head.get("headers", ())), body=body)
            if failed and not whole:
                raise RuntimeError("the application ended before its response did")
    finally:
        gone.set()
        if not whole:
            task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


def _scope(call: Call) -> dict[str, Any]:
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": call.method,
        "scheme": "http", "path": call.path, "raw_path": call.path.encode(), "query_string": call.query, "root_path": "",
        "headers": list(call.headers), "client": None, "server": None,
    }  # fmt: skip
