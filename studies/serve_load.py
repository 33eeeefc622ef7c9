"""A server under load with rude clients, on the bundled model: are answers right, does memory grow, do honest clients wait?

    python studies/serve_load.py [results/serve/load.json]

Two runs of one server: 300 requests with 32 open at once, first all honest, then 10 % of the clients leaving in mid-answer,
5 % reading slowly and 5 % sending what is malformed. Then every honest answer is compared with the engine's own.
"""

import asyncio
import json
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import quantiles

import httpx

REQUESTS, OPEN = 300, 32
METHODS = ["full", "dms:128", "h2o:87+88"]
MANNERS = {"leaves": 0.10, "slow": 0.05, "malformed": 0.05}
TIE = 1e-3
"""Two tokens whose log probabilities are this close may be chosen either way, as other requests share the batch."""


def draw(seed: int, *, rude: bool) -> list[tuple[dict, str]]:
    """(request, manner) of each client."""
    rng, found = random.Random(seed), []
    for _ in range(REQUESTS):
        asked = {
            "prompt": [rng.randrange(1000, 40_000) for _ in range(rng.randint(10, 90))], "max_tokens": rng.randint(8, 40),
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


async def ask(client: httpx.AsyncClient, asked: dict, manner: str) -> dict:
    """What one client saw."""
    began, ids = time.monotonic(), []
    body = {name: value for name, value in asked.items() if name not in ("time", "logprobs")}
    body |= {"stream": True, "return_token_ids": True, "kvfold": {"time": asked["time"]}}
    if manner == "malformed":
        response = await client.post(
            "/v1/completions", content=b'{"prompt": [1,', headers={"Content-Type": "application/json"}
        )
        return {"status": response.status_code, "ids": [], "seconds": time.monotonic() - began}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                return {"status": 500, "ids": ids, "seconds": time.monotonic() - began}
            ids += chunk["choices"][0]["token_ids"]
            if manner == "leaves" and len(ids) > 4:
                break
            if manner == "slow":
                await asyncio.sleep(0.2)
        return {"status": response.status_code, "ids": ids, "seconds": time.monotonic() - began}


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


def wrong_answers(pairs: list[tuple[dict, list[int]]]) -> dict:
    """Answers that are not the engine's own: at a near tie, and otherwise."""
    from kvfold.demo import ADAPTER, bundled_model
    from kvfold.engine.engine import Engine
    from kvfold.models.load import load, load_tokenizer

    source, counts = bundled_model(), {"compared": len(pairs), "wrong": 0, "near_ties": 0}
    with Engine(load(source, adapter=ADAPTER), load_tokenizer(source), "600MB", METHODS) as engine:
        for (_, ids), theirs in zip(pairs, engine.generate([asked for asked, _ in pairs]), strict=True):
            if ids == theirs.token_ids:
                continue
            first = next(
                (at for at, pair in enumerate(zip(ids, theirs.token_ids, strict=False)) if pair[0] != pair[1]), None
            )
            top = theirs.logprobs[first].top if first is not None else ((0, 0.0), (0, -9.0))
            counts["near_ties" if top[0][1] - top[1][1] < TIE else "wrong"] += 1
    return counts


def main(out: Path) -> None:
    """Both runs, the comparison, one file."""
    command = [
        sys.executable,
        "-c",
        "from kvfold.cli import app; app()",
        "serve",
        "--demo",
        "--port",
        "0",
        "--kv-memory",
        "600MB",
    ]
    command += [word for time in METHODS for word in ("--method", time)]
    result, pairs = {}, []
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = None
        for line in server.stderr:
            place = re.search(r"at (http://[\d.:]+)/v1", line)
            if place:
                url = place[1]
                break
        threading.Thread(target=lambda: [None for _ in server.stderr], daemon=True).start()
        asyncio.run(run(url, server.pid, draw(7, rude=False)[:OPEN]))  # warm
        for name, rude in (("honest", False), ("rude", True), ("honest again", False)):
            clients = draw(1, rude=rude)
            found, memory = asyncio.run(run(url, server.pid, clients))
            result[name] = summary(clients, found, memory)
            print(name, json.dumps(result[name]), flush=True)
            if name == "rude":
                pairs = [
                    (asked, one["ids"])
                    for (asked, manner), one in zip(clients, found, strict=True)
                    if manner in ("honest", "slow")
                ]
    finally:
        server.terminate()
        result["exit_code"] = server.wait(60)
    base = min(result["honest"]["honest_p95_s"], result["honest again"]["honest_p95_s"])
    result["p95_ratio"] = result["rude"]["honest_p95_s"] / base
    result["answers"] = wrong_answers(pairs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["answers"]), "p95 ratio", round(result["p95_ratio"], 2))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results/serve/load.json"))
