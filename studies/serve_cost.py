"""What HTTP costs: 16 requests through the server against the same 16 in process, on the bundled model.

    python studies/serve_cost.py [results/serve/cost.json]

One run of both sides, which take turns: `engine.generate` in this process, then the same prompts through `kvfold serve` in a
process of its own, its answers whole and streamed, with this process as the client. A round has prompts that neither side has
seen before; every side makes the same tokens. A file that is there already is gone on with: its rounds count too.
"""

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from kvfold.demo import ADAPTER, bundled_model
from kvfold.engine.engine import Engine
from kvfold.models.load import load, load_tokenizer
from kvfold.record import made

REQUESTS, PROMPT, NEW, ROUNDS = 16, 32, 48, 8
METHOD = "dms:128"
SIDES = ("in process", "HTTP, whole", "HTTP, streamed")


def draw(number: int, *, new: int) -> list[dict]:
    """The requests of a round."""
    ids = [
        [1000 + (number * 7919 + one * 104_729 + at * 31) % 40_000 for at in range(PROMPT)] for one in range(REQUESTS)
    ]
    return [{"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True} for prompt in ids]


async def ask(url: str, requests: list[dict], *, stream: bool) -> tuple[float, list[int]]:
    """(seconds until the last answer, token ids of the first). Over bare sockets, read once the clock has stopped: what a client
    library takes is no cost of the server, and it would take it from the same cores.
    """
    host, port = url.removeprefix("http://").split(":")

    async def one(request: dict) -> bytes:
        reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps(request | {"return_token_ids": True, "stream": stream}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        )
        writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        answer = await reader.read(-1)
        writer.close()
        return answer

    began = time.perf_counter()
    found = await asyncio.gather(*(one(request) for request in requests))
    seconds = time.perf_counter() - began
    if not stream:
        return seconds, json.loads(found[0].partition(b"\r\n\r\n")[2])["choices"][0]["token_ids"]
    events = [line[6:] for line in found[0].splitlines() if line.startswith(b"data: {")]
    return seconds, [token for event in events for token in json.loads(event)["choices"][0]["token_ids"]]


def main(out: Path) -> None:
    """All rounds, the ratio of each, one file."""
    command = [sys.executable, "-c", "from kvfold.cli import app; app()", "serve", "--demo", "--port", "0"]
    command += ["--method", METHOD, "--kv-memory", "500MB"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    processor: dict[str, list[float]] = {name: [] for name in SIDES}
    if out.is_file():
        before = json.loads(out.read_text())
        seconds, processor = before["seconds"], before["processor_seconds"]
    before = len(seconds[SIDES[0]])
    try:
        source = bundled_model()
        found = next(filter(None, (re.search(r"at (http://[\d.:]+)/v1", line) for line in server.stderr)))
        threading.Thread(target=lambda: [None for _ in server.stderr], daemon=True).start()
        with Engine(
            load(source, adapter=ADAPTER), load_tokenizer(source), "500MB", [METHOD], prefill_tokens=512
        ) as engine:
            for number in range(before, before + ROUNDS + 1):
                warm = number == before
                ids = {}
                for place in range(len(SIDES)):
                    name = SIDES[(place + number) % len(SIDES)]
                    # Each side its own prompts: the two HTTP sides would find each other's prefixes.
                    requests = draw(number * len(SIDES) + SIDES.index(name), new=4 if warm else NEW)
                    cpu = cpu_seconds(server.pid)
                    if name == "in process":
                        began = time.perf_counter()
                        ids[name] = engine.generate(requests)[0].token_ids
                        taken = time.perf_counter() - began
                    else:
                        taken, ids[name] = asyncio.run(ask(found[1], requests, stream="streamed" in name))
                    if not warm:
                        seconds[name].append(taken)
                        processor[name].append(cpu_seconds(server.pid) - cpu)
                print(number, {name: round(values[-1], 3) for name, values in seconds.items() if values}, flush=True)
                if not warm:
                    assert all(len(one) == NEW for one in ids.values())
                    write(out, seconds, processor)
    finally:
        server.terminate()
        server.wait(60)


def cpu_seconds(pid: int) -> float:
    """Of the processor, that this process and the server have used so far: other programs change it less than the clock."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return time.process_time() + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def write(out: Path, seconds: dict[str, list[float]], processor: dict[str, list[float]]) -> None:
    """What is there so far."""
    tokens = REQUESTS * NEW
    result = {
        "requests": REQUESTS, "prompt_tokens": PROMPT, "new_tokens": NEW, "method": METHOD,
        "rounds": len(seconds[SIDES[0]]), "seconds": seconds, "made": made(torch.get_num_threads(), "float32"),
        "median_tokens_per_s": {name: tokens / statistics.median(values) for name, values in seconds.items()},
        "cost": {name: _cost(seconds[name], seconds["in process"]) for name in SIDES[1:]},
        "processor_seconds": processor,
        "processor_cost": {name: _cost(processor[name], processor["in process"]) for name in SIDES[1:]},
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["cost"]), json.dumps(result["processor_cost"]), flush=True)


def _cost(values: list[float], base: list[float]) -> dict[str, float]:
    ratios = sorted(one / other - 1 for one, other in zip(values, base, strict=True))
    return {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results/serve/cost.json"))
