#!/usr/bin/env python3
"""Two engines under Ray Serve, on this machine and a random model: what routing by prefix is worth, and what clients see
when a replica dies under them.

  studies/ray_serve.py OUT.json [--requests 200 --families 32 --clients 8 --new 16]

Prompts are of families that share a long beginning. Each setting is one run of all requests: routed by prefix, by Serve's own
router, and by prefix with one replica killed by its actor's id in between. A client whose request failed cleanly, with status
429 or 503 or with an error event at the end of its stream, asks again until it is answered. Whatever else happens to a
request (a connection cut off, half a stream, an answer that is none) counts as unclean. Answers are greedy and are compared
with those of one engine without Ray. Whether anything was worked on twice behind a client's back, the engines know: the tokens
that those still living have generated stand beside the tokens of the answers that came from them.
"""

import argparse
import asyncio
import json
import os
import random
import shlex
import socket
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import ray
import torch
from ray import serve
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import kvfold
from kvfold.integrations.ray_serve import REPLICA, build
from kvfold.record import cpu_name, git_commit, made, with_record, write_whole_file

APP, NAMESPACE = "kvfold", "serve"
BEGINNING, TAIL = 1200, 60
"""Characters, and so tokens, of a prompt: what its family shares, and what is its own."""
PATIENCE_S = 600
"""Until a request or a replica counts as lost: a busy machine is slow, which is no failure."""


PATIENT = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": PATIENCE_S,
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": PATIENCE_S,
    "RAY_worker_register_timeout_seconds": PATIENCE_S,
    "RAY_health_check_failure_threshold": 60,
    "RAY_worker_niceness": 0,
}
"""Ray's own limits for its processes, a few seconds each, which end them on a busy machine; and replicas are no less urgent than
what is measured with them, where Ray would put them 15 steps behind.
"""


def main() -> None:
    """Measure, and write the result."""
    wanted = _arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    prompts = _prompts(wanted.requests, wanted.families)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny"
        token_bytes = write_model(model)
        expected = _alone(model, prompts, wanted.new)
        # Room for all prompts in each replica, so that nothing but the way that requests take decides what is cached.
        kv_bytes = wanted.requests * (BEGINNING + TAIL + wanted.new) * token_bytes
        port = _free_port()
        try:
            start_serve(port)
            rows = []
            for name, by_prefix, kill_at in (
                ("one replica killed", True, wanted.requests // 3),
                ("routed by prefix", True, None), ("Serve's own router", False, None),
            ):  # fmt: skip
                args = {"model": str(model), "kv_memory": str(kv_bytes), "replicas": 2, "route_by_prefix": by_prefix}
                args |= {"cpus": 0.5, "health_period_s": 2}
                serve.run(build(args), name=APP, route_prefix="/")
                rows.append(asyncio.run(_measured(name, port, prompts, expected, wanted, kill_at)))
                _write(wanted, kv_bytes, rows)
                serve.delete(APP)
                sys.stderr.write(f"{_line(rows[-1])}\n")
        finally:
            ray.shutdown()
    for row in rows:
        print(_line(row))


def start_serve(port: int) -> None:
    """Ray on two cores of this machine, and Serve in it."""
    for name, value in PATIENT.items():
        os.environ.setdefault(name, str(value))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            return
        except TimeoutError:  # after a minute; the next call waits for the same processes
            if time.monotonic() > until:
                raise


def _write(wanted: argparse.Namespace, kv_bytes: int, rows: list[dict]) -> None:
    """The result so far."""
    result = {
        "kind": "ray-serve", "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["studies/ray_serve.py", *sys.argv[1:]]), "git_commit": git_commit(),
        "environment": {"ray": ray.__version__, "cpu": cpu_name(), "cores": os.cpu_count()},
        "requests": wanted.requests, "families": wanted.families, "clients": wanted.clients,
        "prompt_tokens": BEGINNING + TAIL, "shared_tokens": BEGINNING, "new_tokens": wanted.new, "kv_bytes": kv_bytes,
        "rows": with_record(rows, made(torch.get_num_threads(), "float32")),
    }  # fmt: skip
    write_whole_file(wanted.out, json.dumps(result, indent=1) + "\n")


def write_model(folder: Path) -> int:
    """A random model of bytes as tokens; the bytes of keys and values that a token takes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"</s>": 0} | {sign: 1 + i for i, sign in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = kvfold.FoldConfig(
        vocab_size=1 + len(alphabet), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        head_dim=16, num_key_value_heads=2, max_position_embeddings=2048, eos_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    kvfold.FoldForCausalLM(config).save_pretrained(folder)
    return kvfold.plan(config).bytes_per_token


async def _measured(name: str, port: int, prompts: list[str], expected: list[str], wanted: Any, kill_at: int | None):
    """One run of all requests."""
    url = f"http://127.0.0.1:{port}/v1/completions"
    todo, logs, killed, probes = list(enumerate(prompts)), [], {}, []
    todo.reverse()
    async with httpx.AsyncClient(timeout=PATIENCE_S) as http:

        async def client() -> None:
            while todo:
                number, prompt = todo.pop()
                log: dict[str, Any] = {"number": number, "attempts": [], "answers": []}
                logs.append(log)
                while not log["answers"] and len(log["attempts"]) < 50:
                    log["attempts"].append(await _asked(http, url, number, prompt, wanted.new, log))
                    if log["attempts"][-1] != "answered":
                        await asyncio.sleep(0.2)

        async def killer() -> None:
            if kill_at is None:
                return
            before = await asyncio.to_thread(_replicas)
            actors = {name.rpartition("#")[2]: ray.get_actor(name, namespace=NAMESPACE) for name in before}
            while sum(len(log["answers"]) for log in logs) < kill_at:
                await asyncio.sleep(0.01)
            engines = await asyncio.to_thread(_engines)
            victim = max(actors, key=lambda one: engines[one]["running"])  # the busier one
            actor = actors[victim]
            killed.update(replica=victim, actor_id=actor._actor_id.hex(), at=time.monotonic())
            ray.kill(actor)
            while time.monotonic() - killed["at"] < PATIENCE_S:
                others = [one for one in await asyncio.to_thread(_replicas) if one not in before]
                if others:
                    probes.append(await _probe(http, url))
                    if probes[-1] == others[0].rpartition("#")[2]:
                        killed["replaced_after_s"] = round(time.monotonic() - killed["at"], 1)
                        return
                await asyncio.sleep(0.1)

        began = time.monotonic()
        work = asyncio.gather(*(client() for _ in range(wanted.clients)))
        ending = asyncio.ensure_future(killer())
        await work
        seconds = time.monotonic() - began
        await ending
    return _row(name, seconds, logs, expected, killed) | await asyncio.to_thread(_work_of, logs, probes, wanted.new)


def _row(name: str, seconds: float, logs: list[dict], expected: list[str], killed: dict) -> dict[str, Any]:
    """What clients saw."""
    attempts = [one for log in logs for one in log["attempts"]]
    answers = [log["answers"][0] for log in logs if log["answers"]]
    replicas = sorted({one["replica"] for one in answers})
    prompt_tokens = sum(one["prompt_tokens"] for one in answers)
    return {
        "name": name, "seconds": round(seconds, 2), "requests": len(logs), "attempts": len(attempts),
        "answered_once": sum(len(log["answers"]) == 1 for log in logs),
        "answered_twice": sum(len(log["answers"]) > 1 for log in logs),
        "never_answered": sum(not log["answers"] for log in logs),
        "failed_cleanly": sum(one.startswith("clean: ") for one in attempts),
        "failed_otherwise": sum(one.startswith("unclean: ") for one in attempts),
        "failures": sorted({one for one in attempts if one != "answered"}),
        "as_one_engine_answers": sum(
            bool(log["answers"]) and log["answers"][0]["text"] == expected[log["number"]] for log in logs
        ),
        "hit_rate": round(sum(one["cached_tokens"] > 0 for one in answers) / len(answers), 4),
        "cached_share_of_prompts": round(sum(one["cached_tokens"] for one in answers) / prompt_tokens, 4),
        "answers_by_replica": {name: sum(one["replica"] == name for one in answers) for name in replicas},
        "killed": {key: value for key, value in killed.items() if key != "at"} or None,
    }  # fmt: skip


def _work_of(logs: list[dict], probes: list[str], new: int) -> dict[str, int]:
    """Tokens that the engines still living have generated, and those of the answers and probes that came from them."""
    engines = _engines()
    answered = sum(answer["replica"] in engines for log in logs for answer in log["answers"])
    probed = sum(replica in engines for replica in probes)
    generated = sum(engine["completion_tokens"] for engine in engines.values())
    return {"generated_tokens": generated, "answered_tokens": answered * new + probed}


def _engines() -> dict[str, dict[str, Any]]:
    """What each engine says of itself; asked until all have answered, since a router chooses."""
    handle, engines = serve.get_deployment_handle("Replica", APP), {}
    while len(engines) < len(_replicas()):
        about = handle.about.remote().result(timeout_s=PATIENCE_S)
        engines[about["replica"]] = about
    return engines


async def _asked(http: httpx.AsyncClient, url: str, number: int, prompt: str, new: int, log: dict) -> str:
    """What came of one attempt; an answer is noted in `log`. Every second request streams."""
    streams = number % 2 == 1
    body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": streams}
    if streams:
        body["stream_options"] = {"include_usage": True}
    try:
        async with http.stream("POST", url, json=body, headers={"x-request-id": f"request-{number}"}) as response:
            whole = (await response.aread()).decode()
    except httpx.HTTPError as error:
        return f"unclean: {type(error).__name__}"
    try:
        if response.status_code in (429, 503) and json.loads(whole)["error"]["message"]:
            return f"clean: status {response.status_code}"
        if response.status_code != 200:
            return f"unclean: status {response.status_code}"
        replica = response.headers.get(REPLICA, "")
        found = _streamed(whole) if streams else _whole(whole)
    except (ValueError, KeyError, IndexError, TypeError):
        return "unclean: an answer that is none"
    if isinstance(found, str):
        return found
    log["answers"].append(found | {"replica": replica})
    return "answered"


def _whole(text: str) -> dict[str, Any]:
    answer = json.loads(text)
    return _noted(answer["choices"][0]["text"], answer["choices"][0]["finish_reason"], answer["usage"])


def _streamed(text: str) -> dict[str, Any] | str:
    """The answer that the events make up, or how it failed."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        return "unclean: half a stream"
    said, reason, usage = "", None, None
    for one in map(json.loads, events[:-1]):
        if "error" in one:
            return f"clean: error event {one['error']['code']}"
        usage = one.get("usage") or usage
        for choice in one["choices"]:
            said, reason = said + choice["text"], choice["finish_reason"] or reason
    return _noted(said, reason, usage)


def _noted(text: str, reason: str | None, usage: dict) -> dict[str, Any]:
    if reason != "length":
        raise ValueError(reason)
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {"text": text, "prompt_tokens": usage["prompt_tokens"], "cached_tokens": cached}


async def _probe(http: httpx.AsyncClient, url: str) -> str:
    """The replica that answers a request of one token, since a router chooses; empty where none does."""
    body = {"prompt": random.randbytes(8).hex(), "max_tokens": 1, "ignore_eos": True}
    try:
        response = await http.post(url, json=body)
    except httpx.HTTPError:
        return ""
    return response.headers.get(REPLICA, "")


def _replicas() -> list[str]:
    """Names of the engines' actors."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(one["name"] for one in named if f"#{APP}#Replica#" in one["name"] or f"{APP}#Replica#" in one["name"])


def _alone(folder: Path, prompts: list[str], new: int) -> list[str]:
    """What one engine answers without Ray."""
    with kvfold.Engine(kvfold.load(folder), kvfold.load_tokenizer(folder), "256MB", max_running=16) as engine:
        asked = [{"prompt": text, "max_tokens": new, "temperature": 0, "ignore_eos": True} for text in prompts]
        return [answer.text for answer in engine.generate(asked)]


def _prompts(requests: int, families: int) -> list[str]:
    draw = random.Random(0)

    def text(length: int) -> str:
        return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(length))

    beginnings = [text(BEGINNING) for _ in range(families)]
    return [draw.choice(beginnings) + text(TAIL) for _ in range(requests)]


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['name']:20} {row['answered_once']} of {row['requests']} answered once, {row['answered_twice']} twice, "
        f"{row['failed_cleanly']} clean and {row['failed_otherwise']} other failures in {row['attempts']} attempts; "
        f"hit rate {row['hit_rate']:.1%}, {row['cached_share_of_prompts']:.1%} of prompt tokens cached; {row['seconds']} s"
    )


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name, value in {"requests": 200, "families": 32, "clients": 8, "new": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


if __name__ == "__main__":
    main()
