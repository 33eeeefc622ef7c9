"""What a client is told when something is wrong: OpenAI's error object, with the status that its client libraries expect."""

import logging
import traceback
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

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
        return {
            "error": {
                "message": message, "type": _TYPES.get(self.status, "server_error"), "param": self.param,
                "code": self.code,
            }
        }  # fmt: skip

    def response(self) -> JSONResponse:
        """The same as a response."""
        return JSONResponse(self.body(), self.status, headers=dict(self.headers or {}))


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
