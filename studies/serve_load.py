"""A server under load with rude clients, on the bundled model: are answers right, does memory grow, do honest clients wait?

    python studies/serve_load.py load [results/serve/load.json]       # minutes: nothing else should run
    python studies/serve_load.py check [results/serve/load.json]

Three runs of one server: 300 requests with 32 open at once, all honest; then 10 % of the clients leave in mid-answer, 5 % read
slowly and 5 % send what is malformed; then all honest again. The check compares every honest answer with the engine's own, kills
a server with streams open, and starts it again.
"""

import asyncio
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles

import httpx
import torch

from kvfold.record import made

REQUESTS, OPEN = 300, 32
POOL = "120MB"
"""So little that stored prefixes fill it in the first run: from then on the server's memory has no reason to grow."""
METHODS = ["dms:128", "window:12+4"]
MANNERS = {"leaves": 0.10, "slow": 0.05, "malformed": 0.05}
TIE = 1e-3
"""Two tokens whose log probabilities are this close may be chosen either way, as other requests share the batch."""


def draw(seed: int, *, rude: bool) -> list[tuple[dict, str]]:
    """(request, manner) of each client."""
    rng, found = random.Random(seed), []
    for _ in range(REQUESTS):
        asked = {
            "prompt": [rng.randrange(1000, 40_000) for _ in range(rng.randint(8, 24))], "max_tokens": rng.randint(3, 8),
            "temperature": 0, "ignore_eos": True, "time": rng.choice(METHODS), "logprobs": 2,
        }  # fmt: skip
        drawn, manner = rng.random(), "honest"
        for name, share in MANNERS.items():
            if rude and drawn < share:
                manner = name
                break
            drawn -= share
        found.append((asked, manner))
    return found


class Clock(threading.Thread):
    """Seconds in which this process ran: a machine that stops all its programs for a while stops this clock too."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seconds = 0.0

    def run(self) -> None:
        """Tick."""
        last = time.monotonic()
        while True:
            time.sleep(0.02)
            now = time.monotonic()
            self.seconds += min(now - last, 0.5)
            last = now


CLOCK = Clock()


async def ask(client: httpx.AsyncClient, asked: dict, manner: str) -> dict:
    """What one client saw."""
    began, ids = CLOCK.seconds, []
    body = {name: value for name, value in asked.items() if name not in ("time", "logprobs")}
    body |= {"stream": True, "return_token_ids": True, "kvfold": {"time": asked["time"]}}
    if manner == "malformed":
        response = await client.post(
            "/v1/completions", content=b'{"prompt": [1,', headers={"Content-Type": "application/json"}
        )
        return {"status": response.status_code, "ids": [], "seconds": CLOCK.seconds - began}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                return {"status": 500, "ids": ids, "seconds": CLOCK.seconds - began}
            ids += chunk["choices"][0]["token_ids"]
            if manner == "leaves" and len(ids) > 2:
                break
            if manner == "slow":
                await asyncio.sleep(0.5)
        return {"status": response.status_code, "ids": ids, "seconds": CLOCK.seconds - began}


async def run(url: str, pid: int, clients: list[tuple[dict, str]]) -> tuple[list[dict], list[int]]:
    """What all clients saw, and the server's resident bytes as answers ended."""
    waiting, found, memory = iter(enumerate(clients)), [None] * len(clients), []
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=2 * OPEN)) as client:

        async def one() -> None:
            for place, (asked, manner) in waiting:
                found[place] = await ask(client, asked, manner)
                memory.append(resident_bytes(pid))

        await asyncio.gather(*(one() for _ in range(OPEN)))
    return found, memory


def resident_bytes(pid: int) -> int:
    """Of a process."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024


def summary(clients: list[tuple[dict, str]], found: list[dict], memory: list[int]) -> dict:
    """Counts, waits of honest clients, and how the server's memory went."""
    honest = [one for (_, manner), one in zip(clients, found, strict=True) if manner == "honest"]
    seconds = [one["seconds"] for one in honest]
    half, end = memory[len(memory) // 2], memory[-1]
    return {
        "clients": {name: sum(manner == name for _, manner in clients) for name in ("honest", *MANNERS)},
        "lost": sum(len(one["ids"]) != asked["max_tokens"] for (asked, manner), one in zip(clients, found, strict=True)
                    if manner in ("honest", "slow")),
        "statuses": {manner: sorted({one["status"] for (_, other), one in zip(clients, found, strict=True) if other == manner})
                     for manner in ("honest", *MANNERS)},
        "honest_median_s": quantiles(seconds, n=100)[49], "honest_p95_s": quantiles(seconds, n=100)[94],
        "resident_at_half_bytes": half, "resident_at_end_bytes": end, "growth_over_second_half": end / half - 1,
    }  # fmt: skip


def wrong_answers(answers: list[tuple[dict, str, list[int]]]) -> dict:
    """Answers that are not the engine's own for the same request: at a near tie, and otherwise."""
    from kvfold.demo import ADAPTER, bundled_model
    from kvfold.engine.engine import Engine
    from kvfold.models.load import load, load_tokenizer

    source, counts = bundled_model(), {"compared": len(answers), "wrong": 0, "near_ties": 0}
    requests = {json.dumps(asked): asked for asked, _, _ in answers}  # the runs asked alike
    with Engine(load(source, adapter=ADAPTER), load_tokenizer(source), POOL, METHODS) as engine:
        own = dict(zip(requests, engine.generate(list(requests.values())), strict=True))
    for asked, _, ids in answers:
        theirs = own[json.dumps(asked)]
        if ids == theirs.token_ids:
            continue
        first = next(
            (at for at, pair in enumerate(zip(ids, theirs.token_ids, strict=False)) if pair[0] != pair[1]), None
        )
        top = theirs.logprobs[first].top if first is not None else ((0, 0.0), (0, -9.0))
        counts["near_ties" if top[0][1] - top[1][1] < TIE else "wrong"] += 1
    return counts


@contextmanager
def server_at(port: int) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server process and its address; told to stop at the end, if it still runs."""
    command = [sys.executable, "-c", "from kvfold.cli import app; app()", "serve", "--demo", "--kv-memory", POOL]
    command += ["--port", str(port)] + [word for time in METHODS for word in ("--method", time)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        found = next(filter(None, (re.search(r"at (http://[\d.:]+)/v1", line) for line in process.stderr)))
        threading.Thread(target=lambda: [None for _ in process.stderr], daemon=True).start()
        yield process, found[1]
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(60)


def after_a_kill(process: subprocess.Popen, url: str) -> dict:
    """Killed with streams open, and started again on the same port: does it answer, and the same?"""
    asked = draw(2, rude=False)[:OPEN]
    one = [(asked[0][0], "honest")]
    before, _ = asyncio.run(run(url, process.pid, one))
    threading.Timer(2.0, process.kill).start()
    try:
        asyncio.run(run(url, process.pid, asked))
        cut = False
    except (httpx.HTTPError, OSError):
        cut = True
    began = time.monotonic()
    with server_at(int(url.rsplit(":", 1)[1])) as (again, same):
        seconds = time.monotonic() - began
        after, _ = asyncio.run(run(same, again.pid, one))
    equal = before[0]["ids"] == after[0]["ids"]
    return {"streams_cut": cut, "same_port": same == url, "same_answer": equal, "seconds_to_start": seconds,
            "exit_code_when_told_to_stop": again.returncode}  # fmt: skip


def under_load(out: Path) -> None:
    """The three runs of one server."""
    result: dict = {}
    with server_at(0) as (process, url):
        asyncio.run(run(url, process.pid, draw(7, rude=False)[:OPEN]))  # warm
        for name, rude in (("honest", False), ("rude", True), ("honest again", False)):
            clients = draw(1, rude=rude)
            found, memory = asyncio.run(run(url, process.pid, clients))
            result[name] = summary(clients, found, memory) | {"ids": [one["ids"] for one in found]}
            print(name, {key: value for key, value in result[name].items() if key != "ids"}, flush=True)
    base = min(result["honest"]["honest_p95_s"], result["honest again"]["honest_p95_s"])
    result["p95_ratio"] = result["rude"]["honest_p95_s"] / base
    print("p95 ratio", round(result["p95_ratio"], 2))
    write(out, result)


def afterwards(out: Path) -> None:
    """Whether what those runs answered was right, and the kill."""
    result = json.loads(out.read_text())
    pairs = []
    for name, rude in (("honest", False), ("rude", True), ("honest again", False)):
        clients, answers = draw(1, rude=rude), result[name]["ids"]
        pairs += [
            (*client, ids) for client, ids in zip(clients, answers, strict=True) if client[1] in ("honest", "slow")
        ]
    result["answers"] = wrong_answers(pairs)
    print(result["answers"], flush=True)
    with server_at(0) as (process, url):
        result["kill"] = after_a_kill(process, url)
    print(result["kill"])
    write(out, result)


def write(out: Path, result: dict) -> None:
    """As JSON with the record of each step, a list of ids a line."""
    result.setdefault("made", {})[sys.argv[1]] = made(torch.get_num_threads(), "float32")
    out.parent.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"\[[\d,\s]*\]", lambda found: re.sub(r"\s+", " ", found[0]), json.dumps(result, indent=1))
    out.write_text(text + "\n")


if __name__ == "__main__":
    CLOCK.start()
    steps = {"load": under_load, "check": afterwards}
    steps[sys.argv[1]](Path(sys.argv[2] if len(sys.argv) > 2 else "results/serve/load.json"))
