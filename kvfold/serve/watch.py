"""What the server asks of the engine besides answers, and what it tells of it: numbers for Prometheus, under vLLM's names and
with what only a compressed cache has to tell; and the live page, with which tokens each head keeps. No text of anybody's.

All that this room knows of the engine's inside is here, so that the engine can change without the rest.
"""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

import kvfold
from kvfold.engine.engine import Engine, Piece
from kvfold.engine.request import Request
from kvfold.engine.runner import SequenceView
from kvfold.serve.replies import Stream, busy, event

if TYPE_CHECKING:
    from kvfold.serve.serving import Job, Serving

Result = TypeVar("Result")


def _owners(engine: Engine) -> list[tuple[int, int]]:
    """Layers that have KV of their own, with their number of KV heads."""
    layout = engine.model.config.layout
    return [(owner, layout.layers[owner].num_kv_heads) for owner in layout.owners]


async def on_engine(engine: Engine, ask: Callable[[], Result], timeout_s: float = 2.0) -> Result | None:
    """What `ask` gives when it is called between two steps on the engine's thread; None where the engine is too busy."""
    if engine.stopped is not None or engine._thread is None:
        return None
    future: Future[Result] = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(ask())
        except Exception as error:  # never the engine's trouble
            future.set_exception(error)

    engine._inbox.put(run)
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), timeout_s)
    except TimeoutError:
        return None


async def _looked(
    engine: Engine, requests: Callable[[], Sequence[Request]]
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Bytes of the pool by use, and what each of these answers holds; nothing where the engine is too busy."""
    looked = await on_engine(engine, lambda: (_pool_use(engine), [_holding(engine, one) for one in requests()]))
    return looked or ({}, [])


def _holding(engine: Engine, request: Request) -> dict[str, Any]:
    """What one answer holds, in plain values. `kept`: entries by owner, ascending, then by KV head; empty while it waits."""
    kept: list[list[int]] = []
    held, runner = 0, engine._runner
    if request.handle is not None and not request.is_finished:
        streams = iter(runner.kept(request.method, request.handle))
        kept = [list(islice(streams, number)) for _, number in _owners(engine)]
        held = runner.held_bytes(request.method, request.handle)
    return {
        "method": request.method, "seen_tokens": request.seen, "kept": kept, "kv_bytes": held,
        "prompt_tokens": request.prompt_tokens, "completion_tokens": request.num_outputs,
    }  # fmt: skip


def _pool_use(engine: Engine) -> dict[str, int]:
    """Bytes of the pool by use."""
    stats, prefixes = engine.stats(), engine._scheduler.prefixes
    prefix_bytes = engine._runner.freeable_bytes(prefixes.snapshots) if len(prefixes) else 0
    used = stats["pool_bytes"] - stats["free_bytes"]
    return {"prefixes": prefix_bytes, "requests": max(0, used - prefix_bytes), "free": stats["free_bytes"]}


def demand_bytes(engine: Engine) -> int:
    """Bytes that running requests hold and those that wait will take; to be called through `on_engine`."""
    waiting = sum(engine._budget.growth(request, 0) for request in engine._scheduler.waiting)
    return _pool_use(engine)["requests"] + waiting


# Counters and histograms are kept here, on the event loop; gauges are read from the engine when somebody looks.

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_METRICS: dict[str, tuple] = {
    "time_to_first_token_seconds": (Histogram, "From a request to its first token"),
    "inter_token_latency_seconds": (Histogram, "Between two tokens of a streamed answer"),
    "e2e_request_latency_seconds": (Histogram, "From a request to its last token"),
    "request_prompt_tokens": (Histogram, "Tokens of a prompt"),
    "request_generation_tokens": (Histogram, "Tokens of an answer"),
    "prompt_tokens": (Counter, "Tokens of prompts whose answers ended"),
    "generation_tokens": (Counter, "Tokens generated"),
    "prompt_tokens_cached": (Counter, "Tokens of prompts that a stored prefix saved from being read"),
    "seen_tokens": (Counter, "Tokens that the cache saw, of answers that ended"),
    "kept_tokens": (Counter, "Tokens that it still held at their end, the mean over KV heads"),
    "request_success": (Counter, "Answers by how they ended", "finished_reason"),
    "http_responses": (Counter, "Responses by status", "status"),
    "num_preemptions": (Counter, "Answers that gave up their memory and were read again"),
    "prefix_cache_queries": (Counter, "Answers that looked for a stored prefix"),
    "prefix_cache_hits": (Counter, "Answers that found one"),
    "read_tokens": (Counter, "Tokens read as prompts, those read again after a preemption included"),
    "num_requests_running": (Gauge, "Answers that hold a sequence"),
    "num_requests_waiting": (Gauge, "Answers that wait for memory or a place"),
    "kv_pool_bytes": (Gauge, "Bytes reserved for the cache"),
    "kv_pool_use_bytes": (Gauge, "Bytes of the pool by use", "use"),
    "kv_cache_usage_perc": (Gauge, "Share of the pool in use"),
    "kv_estimate_error": (Gauge, "Mean of |estimated / held - 1| over prompts read, learned methods"),
    "kv_seen_tokens": (Gauge, "Tokens seen by running answers"),
    "kv_kept_tokens": (Gauge, "Tokens held for them, the mean over KV heads"),
    "kv_owner_compression": (Gauge, "Tokens seen over tokens kept by running answers", "owner"),
    "prefix_snapshots": (Gauge, "Stored prefixes"),
}
"""By name: the kind, what it says, and the label that it has beside the model's name."""
_STATS = {
    "num_requests_running": "running", "num_requests_waiting": "waiting", "kv_pool_bytes": "pool_bytes",
    "kv_estimate_error": "estimate_error", "prefix_snapshots": "prefixes", "num_preemptions": "preemptions",
    "prefix_cache_queries": "prefix_queries", "prefix_cache_hits": "prefix_hits", "read_tokens": "prompt_tokens",
}  # fmt: skip
"""Metrics that the engine counts itself, by its own names."""


class Metrics:
    """The numbers of one server."""

    def __init__(self, model: str):
        """`model`: the label that all of them carry."""
        self._model, self._registry = model, CollectorRegistry()
        self._all: dict[str, Any] = {}
        for name, (kind, text, *label) in _METRICS.items():
            buckets = {"buckets": _SECONDS if name.endswith("_seconds") else _TOKENS} if kind is Histogram else {}
            metric = kind(f"kvfold:{name}", text, ("model_name", *label), registry=self._registry, **buckets)
            self._all[name] = metric if label else metric.labels(model)
        self._counted: Mapping[str, Any] = {}
        self._last: dict[tuple[int, int], float] = {}

    def responded(self, status: int) -> None:
        """A response was begun."""
        self._all["http_responses"].labels(self._model, str(status)).inc()

    def saw(self, job: "Job", choice: int, piece: Piece) -> None:
        """A piece of an answer came from the engine."""
        now, key = time.monotonic(), (id(job), choice)
        if piece.token_ids and job.streams:
            before = self._last.get(key)
            if before is None:
                self._all["time_to_first_token_seconds"].observe(now - job.began)
            else:
                # Several tokens in one piece came together: each took its share.
                for _ in piece.token_ids:
                    self._all["inter_token_latency_seconds"].observe((now - before) / len(piece.token_ids))
            self._last[key] = now
        self._all["generation_tokens"].inc(len(piece.token_ids))
        if piece.finish_reason is None:
            return
        self._last.pop(key, None)
        self._all["request_success"].labels(self._model, piece.finish_reason).inc()
        self._all["e2e_request_latency_seconds"].observe(now - job.began)
        usage = piece.usage
        if usage is None:
            return
        self._all["request_prompt_tokens"].observe(usage.prompt_tokens)
        self._all["request_generation_tokens"].observe(usage.completion_tokens)
        for name, number in (
            ("prompt_tokens", usage.prompt_tokens), ("prompt_tokens_cached", usage.cached_tokens),
            ("seen_tokens", usage.seen_tokens), ("kept_tokens", usage.kept_tokens),
        ):  # fmt: skip
            self._all[name].inc(number)

    def text(self, engine: Engine, use: Mapping[str, int], holdings: Sequence[Mapping[str, Any]]) -> bytes:
        """Everything, in Prometheus' text form. `use`: bytes of the pool by use. `holdings`: of the running answers."""
        stats, every = engine.stats(), self._all
        for name, key in _STATS.items():
            if _METRICS[name][0] is Gauge:
                every[name].set(stats[key])
            else:
                every[name].inc(stats[key] - self._counted.get(key, 0))
        self._counted = stats
        every["kv_cache_usage_perc"].set(1 - stats["free_bytes"] / max(1, stats["pool_bytes"]))
        for name, number in use.items():
            every["kv_pool_use_bytes"].labels(self._model, name).set(number)
        holdings = [one for one in holdings if one["kept"]]
        seen = sum(one["seen_tokens"] for one in holdings)
        every["kv_seen_tokens"].set(seen)
        every["kv_kept_tokens"].set(sum(sum(map(sum, one["kept"])) / sum(map(len, one["kept"])) for one in holdings))
        for place, (owner, heads) in enumerate(_owners(engine)):
            kept = sum(sum(one["kept"][place]) for one in holdings) / heads
            every["kv_owner_compression"].labels(self._model, str(owner)).set(seen / kept if kept else 1.0)
        return generate_latest(self._registry)


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

    def __init__(self, serving: "Serving"):
        self._serving, self._lock = serving, asyncio.Lock()
        self._state: dict[str, Any] = {}
        self._at = -1.0
        self.watchers = 0

    async def state(self) -> dict[str, Any]:
        """What all watchers see."""
        serving, engine = self._serving, self._serving.engine
        async with self._lock:
            if time.monotonic() - self._at < LOOK_S:
                return self._state
            jobs = list(serving.by_name.values())
            listed = [(job.name, *one) for job in jobs for one in enumerate(list(job.requests))][:MAX_LISTED]
            use, holdings = await _looked(engine, lambda: [request for *_, request in listed])
            stats, rows = engine.stats(), zip(listed, holdings, strict=False)
            self._state = {
                "time": round(time.time(), 3), "pool": use, "in_flight": serving.answers,
                **{name: stats[name] for name in ("pool_bytes", "running", "waiting", "completion_tokens")},
                "requests": [{"id": name, "choice": choice} | holding for (name, choice, _), holding in rows],
            }  # fmt: skip
            self._at = time.monotonic()
        return self._state

    async def kept_map(self, name: str) -> dict[str, Any] | None:
        """Which tokens each head of one running request keeps; None where it holds nothing."""
        job, engine = self._serving.by_name.get(name), self._serving.engine
        request = job.requests[0] if job is not None and job.requests else None
        if request is None:
            return None

        def positions() -> list[list[list[int]]]:
            if request.handle is None or request.is_finished:
                return []
            view = SequenceView(engine._runner.stores[request.method], [request.handle])
            return [rows[0] for rows in view.kept_positions]

        kept, tokens = await on_engine(engine, positions), request.seen
        streams = [_bits(positions, tokens) for heads in kept or () for positions in heads]
        return {"tokens": tokens, "streams": streams} if streams else None


def _bits(positions: Sequence[int], tokens: int) -> str:
    """Base64 of one bit a token, the first token in the lowest bit of the first byte."""
    packed = bytearray((tokens + 7) // 8)
    for position in positions:
        if 0 <= position < tokens:
            packed[position >> 3] |= 1 << (position & 7)
    return base64.b64encode(packed).decode()


def add_routes(app: FastAPI, serving: "Serving") -> None:
    """Numbers for Prometheus, and the live page."""
    engine = serving.engine

    @app.get("/metrics", response_model=None, tags=["server"])
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        use, holdings = await _looked(engine, lambda: engine._scheduler.running)
        text = serving.metrics.text(engine, use, holdings)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/reset_prefix_cache", response_model=None, tags=["server"])
    async def reset_prefix_cache() -> Response:
        """Forget all stored prefixes."""
        await on_engine(engine, engine._scheduler.drop_prefixes, timeout_s=30.0)
        return Response(status_code=200)

    _add_live_routes(app, serving)


def _add_live_routes(app: FastAPI, serving: "Serving") -> None:
    """The page where the settings want it, and its two sources."""
    engine, looker, page = serving.engine, _Looker(serving), PAGE.read_text(encoding="utf-8")
    full = kvfold.plan(engine.model, time="full", bits="model").bytes_per_token

    if serving.settings.page:

        @app.get("/", response_class=HTMLResponse, include_in_schema=False)
        async def index() -> Response:
            """The live page."""
            return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer"})

    @app.get("/kvfold/model", tags=["live"])
    async def model() -> dict[str, Any]:
        """The model's layers and heads, and the methods loaded."""
        return {
            "model": serving.settings.model_names[0], "methods": list(engine.methods),
            "num_layers": engine.model.config.layout.num_layers, "owners": _owners(engine),
            "full_bytes_per_token": full, "max_model_len": serving.max_model_len, "chat": serving.template.exists,
            "pool_bytes": engine.stats()["pool_bytes"],
        }  # fmt: skip

    @app.get("/kvfold/live", response_model=None, tags=["live"])
    async def live(once: bool = False, maps: str | None = None) -> Response:
        """Events: the engine's state, four times a second. `maps`: ids of requests, comma separated, whose kept tokens are
        told too. `once`: one JSON object instead.
        """
        names = [one for one in (maps or "").split(",") if one][:2]

        async def state() -> dict[str, Any]:
            kept = {name: one for name in names if (one := await looker.kept_map(name))}
            return await looker.state() | {"maps": kept}

        if once:
            return Response(event(await state())[6:].strip(), media_type="application/json")
        if looker.watchers >= MAX_WATCHERS:
            raise busy(429, "too many pages are watching: try again later", 10)
        looker.watchers += 1

        async def events() -> AsyncIterator[bytes]:
            while not serving.stopping:
                yield event(await state())
                await asyncio.sleep(LOOK_S)

        def left() -> None:
            looker.watchers -= 1

        return Stream(events(), leave=left, headers={})
