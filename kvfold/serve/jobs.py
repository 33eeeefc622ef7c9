"""Requests in flight: handed to the engine off the event loop, their pieces brought back, cancelled when nobody reads on.

The engine delivers pieces on its own thread. They are collected, and one wake-up of the event loop brings all that a step
has made. Preparing a request (template, tokens, grammar) runs on worker threads, long ones apart from short ones, so that
one client's megabytes do not hold up another's line.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from kvfold.engine.engine import Engine, Piece
from kvfold.engine.request import Request
from kvfold.serve import watch
from kvfold.serve.errors import ApiError
from kvfold.serve.settings import ServerSettings

LONG_CHARACTERS = 32_768
"""Texts from this length on are prepared on threads of their own."""
Result = TypeVar("Result")


class Job:
    """One request of a client: several prompts, each with its `n` answers."""

    def __init__(self, jobs: "Jobs", name: str, answers: int, *, streams: bool):
        self.name, self.answers, self.streams = name, answers, streams
        self.requests: list[Request] = []
        """The engine's, by choice once all prompts are submitted."""
        self.began = time.monotonic()
        self.prompt_tokens = 0
        self._jobs = jobs
        self._left = answers
        self._pieces: deque[tuple[int, Piece]] = deque()
        self._news = asyncio.Event()
        self._closed = False

    def submit(self, asked: Sequence[Mapping[str, Any]]) -> None:
        """Hand all prompts to the engine; runs on a worker thread. Raises `ApiError` for what the engine refuses."""
        engine, first = self._jobs.engine, 0
        for one in asked:
            if self._closed:
                return
            try:
                self.requests += engine.submit(one, self._jobs.deliver_to(self, first), streams=self.streams)
            except ValueError as error:
                self.close()
                raise refused(error) from None
            except RuntimeError as error:
                raise ApiError(503, str(error), headers={"Retry-After": "5"}) from None
            first += one.get("n", 1)
        if self._closed:  # the client left meanwhile
            engine.cancel(self.requests)

    def close(self) -> None:
        """Nobody reads on: end what still runs."""
        self._closed = True
        if self.requests and self._left:
            self._jobs.engine.cancel(list(self.requests))

    def take(self, choice: int, piece: Piece) -> None:
        """One more piece, on the event loop."""
        self._pieces.append((choice, piece))
        self._news.set()

    async def batches(self, ping_s: float | None = None) -> AsyncIterator[list[tuple[int, Piece]]]:
        """Whatever is new, as (choice, piece), until all answers have ended; an empty list where `ping_s` passed without any."""
        while self._left:
            if not self._pieces:
                self._news.clear()
                # A timer of the loop's own: what asyncio.timeout does for a wait is a tenth of a streamed token's cost.
                timer = self._jobs.loop.call_later(ping_s, self._news.set) if ping_s is not None else None
                await self._news.wait()
                if timer is not None:
                    timer.cancel()
                if not self._pieces:
                    yield []
                    continue
            batch = list(self._pieces)
            self._pieces.clear()
            self._left -= sum(piece.finish_reason is not None for _, piece in batch)
            yield batch


class Jobs:
    """All requests in flight."""

    def __init__(self, engine: Engine, settings: ServerSettings, saw: Callable[[Job, int, Piece], None]):
        """`saw` is told each piece, on the event loop."""
        self.engine, self.settings, self._saw = engine, settings, saw
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
            raise ApiError(503, "the server is stopping", headers={"Retry-After": "10"})
        broken = watch.failure(self.engine)
        if broken is not None:
            raise ApiError(503, f"the engine can't take requests: {broken}", headers={"Retry-After": "10"})
        if answers > self.settings.max_answers:
            raise ApiError(
                400,
                f"prompts times n must be at most {self.settings.max_answers}, got {answers}: send several requests",
            )
        waiting = self.engine.stats()["waiting"]
        room = watch.max_running(self.engine) + self.settings.max_queue
        if self.answers + answers > room or (waiting and waiting + answers > self.settings.max_queue):
            wait = min(60, max(1, math.ceil(self.mean_duration_s)))
            raise ApiError(
                429, f"{self.answers} answers are being made or wait, and no more fit: try again in {wait} seconds",
                headers={"Retry-After": str(wait)},
            )  # fmt: skip
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
            self._saw(job, choice, piece)
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


def refused(error: ValueError) -> ApiError:
    """The engine's one-line refusal, with the field that it is about."""
    message = str(error)
    field = message.split(maxsplit=1)[0].strip(":'\"") if message else ""
    code = "context_length_exceeded" if "context" in message and "prompt" in message else None
    return ApiError(400, message, param=field if field.isidentifier() and field.islower() else None, code=code)
