"""Who may ask, checked before anything is read: the key, the host that was called, the page that calls.

A server on this machine without a key is open to whatever runs here, and a browser runs other people's pages: a request
that comes from another origin is refused, and so is one that calls us by a foreign name (DNS rebinding).
"""

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvfold.serve.errors import ApiError, log_failure
from kvfold.serve.settings import ServerSettings

log = logging.getLogger("kvfold.serve")

OPEN_PATHS = ("/", "/health", "/ping", "/version", "/load", "/metrics", "/docs", "/openapi.json", "/favicon.ico")
"""Pages that need no key: they tell nothing of what anybody asked."""
LINGER_S = 2.0
"""Seconds for which the rest of a refused body is still taken, and thrown away."""
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_ALLOWED_HEADERS = "Authorization, Content-Type, X-Request-Id"


class Guard:
    """ASGI middleware around everything."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, responded: Callable[[int], None]):
        """`responded` is told the status of each response."""
        self.app, self._settings, self._responded = app, settings, responded
        self._keys = [key.encode() for key in settings.api_keys]
        self._hosts = {*_LOCAL_NAMES, settings.host} if settings.is_local else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, headers = time.monotonic(), Headers(scope=scope)
        origin = headers.get("origin")
        shares = origin is not None and self._shares_with(origin, headers.get("host", ""))
        status, unread = 0, "transfer-encoding" in headers or headers.get("content-length", "0") != "0"

        async def receive_noted() -> Message:
            nonlocal unread
            message = await receive()
            unread = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._responded(status)
                if shares:
                    message = message | {"headers": [*message["headers"], *self._sharing(origin)]}
            if unread and message["type"] == "http.response.body" and not message.get("more_body") and status != 408:
                # Closed with bytes of its body still under way, a connection is reset, and the client may never see why.
                await send(message | {"more_body": True})
                await _read_rest(receive)
                message = {"type": "http.response.body"}
            await send(message)

        try:
            error = self._refusal(scope, headers, origin, shares)
            if error is not None:
                await error.response()(scope, receive_noted, send_noted)
            elif shares and scope["method"] == "OPTIONS":
                await send_noted({"type": "http.response.start", "status": 204, "headers": []})
                await send_noted({"type": "http.response.body", "body": b""})
            else:
                await self.app(scope, receive_noted, send_noted)
        except Exception as error:
            # uvicorn would log its text too. A response that has begun is cut off; any other was sent as a 500.
            log_failure(error)
        finally:
            if scope["path"] not in OPEN_PATHS:
                seconds = time.monotonic() - began
                log.info(
                    "%s %s %d %.3f s",
                    scope["method"],
                    scope["path"].encode("ascii", "replace").decode(),
                    status,
                    seconds,
                )

    def _refusal(self, scope: Scope, headers: Headers, origin: str | None, shares: bool) -> ApiError | None:
        if self._hosts is not None and _host(headers.get("host", "")) not in self._hosts:
            return ApiError(403, "this server answers to localhost alone: start it with --host to let others in")
        if origin is not None and not shares:
            return ApiError(403, f"pages of {origin[:80]} may not ask here: start the server with --allowed-origins")
        length, most = headers.get("content-length", "0"), self._settings.max_body_bytes
        if length.isdecimal() and int(length) > most:
            # Before FastAPI's own limit, which answers in plain text; that one is for bodies of unknown length.
            message = f"the body must have at most {most} bytes, got {length[:20]}"
            return ApiError(413, message, headers={"Connection": "close"})
        if scope["method"] == "OPTIONS" or scope["path"] in OPEN_PATHS or not self._keys:
            return None
        if not self._has_key(headers.getlist("authorization")):
            return ApiError(
                401, "a valid API key is needed: send it as Authorization: Bearer KEY", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        return None

    def _has_key(self, authorizations: Sequence[str]) -> bool:
        if len(authorizations) != 1:
            return False
        scheme, _, key = authorizations[0].partition(" ")
        given = key.strip().encode("utf-8", "surrogateescape")
        # Every key is compared, each in constant time, so that the time tells nothing.
        matches = [hmac.compare_digest(given, one) for one in self._keys]
        return scheme.lower() == "bearer" and any(matches)

    def _shares_with(self, origin: str, host: str) -> bool:
        """Whether a page of this origin may ask: our own page, or one that the operator lets in."""
        allowed = self._settings.allowed_origins
        return "*" in allowed or origin in allowed or urlsplit(origin).netloc == host

    def _sharing(self, origin: str) -> list[tuple[bytes, bytes]]:
        return [
            (b"access-control-allow-origin", origin.encode("latin-1", "replace")),
            (b"access-control-allow-headers", _ALLOWED_HEADERS.encode()),
            (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
            (b"access-control-expose-headers", b"X-Request-Id, Retry-After"),
            (b"vary", b"Origin"),
        ]


async def _read_rest(receive: Receive) -> None:
    try:
        async with asyncio.timeout(LINGER_S):
            while (await receive()).get("more_body"):
                pass
    except TimeoutError:
        pass


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()
