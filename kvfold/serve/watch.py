"""What the server asks of the engine besides answers: its methods and limits, and what running requests keep right now.

All that this room knows of the engine's inside is here, so that the engine can change without the rest.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import kvfold
from kvfold.engine.engine import Engine
from kvfold.engine.request import Request
from kvfold.engine.runner import SequenceView

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True, slots=True)
class Holding:
    """What one running answer holds."""

    method: str
    seen_tokens: int
    kept: tuple[tuple[int, ...], ...]
    """Entries by owner, ascending, then by KV head; empty while the answer waits for its turn."""
    kv_bytes: int
    prompt_tokens: int
    completion_tokens: int


def methods(engine: Engine) -> tuple[str, ...]:
    """Text forms of the methods loaded, the default first."""
    names = list(engine._layouts)
    return (engine._default, *(name for name in names if name != engine._default))


def context_tokens(engine: Engine) -> int | None:
    """Tokens that the model's positions reach; None = without a limit."""
    return None if engine._context == float("inf") else int(engine._context)


def max_running(engine: Engine) -> int:
    """Answers that can run at once."""
    return engine._scheduler.max_running


def failure(engine: Engine) -> str | None:
    """Why the engine takes no more requests; None while it does."""
    return getattr(engine, "_stopped", None) or getattr(engine, "_broken", None)


def owners(engine: Engine) -> tuple[tuple[int, int], ...]:
    """Layers that have KV of their own, with their number of KV heads."""
    layout = engine.model.config.layout
    return tuple((owner, layout.layers[owner].num_kv_heads) for owner in layout.owners)


def num_layers(engine: Engine) -> int:
    """Layers of the model, readers included."""
    return len(engine.model.config.layout.layers)


def full_bytes_per_token(engine: Engine) -> int:
    """Bytes of one token's keys and values if no token were dropped, merged or stored in fewer bits."""
    return kvfold.plan(engine.model, time="full", bits="model").bytes_per_token


async def on_engine(engine: Engine, ask: Callable[[], Found], timeout_s: float = 2.0) -> Found | None:
    """What `ask` gives when it is called between two steps on the engine's thread; None where the engine is too busy."""
    if failure(engine) is not None or engine._thread is None:
        return None
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Found] = loop.create_future()

    def deliver(result: Found | None, error: Exception | None) -> None:
        if not future.done():
            future.set_exception(error) if error is not None else future.set_result(result)

    def run() -> None:
        result, error = None, None
        try:
            result = ask()
        except Exception as caught:  # never the engine's trouble
            error = caught
        loop.call_soon_threadsafe(deliver, result, error)

    engine._inbox.put(run)
    try:
        return await asyncio.wait_for(future, timeout_s)
    except TimeoutError:
        return None


async def drop_prefixes(engine: Engine) -> None:
    """Free the stored prefixes that nobody uses."""
    await on_engine(engine, engine._scheduler.drop_prefixes, timeout_s=30.0)


def holdings(engine: Engine, requests: Sequence[Request]) -> list[Holding]:
    """What each of these answers holds; to be called through `on_engine`."""
    heads = [number for _, number in owners(engine)]
    found = []
    for request in requests:
        kept: list[tuple[int, ...]] = []
        held = 0
        if request.handle is not None and not request.is_finished:
            streams, place = engine._runner.kept(request.method, request.handle), 0
            for number in heads:
                kept.append(tuple(streams[place : place + number]))
                place += number
            held = engine._runner.held_bytes(request.method, request.handle)
        found.append(
            Holding(
                method=request.method, seen_tokens=request.seen, kept=tuple(kept), kv_bytes=held,
                prompt_tokens=request.prompt_tokens, completion_tokens=request.num_outputs,
            )
        )  # fmt: skip
    return found


def pool_use(engine: Engine) -> dict[str, int]:
    """Bytes of the pool by use; to be called through `on_engine`."""
    stats, prefixes = engine.stats(), engine._scheduler.prefixes
    prefix_bytes = engine._runner.freeable_bytes(prefixes.snapshots) if len(prefixes) else 0
    used = stats["pool_bytes"] - stats["free_bytes"]
    return {"prefixes": prefix_bytes, "requests": max(0, used - prefix_bytes), "free": stats["free_bytes"]}


def running(engine: Engine) -> list[Request]:
    """Answers that hold a sequence; to be called through `on_engine`."""
    return list(engine._scheduler.running)


def as_plain(holding: Holding) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {
        "method": holding.method, "seen_tokens": holding.seen_tokens, "kept": [list(one) for one in holding.kept],
        "kv_bytes": holding.kv_bytes, "prompt_tokens": holding.prompt_tokens,
        "completion_tokens": holding.completion_tokens,
    }  # fmt: skip


def kept_positions(engine: Engine, request: Request) -> list[list[list[int]]]:
    """Positions that each owner's heads hold for one answer; to be called through `on_engine`."""
    if request.handle is None or request.is_finished:
        return []
    return [rows[0] for rows in SequenceView(engine._runner.stores[request.method], [request.handle]).kept_positions]


def demand_bytes(engine: Engine) -> int:
    """Bytes that running requests hold and those that wait will take; to be called through `on_engine`."""
    waiting = sum(engine._budget.growth(request, 0) for request in engine._scheduler.waiting)
    return pool_use(engine)["requests"] + waiting
