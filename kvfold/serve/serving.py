"""What all endpoints share: how the server is set up, one engine, its tokenizer and template, requests in flight, their checks.

The engine delivers pieces on its own thread. They are collected, and one wake-up of the event loop brings all that a step
has made. Preparing a request (template, tokens, grammar) runs on worker threads, long ones apart from short ones, so that
one client's megabytes do not hold up another's line.
"""

import asyncio
import ipaddress
import logging
import math
import re
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

from fastapi import Request as HttpRequest

from kvfold.engine.engine import Engine, Piece
from kvfold.engine.request import Request
from kvfold.errors import UserError
from kvfold.serve.fields import Base, check_structured
from kvfold.serve.prompts import ChatTemplate, Tokens
from kvfold.serve.replies import ApiError, busy, invalid
from kvfold.serve.watch import Metrics

_LEAST = {
    "max_model_len": 1, "max_body_bytes": 1024, "max_queue": 0, "max_answers": 1, "max_connections": 1, "max_logprobs": 0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Everything about a server that is not the engine's business."""

    model_names: tuple[str, ...]
    """Names under which clients may ask for the model; answers carry the first one."""
    host: str = "127.0.0.1"
    """Address to listen on. Only this machine reaches a loopback address."""
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    """A client must send one of these as its bearer token; none = everybody may ask."""
    allowed_origins: tuple[str, ...] = ()
    """Web pages of other origins that may ask, e.g. `https://chat.example.org`; `*` = all."""
    max_model_len: int | None = None
    """Tokens of prompt and answer together, at most; None = the model's context."""
    chat_template: str | None = None
    """A Jinja template in place of the tokenizer's own."""
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Sampling fields that hold where a request names none, such as the generation config's temperature."""
    max_body_bytes: int = 8 << 20
    """Size of a request's body, at most."""
    max_queue: int = 256
    """Answers that may wait for a place in the engine; more requests get status 429."""
    max_answers: int = 128
    """Answers to one request at most: its prompts times its `n`."""
    max_logprobs: int = 20
    """Likeliest tokens that a request may ask for at each position."""
    max_connections: int = 1024
    """Connections that may be open at once; more get status 503."""
    request_timeout_s: float = 600.0
    """Seconds after which an answer ends with what it has."""
    header_timeout_s: float = 10.0
    """Seconds in which a client must have sent a request's headers."""
    body_timeout_s: float = 30.0
    """Seconds in which a client must have sent a request's body."""
    send_timeout_s: float = 30.0
    """Seconds that a client may take no byte of its answer before it is given up."""
    idle_timeout_s: float = 60.0
    """Seconds that a connection may stay open between two requests."""
    ping_s: float = 15.0
    """Seconds without a token after which a stream carries a comment, so that proxies keep it open."""
    shutdown_timeout_s: float = 30.0
    """Seconds that running requests have to finish once the server is told to stop."""
    log_requests: bool = False
    """Write prompts and answers to the log."""
    page: bool = True
    """Serve the live page at `/`."""

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise UserError("a server needs 1 name for its model or more, got none: give for example 'llama'")
        if not 0 <= self.port <= 65535:
            raise UserError(f"port must be at least 0 and at most 65535, got {self.port} (for example 8000)")
        if not all(key.strip() for key in self.api_keys):
            raise UserError("api_key must have 1 character or more, got an empty one: leave it out for no key")
        for name in self.__slots__:
            value = getattr(self, name)
            if name.endswith("_s") and not value > 0:
                raise UserError(f"{name} must be more than 0 seconds, got {value} (for example 30)")
            if value is not None and name in _LEAST and value < _LEAST[name]:
                raise UserError(f"{name} must be at least {_LEAST[name]}, got {value}")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        with suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host == "localhost"


log = logging.getLogger("kvfold.serve")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:+/=-]{1,128}")
LONG_CHARACTERS = 32_768
"""Texts from this length on are prepared on threads of their own."""
Result = TypeVar("Result")


class Job:
    """One request of a client: several prompts, each with its `n` answers."""

    def __init__(self, serving: "Serving", name: str, answers: int, *, streams: bool):
        self.name, self.answers, self.streams = name, answers, streams
        self.requests: list[Request] = []
        """The engine's, by choice once all prompts are submitted."""
        self.began = time.monotonic()
        self.prompt_tokens = 0
        self._serving, self._left = serving, answers
        self._pieces: deque[tuple[int, Piece]] = deque()
        self._news = asyncio.Event()
        self._closed = False

    def submit(self, asked: Sequence[Mapping[str, Any]]) -> None:
        """Hand all prompts to the engine; runs on a worker thread. Raises `ApiError` for what the engine refuses."""
        engine, first = self._serving.engine, 0
        for one in asked:
            if self._closed:
                return
            try:
                self.requests += engine.submit(one, self._serving.deliver_to(self, first), streams=self.streams)
            except ValueError as error:
                self.close()
                raise _refused(error) from None
            except RuntimeError as error:
                raise busy(503, str(error), 5) from None
            first += one.get("n", 1)
        if self._closed:  # the client left meanwhile
            engine.cancel(self.requests)

    def close(self) -> None:
        """Nobody reads on: end what still runs."""
        self._closed = True
        if self.requests and self._left:
            self._serving.engine.cancel(list(self.requests))

    def take(self, choice: int, piece: Piece) -> None:
        """One more piece, on the event loop."""
        self._pieces.append((choice, piece))
        self._news.set()

    async def batches(self, ping_s: float | None = None) -> AsyncIterator[list[tuple[int, Piece]]]:
        """Whatever is new, as (choice, piece), until all answers have ended; an empty list where `ping_s` passed without
        any. Raises `ApiError` for an answer that failed.
        """
        while self._left:
            if not self._pieces:
                self._news.clear()
                # A timer of the loop's own: what asyncio.timeout does for a wait is a tenth of a streamed token's cost.
                timer = self._serving.loop.call_later(ping_s, self._news.set) if ping_s is not None else None
                await self._news.wait()
                if timer is not None:
                    timer.cancel()
                if not self._pieces:
                    yield []
                    continue
            batch = list(self._pieces)
            self._pieces.clear()
            for _, piece in batch:
                self._left -= piece.finish_reason is not None
                if piece.finish_reason in ("error", "abort"):
                    raise self._serving.failure(piece)
            yield batch


def _refused(error: ValueError) -> ApiError:
    """The engine's one-line refusal, with the field that it is about."""
    message = str(error)
    field = message.split(maxsplit=1)[0].strip(":'\"") if message else ""
    code = "context_length_exceeded" if "context" in message and "prompt" in message else None
    return ApiError(400, message, param=field if field.isidentifier() and field.islower() else None, code=code)


class Serving:
    """One engine behind one server, and all requests in flight."""

    def __init__(self, engine: Engine, settings: ServerSettings):
        """Raises `UserError` where the engine has no tokenizer."""
        if engine.tokenizer is None:
            raise UserError("a server needs a tokenizer, and the engine has none: load one and give it to the engine")
        self.engine, self.settings = engine, settings
        self.max_model_len = settings.max_model_len or engine.context
        if self.max_model_len > engine.context:
            raise UserError(
                f"max_model_len must be at most the model's context of {engine.context} tokens, got {self.max_model_len}"
            )
        self.tokens = Tokens(engine.tokenizer, self.max_model_len)
        self.template = ChatTemplate(self.tokens, settings.chat_template)
        self.metrics = Metrics(settings.model_names[0])
        self.created = int(time.time())
        self.by_name: dict[str, Job] = {}
        self.answers = 0
        """Answers being made or waiting."""
        self.stopping = False
        self.mean_duration_s = 1.0
        self.loop: asyncio.AbstractEventLoop | None = None
        self._outbox: deque[tuple[Job, int, Piece]] = deque()
        self._woken = False
        self._short = ThreadPoolExecutor(2, thread_name_prefix="kvfold short requests")
        self._long = ThreadPoolExecutor(2, thread_name_prefix="kvfold long requests")

    def open(self, name: str, answers: int, *, streams: bool) -> Job:
        """A place for one more request. Raises `ApiError` 429 where too many wait, 503 where the server is stopping."""
        self.loop = self.loop or asyncio.get_running_loop()
        if self.stopping:
            raise busy(503, "the server is stopping", 10)
        if self.engine.stopped is not None:
            raise busy(503, f"the engine can't take requests: {self.engine.stopped}", 10)
        most = self.settings.max_answers
        if answers > most:
            raise ApiError(400, f"prompts times n must be at most {most}, got {answers}: send several requests")
        waiting = self.engine.stats()["waiting"]
        room = self.engine.max_running + self.settings.max_queue
        if self.answers + answers > room or (waiting and waiting + answers > self.settings.max_queue):
            wait = min(60, max(1, math.ceil(self.mean_duration_s)))
            message = f"{self.answers} answers are being made or wait, and no more fit: try again in {wait} seconds"
            raise busy(429, message, wait)
        while name in self.by_name:
            name += "+"
        job = Job(self, name, answers, streams=streams)
        self.by_name[name] = job
        self.answers += answers
        return job

    def leave(self, job: Job) -> None:
        """The request is over, however that was."""
        job.close()
        if self.by_name.pop(job.name, None) is not None:
            self.answers -= job.answers
            self.mean_duration_s += 0.1 * (time.monotonic() - job.began - self.mean_duration_s)

    async def prepare(self, work: Callable[[], Result], *, characters: int) -> Result:
        """Run `work` on a worker thread. `characters`: how much text it reads, to choose the thread."""
        pool = self._long if characters > LONG_CHARACTERS else self._short
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    def deliver_to(self, job: Job, first: int) -> Callable[[Piece], None]:
        """For the engine's thread: takes the pieces of the answers from choice `first` on."""

        def deliver(piece: Piece) -> None:
            self._outbox.append((job, first + piece.index, piece))
            if not self._woken:
                self._woken = True
                self.loop.call_soon_threadsafe(self._distribute)

        return deliver

    def _distribute(self) -> None:
        self._woken = False  # before the first is taken: whatever comes meanwhile wakes us again, or is taken now
        while self._outbox:
            job, choice, piece = self._outbox.popleft()
            self.metrics.saw(job, choice, piece)
            job.take(choice, piece)

    def cancel_all(self) -> None:
        """End all answers; each client gets what there is."""
        for job in list(self.by_name.values()):
            self.engine.cancel(list(job.requests))

    def close(self) -> None:
        """No more requests; running ones are ended."""
        self.stopping = True
        self.cancel_all()
        for pool in (self._short, self._long):
            pool.shutdown(wait=False, cancel_futures=True)

    def check(self, body: Base) -> str:
        """The model's name as this client calls it. Raises `ApiError` for another model and for what can't be honoured."""
        body.refuse_unsupported()
        name = self.model_name(body.model)
        most = self.settings.max_logprobs
        for param in ("logprobs", "top_logprobs", "prompt_logprobs"):
            value = getattr(body, param, None)
            if value is not None and value is not True and not 0 <= value <= most:
                raise invalid(param, f"{param} must be at least 0 and at most {most}, got {value}")
        return name

    def model_name(self, name: str | None) -> str:
        """A served name, the first where none is asked for. Raises `ApiError` for others."""
        names = self.settings.model_names
        if name is not None and name not in names:
            message = f"model must be one of {', '.join(names)}, got {name[:80]!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name or names[0]

    def request_id(self, request: HttpRequest, body: Base) -> str:
        """The client's own name for its request, or a new one."""
        for name in (body.request_id, request.headers.get("x-request-id")):
            if name and _REQUEST_ID.fullmatch(name):
                return name
        return secrets.token_hex(12)

    def asked(
        self, sampling: Mapping[str, Any], ids: Sequence[int], *, default_max_tokens: int | None
    ) -> dict[str, Any]:
        """The engine's request for one prompt. Raises `ApiError` where prompt and answer don't fit into the context."""
        room = self.max_model_len - len(ids)
        if room < 1:
            raise self.tokens.too_long(len(ids))
        asked = {"max_tokens": default_max_tokens, **sampling, "prompt": list(ids)}
        most = asked["max_tokens"]
        if most is None and self.max_model_len < self.engine.context:
            asked["max_tokens"] = room  # the engine's own reading of none is all that context and memory allow
        elif isinstance(most, int) and most > room:
            raise ApiError(
                400, f"max_tokens must be at most {room} behind a prompt of {len(ids)} tokens in a context of "
                f"{self.max_model_len}, got {most}", param="max_tokens", code="context_length_exceeded",
            )  # fmt: skip
        asked["timeout"] = self.settings.request_timeout_s
        check_structured(asked)
        return asked

    def log_text(self, name: str, what: str, text: object) -> None:
        """Prompts and answers are logged only where the operator asked for it."""
        if self.settings.log_requests:
            log.info("%s %s %r", name, what, text)

    def failure(self, piece: Piece) -> ApiError:
        """Why an answer ended without being one."""
        if piece.finish_reason == "abort":
            return busy(503, "the server is stopping: the answer was cut off", 10)
        message = piece.error or "the engine failed"
        broken = message.startswith("the model failed") or self.engine.stopped is not None
        return ApiError(500 if broken else 400, message)
