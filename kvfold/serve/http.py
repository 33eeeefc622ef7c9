"""Around the application: uvicorn with limits on slow clients and an end that lets answers finish, and the guard, who may ask.

The guard looks before anything is read: at the key, the host that was called, the page that calls. A server on this machine
without a key is open to whatever runs here, and a browser runs other people's pages: a request that comes from another
origin is refused, and so is one that calls us by a foreign name (DNS rebinding).
"""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from urllib.parse import urlsplit

import h11
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from kvfold.serve.replies import ApiError, log_failure
from kvfold.serve.serving import ServerSettings, Serving

log = logging.getLogger("kvfold.serve")

OPEN_PATHS = ("/", "/health", "/ping", "/version", "/load", "/metrics", "/docs", "/openapi.json", "/favicon.ico")
"""Pages that need no key: they tell nothing of what anybody asked."""
LINGER_S = 2.0
"""Seconds for which the rest of a refused body is still taken, and thrown away."""
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


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
                    message = {**message, "headers": [*message["headers"], *self._sharing(origin)]}
            if unread and message["type"] == "http.response.body" and not message.get("more_body") and status != 408:
                # Closed with bytes of its body still under way, a connection is reset, and the client may never see why.
                await send({**message, "more_body": True})
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
                path = scope["path"].encode("ascii", "replace").decode()
                log.info("%s %s %d %.3f s", scope["method"], path, status, time.monotonic() - began)

    def _refusal(self, scope: Scope, headers: Headers, origin: str | None, shares: bool) -> ApiError | None:
        if self._hosts is not None and _host(headers.get("host", "")) not in self._hosts:
            return ApiError(403, "this server answers to localhost alone: start it with --host to let others in")
        if origin is not None and not shares:
            return ApiError(
                403, f"pages of {origin[:80]} may not ask here: the server's allowed_origins would let them in"
            )
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
            (b"access-control-allow-headers", b"Authorization, Content-Type, X-Request-Id"),
            (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
            (b"access-control-expose-headers", b"X-Request-Id, Retry-After"),
            (b"vary", b"Origin"),
        ]


async def _read_rest(receive: Receive) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while (await receive()).get("more_body"):
                pass


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()


MAX_HEADER_BYTES = 32 << 10
LAST_WORDS_S = 5
"""Seconds in which cut-off streams are told so, after the shutdown's own time."""


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with two more clocks, for headers that don't come and for answers that aren't taken, and
    with refusals that arrive.
    """

    settings: ServerSettings
    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See uvicorn."""
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        """See uvicorn."""
        if self._refused:
            return  # thrown away
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """See uvicorn."""
        for timer in (self._header_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._header_timer = self._write_timer = None
        super().connection_lost(exc)

    def _watch_headers(self) -> None:
        """While headers are incomplete one clock runs, which no further byte sets back."""
        incomplete = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None and not self._refused
        if incomplete and self._header_timer is None and not self.transport.is_closing():
            self._header_timer = self.loop.call_later(self.settings.header_timeout_s, self.transport.abort)
        elif not incomplete and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def send_400_response(self, msg: str) -> None:
        """For what is no HTTP. What is still under way is taken for a while, since a reset could overtake the answer."""
        self._refused = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # an answer is under way: there is no place for another
            return
        refusal = ApiError(400, f"the request must be HTTP/1.1 with at most {MAX_HEADER_BYTES >> 10} KiB of headers")
        body = json.dumps(refusal.body()).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        headers.append((b"connection", b"close"))
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)

    def pause_writing(self) -> None:
        """See uvicorn."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.settings.send_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """See uvicorn."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """See uvicorn."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # the last answer was never taken
        else:
            super().timeout_keep_alive_handler()


class Server(uvicorn.Server):
    """Told to stop, it takes no more requests, gives running ones `shutdown_timeout_s`, and ends the rest cleanly."""

    def __init__(self, app: FastAPI, say: Callable[[str], None] = log.info):
        """`say` is told where it listens, once it does."""
        self.serving: Serving = app.state.serving
        self._say, settings = say, self.serving.settings
        super().__init__(uvicorn.Config(
            app, host=settings.host, port=settings.port, ws="none", lifespan="on", log_config=None, access_log=False,
            http=type("PatientProtocol", (PatientProtocol,), {"settings": settings}), server_header=False,
            limit_concurrency=settings.max_connections, timeout_keep_alive=settings.idle_timeout_s,
            timeout_graceful_shutdown=round(settings.shutdown_timeout_s) + LAST_WORDS_S,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES, proxy_headers=False, backlog=512,
        ))  # fmt: skip

    async def startup(self, sockets: list | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        if self.started:
            settings = self.serving.settings
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            url = f"http://{host}:{self.bound_port}"
            self._say(
                f"{settings.model_names[0]} at {url}/v1 · methods {', '.join(self.serving.engine.methods)} · page {url}/"
            )

    @property
    def bound_port(self) -> int:
        """The port that is listened on, once started; of interest where port 0 was asked for."""
        return self.servers[0].sockets[0].getsockname()[1]

    async def shutdown(self, sockets: list | None = None) -> None:
        """See uvicorn."""
        serving, seconds = self.serving, self.serving.settings.shutdown_timeout_s
        serving.stopping = True
        if serving.answers:
            log.info("stopping: %d answers have %g s to finish", serving.answers, seconds)
        timer = asyncio.get_running_loop().call_later(seconds, serving.cancel_all)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
