"""The live page, and what it looks at: which tokens each head keeps, bytes held, requests in flight. No text of anybody's."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from kvfold.serve import watch
from kvfold.serve.errors import ApiError
from kvfold.serve.serving import Serving
from kvfold.serve.streaming import Stream, event

PAGE = Path(__file__).with_name("page.html")
LOOK_S = 0.25
"""Seconds between two looks at the engine."""
MAX_WATCHERS = 32
MAX_LISTED = 64
"""Answers that one event lists."""
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class _Looker:
    """Looks at the engine for all watchers together, `LOOK_S` apart."""

    def __init__(self, serving: Serving):
        self._serving = serving
        self._lock = asyncio.Lock()
        self._state: dict[str, Any] = {}
        self._at = -1.0
        self.watchers = 0

    async def state(self) -> dict[str, Any]:
        """What all watchers see."""
        async with self._lock:
            if time.monotonic() - self._at >= LOOK_S:
                self._state = await self._look()
                self._at = time.monotonic()
        return self._state

    async def _look(self) -> dict[str, Any]:
        serving = self._serving
        listed = [
            (job.name, choice, request)
            for job in list(serving.jobs.by_name.values())
            for choice, request in enumerate(list(job.requests))
        ][:MAX_LISTED]
        requests = [request for *_, request in listed]
        looked = await watch.on_engine(
            serving.engine, lambda: (watch.pool_use(serving.engine), watch.holdings(serving.engine, requests))
        )
        use, holdings = looked or ({}, [])
        stats = serving.engine.stats()
        return {
            "time": round(time.time(), 3), "pool": use, "pool_bytes": stats["pool_bytes"],
            "running": stats["running"], "waiting": stats["waiting"], "in_flight": serving.jobs.answers,
            "completion_tokens": stats["completion_tokens"],
            "requests": [
                {"id": name, "choice": choice} | watch.as_plain(holding)
                for (name, choice, _), holding in zip(listed, holdings, strict=False)
            ],
        }  # fmt: skip

    async def kept_map(self, name: str) -> dict[str, Any] | None:
        """Which tokens each head of one running request keeps; None where it holds nothing."""
        job = self._serving.jobs.by_name.get(name)
        if job is None or not job.requests:
            return None
        engine, request = self._serving.engine, job.requests[0]
        kept = await watch.on_engine(engine, lambda: watch.kept_positions(engine, request))
        if not kept:
            return None
        tokens = request.seen
        return {"tokens": tokens, "streams": [_bits(positions, tokens) for heads in kept for positions in heads]}


def _bits(positions: Sequence[int], tokens: int) -> str:
    """Base64 of one bit a token, the first token in the lowest bit of the first byte."""
    packed = bytearray((tokens + 7) // 8)
    for position in positions:
        if 0 <= position < tokens:
            packed[position >> 3] |= 1 << (position & 7)
    return base64.b64encode(packed).decode()


def add_routes(router: APIRouter, serving: Serving) -> None:
    """The page where the settings want it, and its two sources."""
    looker = _Looker(serving)
    page = PAGE.read_text(encoding="utf-8")

    if serving.settings.page:

        @router.get("/", response_class=HTMLResponse, include_in_schema=False)
        async def index() -> Response:
            """The live page."""
            return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer"})

    @router.get("/kvfold/model", tags=["live"])
    async def model() -> dict[str, Any]:
        """The model's layers and heads, and the methods loaded."""
        engine = serving.engine
        return {
            "model": serving.settings.model_names[0], "methods": list(serving.methods),
            "num_layers": watch.num_layers(engine), "owners": [list(one) for one in watch.owners(engine)],
            "full_bytes_per_token": serving.full_bytes_per_token, "max_model_len": serving.max_model_len,
            "chat": serving.template.exists, "pool_bytes": engine.stats()["pool_bytes"],
        }  # fmt: skip

    @router.get("/kvfold/live", response_model=None, tags=["live"])
    async def live(request: Request, once: bool = False, maps: str | None = None) -> Response:
        """Events: the engine's state, four times a second. `maps`: ids of requests, comma separated, whose kept tokens are
        told too. `once`: one JSON object instead.
        """
        names = [one for one in (maps or "").split(",") if one][:2]

        async def state() -> dict[str, Any]:
            found = {name: one for name in names if (one := await looker.kept_map(name))}
            return await looker.state() | {"maps": found}

        if once:
            return Response(event(await state())[6:].strip(), media_type="application/json")
        if looker.watchers >= MAX_WATCHERS:
            raise ApiError(429, "too many pages are watching: try again later", headers={"Retry-After": "10"})
        looker.watchers += 1

        async def events() -> AsyncIterator[bytes]:
            while not serving.jobs.stopping:
                yield event(await state())
                await asyncio.sleep(LOOK_S)

        def left() -> None:
            looker.watchers -= 1

        return Stream(events(), leave=left, headers={})
