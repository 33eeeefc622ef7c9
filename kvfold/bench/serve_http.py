"""Load on an OpenAI endpoint, ours or another's, and what its clients see: first tokens, steps, whole answers, failures.

Requests come at random times (`rate` a second, Poisson), as a fixed number of clients of which each asks again once it has its
answer (`clients`), or when their trace says so. Every run ends: it has a number of requests, and each request a time.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, quantiles
from typing import Any

import httpx

from kvfold.bench.serve import Wanted
from kvfold.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """How requests come."""

    rate: float | None = None
    """Requests a second, at random times."""
    clients: int | None = None
    """Requests that are open at once, each followed by the next."""
    seed: int = 0
    timeout_s: float = 600.0
    """Seconds that one request may take."""

    def __post_init__(self) -> None:
        if self.rate is not None and self.clients is not None:
            raise UserError(
                "a load is given by rate or by clients: give one of the two, or none for a trace's own times"
            )
        if self.rate is not None and not self.rate > 0:
            raise UserError(f"rate must be more than 0 requests a second, got {self.rate} (for example 2)")
        if self.clients is not None and self.clients < 1:
            raise UserError(f"clients must be at least 1, got {self.clients} (for example 16)")


@dataclass(kw_only=True, slots=True)
class Seen:
    """What one client saw. Times in seconds from the run's begin."""

    began_s: float
    first_s: float | None = None
    """When the first token came."""
    ended_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    """Between two pieces."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None
    kvfold: dict[str, Any] | None = None
    """Tokens seen and kept, where the server tells."""


class _Failed(Exception):
    """An answer that says that the request failed."""


def draw_requests(
    text: str, number: int, *, prompt_words: tuple[int, int], max_tokens: tuple[int, int], seed: int = 0,
    time: str | None = None,
) -> list[Wanted]:  # fmt: skip
    """Requests with prompts cut from a text; both lengths drawn evenly between their bounds."""
    words, rng = text.split(), random.Random(seed)
    if len(words) <= prompt_words[1]:
        raise UserError(f"text must have more than {prompt_words[1]} words, got {len(words)}: give a longer one")
    found = []
    for _ in range(number):
        length = rng.randint(*prompt_words)
        start = rng.randrange(len(words) - length)
        prompt = " ".join(words[start : start + length])
        found.append(Wanted(prompt=prompt, max_tokens=rng.randint(*max_tokens), time=time))
    return found


def bench_serve(
    url: str, requests: Sequence[Wanted], load: Load, *, model: str | None = None, api_key: str | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Ask an endpoint (`url` ends in /v1) all of `requests`, and summarise. `report` is told done and total requests."""
    if not requests:
        raise UserError("a run needs 1 request or more, got none")
    return asyncio.run(_bench(url.rstrip("/"), requests, load, model, api_key, report))


async def _bench(
    url: str, requests: Sequence[Wanted], load: Load, model: str | None, api_key: str | None,
    report: Callable[[int, int], None],
) -> dict[str, Any]:  # fmt: skip
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=load.clients or 256)
    async with httpx.AsyncClient(headers=headers, limits=limits, timeout=load.timeout_s) as client:
        try:
            answer = await client.get(f"{url}/models")
            answer.raise_for_status()
            name = model or answer.json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise UserError(f"{url} must be an OpenAI endpoint, such as http://127.0.0.1:8000/v1: {error}") from None
        began, done = time.monotonic(), 0

        async def one(asked: Wanted) -> Seen:
            nonlocal done
            seen = Seen(began_s=time.monotonic() - began)
            try:
                async with asyncio.timeout(load.timeout_s):
                    await _ask(client, url, name, asked, seen, began)
            except (httpx.HTTPError, _Failed, ValueError, LookupError, TimeoutError) as error:
                seen.error = f"{type(error).__name__}: {error}"
            seen.ended_s = time.monotonic() - began
            done += 1
            report(done, len(requests))
            return seen

        found = await _run(requests, load, one, began)
        return summary(found, name, url, load)


async def _run(requests: Sequence[Wanted], load: Load, one: Callable[[Wanted], Any], began: float) -> list[Seen]:
    """All requests, as the load says."""
    if load.clients is not None:
        waiting, found = iter(requests), []

        async def client() -> None:
            for asked in waiting:
                found.append(await one(asked))

        await asyncio.gather(*(client() for _ in range(load.clients)))
        return found
    rng, at, tasks = random.Random(load.seed), 0.0, []
    for asked in requests:
        if load.rate is not None:
            at += rng.expovariate(load.rate)
        else:
            at = asked.at_s
        await asyncio.sleep(max(0.0, at - (time.monotonic() - began)))
        tasks.append(asyncio.create_task(one(asked)))
    return list(await asyncio.gather(*tasks))


async def _ask(client: httpx.AsyncClient, url: str, model: str, asked: Wanted, seen: Seen, began: float) -> None:
    body: dict[str, Any] = {
        "model": model, "prompt": asked.prompt, "max_tokens": asked.max_tokens, "temperature": 0, "stream": True,
        "ignore_eos": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    if asked.time is not None:
        body["kvfold"] = {"time": asked.time}
    last = None
    async with client.stream("POST", f"{url}/completions", json=body) as response:
        if response.status_code != 200:
            raise _Failed(f"status {response.status_code}: {(await response.aread())[:200]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now, chunk = time.monotonic() - began, json.loads(line[6:])
            if "error" in chunk:
                raise _Failed(str(chunk["error"].get("message")))
            if chunk.get("choices"):
                if last is None:
                    seen.first_s = now
                else:
                    seen.gaps_s.append(now - last)
                last = now
            usage = chunk.get("usage")
            if usage:
                seen.prompt_tokens, seen.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
                seen.kvfold = usage.get("kvfold")


def summary(found: Sequence[Seen], model: str, url: str, load: Load) -> dict[str, Any]:
    """Rates over the whole run, and the spread of what clients waited for, in milliseconds. `points`: when each answer began,
    had its first token and ended, in seconds, and its tokens.
    """
    good = [one for one in found if one.error is None and one.first_s is not None]
    seconds = max(one.ended_s for one in found) - min(one.began_s for one in found)
    output, read = sum(one.completion_tokens for one in good), sum(one.prompt_tokens for one in good)
    steps = [(one.ended_s - one.first_s) / (one.completion_tokens - 1) for one in good if one.completion_tokens > 1]
    told = [one.kvfold for one in good if one.kvfold]
    return {
        "url": url, "model": model, "load": asdict(load), "requests": len(found), "completed": len(good),
        "failed": len(found) - len(good), "errors": sorted({one.error for one in found if one.error})[:10],
        "seconds": seconds, "requests_per_s": len(good) / seconds, "output_tokens_per_s": output / seconds,
        "total_tokens_per_s": (output + read) / seconds, "prompt_tokens": read, "output_tokens": output,
        "first_token_ms": _spread([one.first_s - one.began_s for one in good]),
        "time_per_output_token_ms": _spread(steps),
        "inter_token_ms": _spread([gap for one in good for gap in one.gaps_s]),
        "whole_answer_ms": _spread([one.ended_s - one.began_s for one in good]),
        **{name: sum(one[name] for one in told) if told else None for name in ("kept_tokens", "seen_tokens")},
        "points": [[one.began_s, one.first_s, one.ended_s, one.completion_tokens] for one in good],
    }  # fmt: skip


def _spread(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    cuts = quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 99
    names = {"mean": fmean(seconds), "median": cuts[49], "p95": cuts[94], "p99": cuts[98], "most": max(seconds)}
    return {name: 1000 * value for name, value in names.items()}


def summary_lines(result: dict[str, Any]) -> list[str]:
    """The same for a reader."""
    lines = [
        f"{result['completed']} of {result['requests']} requests in {result['seconds']:.1f} s: "
        f"{result['requests_per_s']:.2f} requests/s, {result['output_tokens_per_s']:.1f} tokens/s"
    ]
    told = {"first_token_ms": "first token", "inter_token_ms": "between tokens", "whole_answer_ms": "whole answer"}
    for name, words in told.items():
        if result[name] is not None:
            said = "median {median:.0f} ms, p95 {p95:.0f} ms, p99 {p99:.0f} ms".format_map(result[name])
            lines.append(f"{words}: {said}")
    if result["seen_tokens"]:
        lines.append(f"kept {result['kept_tokens']:.0f} of {result['seen_tokens']} tokens seen")
    return lines + [f"failed: {error}" for error in result["errors"]]
