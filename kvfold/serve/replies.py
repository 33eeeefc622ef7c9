"""What goes back to a client: OpenAI's objects and server-sent events; its error object where something is wrong, with the status
that client libraries expect; and what happens when a client leaves early.
"""

import asyncio
import functools
import json
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

log = logging.getLogger("kvfold.serve")

_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 415: "invalid_request_error",
    429: "rate_limit_error", 503: "service_unavailable_error",
}  # fmt: skip
MAX_MESSAGE = 600
"""Characters of a message: some hold what the client sent."""


class ApiError(Exception):
    """Ends a request with a status and one line for the client."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):  # fmt: skip
        """`param`: the field that is wrong. `code`: a word for programs, such as `context_length_exceeded`."""
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        message = " ".join(self.message.split())
        if len(message) > MAX_MESSAGE:
            message = message[: MAX_MESSAGE - 3] + "..."
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The same as a response."""
        return JSONResponse(self.body(), self.status, headers=dict(self.headers or {}))


def invalid(field: str | None, message: str) -> ApiError:
    """For a field that holds what can't be meant."""
    return ApiError(400, message, param=field)


def busy(status: int, message: str, seconds: int) -> ApiError:
    """For a request that may be sent once more after so many seconds."""
    return ApiError(status, message, headers={"Retry-After": str(seconds)})


def unsupported(field: str, remedy: str) -> ApiError:
    """For a field that would change the answer's meaning and can't be honoured."""
    return ApiError(400, f"{field} is not supported: {remedy}", param=field, code="unsupported_parameter")


def add_handlers(app: FastAPI) -> None:
    """Every way in which a request can fail ends in OpenAI's error object."""

    @app.exception_handler(ApiError)
    async def _(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        messages = {
            404: f"no such page: {request.url.path}",
            405: f"{request.url.path} does not take {request.method}",
            413: "the request's body is larger than this server takes",
        }
        message = messages.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> JSONResponse:
        # The guard logs it; Starlette raises it again once this response is sent.
        return ApiError(500, "the server failed; its log says more").response()


def log_failure(error: BaseException) -> None:
    """Where a mistake of ours happened, without its text: that could hold a piece of a prompt."""
    frames = "".join(traceback.format_tb(error.__traceback__)[-6:])
    log.error("%s at\n%s", type(error).__name__, frames.rstrip())


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
    text = type(data).__pydantic_serializer__.to_json(data, exclude_unset=True, by_alias=True)
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
    """What `work` gives; where the client leaves first, `work` is cancelled and `ClientDisconnect` raised."""
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        return await task
    except asyncio.CancelledError:
        raise (ClientDisconnect if watcher.done() else asyncio.CancelledError) from None
    finally:
        watcher.cancel()
