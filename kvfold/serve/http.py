"""Running the application: uvicorn, with limits on slow clients and an end that lets answers finish."""

import asyncio
import json
import logging
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from kvfold.serve.errors import ApiError
from kvfold.serve.guard import LINGER_S
from kvfold.serve.serving import Serving
from kvfold.serve.settings import ServerSettings

log = logging.getLogger("kvfold.serve")
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


def protocol_for(settings: ServerSettings) -> type[H11Protocol]:
    """The protocol with its settings: uvicorn makes one for each connection."""
    return type("PatientProtocol", (PatientProtocol,), {"settings": settings})


class Server(uvicorn.Server):
    """Told to stop, it takes no more requests, gives running ones `shutdown_timeout_s`, and ends the rest cleanly."""

    def __init__(self, app: FastAPI, **options: Any):
        """`options` of `uvicorn.Config`."""
        self.serving: Serving = app.state.serving
        settings = self.serving.settings
        config = uvicorn.Config(
            app, **{
                "host": settings.host, "port": settings.port, "http": protocol_for(settings), "ws": "none",
                "lifespan": "on", "log_config": None, "access_log": False, "server_header": False,
                "limit_concurrency": settings.max_connections, "timeout_keep_alive": settings.idle_timeout_s,
                "timeout_graceful_shutdown": round(settings.shutdown_timeout_s) + LAST_WORDS_S,
                "h11_max_incomplete_event_size": MAX_HEADER_BYTES, "proxy_headers": False, "backlog": 512,
            } | options,
        )  # fmt: skip
        super().__init__(config)

    @property
    def bound_port(self) -> int:
        """The port that is listened on, once started; of interest where port 0 was asked for."""
        return self.servers[0].sockets[0].getsockname()[1]

    async def shutdown(self, sockets: list | None = None) -> None:
        """See uvicorn."""
        jobs = self.serving.jobs
        jobs.stopping = True
        if jobs.answers:
            log.info("stopping: %d answers have %g s to finish", jobs.answers, self.serving.settings.shutdown_timeout_s)
        timer = asyncio.get_running_loop().call_later(self.serving.settings.shutdown_timeout_s, jobs.cancel_all)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
