"""The server around its endpoints: load with rude clients, limits, metrics, the live state, and how it stops."""

import asyncio
import json
import random
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
from openai.types import CompletionChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from kvfold.engine.engine import Engine
from kvfold.serve.replies import filled
from kvfold.serve.serving import ServerSettings
from serving_kit import METHODS, new_engine, raw, running_server
from tiny import TOKENIZER, tiny_model

PROMPT = {"prompt": "hello", "max_tokens": 8, "temperature": 0}


def draw_asked(rng):
    return {
        "prompt": [rng.randrange(250) for _ in range(rng.randint(1, 60))], "max_tokens": rng.randint(1, 24), "seed": 3,
        "temperature": rng.choice([0, 1]), "time": rng.choice(METHODS), "ignore_eos": rng.random() < 0.5,
    }  # fmt: skip


async def ask(client, asked, manner, rng):
    """The token ids of a stream; None where the client left or was refused, as its manner has it."""
    body = {name: value for name, value in asked.items() if name != "time"}
    body |= {"stream": True, "return_token_ids": True, "kvfold": {"time": asked["time"]}}
    if manner == "malformed":
        response = await client.post(
            "/v1/completions", content=b'{"prompt": [1, 2', headers={"Content-Type": "application/json"}
        )
        assert response.status_code == 400
        return None
    ids, reason = [], None
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            data = json.loads(line[6:])
            assert "error" not in data, data
            ids += data["choices"][0]["token_ids"]
            reason = data["choices"][0]["finish_reason"]
            if manner == "leaves" and len(ids) > rng.randint(0, 5):
                return None
            if manner == "slow":
                await asyncio.sleep(0.05)
    assert reason in ("stop", "length")
    return ids


def resident_pages():
    """Of this process, the server's too; 1 where the system does not tell."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) if path.is_file() else 1


def test_load_with_rude_clients_loses_no_answer():
    """Every honest answer is the engine's own for the same request, and at the end everything is free."""
    rng = random.Random(0)
    manners = ["leaves"] * 8 + ["slow"] * 4 + ["malformed"] * 4 + ["honest"] * 44
    rng.shuffle(manners)
    requests = [draw_asked(rng) for _ in manners]
    engine, resident = new_engine(kv_memory="200kB", prefill_tokens=64), []

    async def run(url):
        gate, limits = asyncio.Semaphore(12), httpx.Limits(max_connections=32)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:

            async def one(asked, manner):
                async with gate:
                    answer = await ask(client, asked, manner, rng)
                    resident.append(resident_pages())
                    return answer

            return await asyncio.gather(*(one(*pair) for pair in zip(requests, manners, strict=True)))

    with running_server(engine) as server:
        found = asyncio.run(run(server.url))
        deadline = time.monotonic() + 10
        while server.serving.answers or engine.stats()["running"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not server.serving.by_name
    assert resident[-1] <= 1.01 * resident[len(resident) // 2]
    with Engine(tiny_model(), TOKENIZER, "2MB", METHODS, page_slots=4, prefill_tokens=64) as alone:
        for asked, manner, ids in zip(requests, manners, found, strict=True):
            if manner in ("honest", "slow"):
                assert ids == alone.generate([asked])[0].token_ids, asked
            else:
                assert ids is None
    stats = engine.stats()
    assert stats["free_bytes"] == stats["pool_bytes"] and not stats["running"] and not stats["waiting"]


def test_a_full_queue_says_when_to_come_back():
    engine = new_engine(max_running=2)
    with running_server(engine, max_queue=2) as server:
        held = [
            stream(server, {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 2})
            for _ in range(2)
        ]
        response = httpx.post(f"{server.url}/v1/completions", json=PROMPT)
        assert response.status_code == 429 and 1 <= int(response.headers["retry-after"]) <= 60
        assert response.json()["error"]["type"] == "rate_limit_error"
        assert httpx.get(f"{server.url}/load").json() == {"server_load": 4}
        for one in held:
            one.close()  # leaves: its place is free
        for _ in range(100):
            if httpx.post(f"{server.url}/v1/completions", json=PROMPT).status_code == 200:
                break
            time.sleep(0.05)
        else:
            raise AssertionError("no place came free")


def stream(server, body):
    """A connection whose stream has begun. What came before may still wait where it was to run: then once more."""
    data = json.dumps(body).encode()
    for _ in range(100):
        connection = socket.create_connection(("127.0.0.1", server.bound_port), 10)
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(data) + data
        )  # fmt: skip
        if b" 200 " in connection.recv(4096):
            return connection
        connection.close()
        time.sleep(0.05)
    raise AssertionError("no stream began")


def rest_of(connection):
    found = b""
    connection.settimeout(20)
    while more := connection.recv(65536):
        found += more
    return found


LONG = {"prompt": "a", "max_tokens": 480, "ignore_eos": True, "stream": True}


def test_told_to_stop_it_lets_answers_finish():
    with running_server(shutdown_timeout_s=20.0) as server:
        connection = stream(server, LONG)
        server.should_exit = True
        found = rest_of(connection)
        assert b'"finish_reason":"length"' in found and b"data: [DONE]" in found and b'"error"' not in found
        server.thread.join(20)
        assert not server.thread.is_alive()


def test_answers_that_take_too_long_to_finish_are_ended_cleanly():
    with running_server(shutdown_timeout_s=0.2) as server:
        connections = [stream(server, LONG | {"prompt": "a" * (one + 1), "n": 4}) for one in range(3)]
        server.should_exit = True
        for connection in connections:
            found = rest_of(connection)
            assert b"the server is stopping" in found and found.rstrip().endswith(b"0") and b"data: [DONE]" in found
        server.thread.join(20)
        assert server.serving.answers == 0


def test_time_per_request_and_keep_alive():
    with running_server(request_timeout_s=0.3, ping_s=0.0005) as server:
        response = httpx.post(f"{server.url}/v1/completions", json=LONG | {"stream": False, "n": 8})
        assert response.json()["choices"][0]["stop_reason"] == "timeout"
        assert response.json()["choices"][0]["finish_reason"] == "length"
        text = httpx.post(f"{server.url}/v1/completions", json=LONG | {"n": 8}, timeout=20).text
        assert ": ping" in text and text.rstrip().endswith("data: [DONE]")


def test_a_reader_that_takes_nothing_is_given_up():
    with running_server(send_timeout_s=0.3, ping_s=0.001) as server:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.bound_port))
            body = json.dumps(
                {"prompt": "a" * 30, "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 16, "logprobs": 20}
            )
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body.encode()
            )  # fmt: skip
            deadline = time.monotonic() + 30
            while not server.serving.answers:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            while server.serving.answers:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_client_that_leaves_frees_its_place_without_a_stream(server):
    data = json.dumps(LONG | {"stream": False}).encode()
    with socket.create_connection(("127.0.0.1", server.bound_port), 5) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(data) + data
        )  # fmt: skip
        while not server.serving.answers:
            time.sleep(0.005)
    deadline = time.monotonic() + 10
    while server.serving.answers:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_metrics_have_vllms_names(server):
    before = metrics(server)
    asked = PROMPT | {"stream": True, "kvfold": {"time": "h2o:16+16"}, "prompt": "hello " * 15}
    httpx.post(f"{server.url}/v1/completions", json=asked)
    after = metrics(server)
    for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total",
        "prefix_cache_hits_total", "num_preemptions_total", "prompt_tokens_total", "generation_tokens_total",
        "time_to_first_token_seconds_count", "inter_token_latency_seconds_count", "e2e_request_latency_seconds_count",
        "request_success_total", "kv_pool_use_bytes", "kv_owner_compression", "kv_estimate_error",
    ):  # fmt: skip
        assert f"kvfold:{name}" in after, name
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["kvfold:generation_tokens_total"] == 8 and grown["kvfold:prompt_tokens_total"] == 90
    assert grown["kvfold:seen_tokens_total"] == 97 and grown["kvfold:kept_tokens_total"] == 32
    assert grown["kvfold:time_to_first_token_seconds_count"] == 1
    assert grown["kvfold:inter_token_latency_seconds_count"] == 7


def metrics(server):
    """The sum of all labels, by name."""
    found = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def test_the_live_state_tells_what_is_kept_and_nobodys_text(server):
    stop = threading.Event()

    def run():
        while not stop.is_set():
            body = LONG | {
                "stream": False,
                "kvfold": {"time": "h2o:16+16"},
                "prompt": "secret " * 20,
                "max_tokens": 300,
            }
            httpx.post(f"{server.url}/v1/completions", json=body, headers={"X-Request-Id": "mine"}, timeout=60)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while True:
            state = httpx.get(f"{server.url}/kvfold/live?once=1&maps=mine").json()
            if state["maps"] and state["requests"] and state["requests"][0]["seen_tokens"] > 150:
                break
            assert time.monotonic() < deadline
    finally:
        stop.set()
        thread.join(60)
    one, kept = state["requests"][0], state["maps"]["mine"]
    assert one["method"] == "h2o:16+16" and one["kept"] == [[32, 32], [32, 32]] and one["kv_bytes"] > 0
    assert len(kept["streams"]) == 4 and "secret" not in json.dumps(state)
    import base64

    for stream_of_bits in kept["streams"]:
        assert sum(byte.bit_count() for byte in base64.b64decode(stream_of_bits)) == 32


def test_prefixes_are_forgotten_on_request(server):
    for _ in range(2):
        httpx.post(f"{server.url}/v1/completions", json=PROMPT | {"prompt": "the same beginning " * 10})
    assert server.engine.stats()["prefixes"] > 0
    assert httpx.post(f"{server.url}/reset_prefix_cache").status_code == 200
    assert server.engine.stats()["prefixes"] == 0


def test_tokens_there_and_back(server):
    found = httpx.post(f"{server.url}/tokenize", json={"prompt": "häé 😀", "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) and found["max_model_len"] == 512
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "häé 😀"}
    chat = httpx.post(f"{server.url}/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert TOKENIZER.decode(chat["tokens"]) == "<user>hi<assistant>"
    for body in ({}, {"prompt": "a", "messages": []}, {"tokens": "x"}, {"tokens": [-1]}, {"tokens": [10**9]}):
        path = "detokenize" if "tokens" in body else "tokenize"
        assert httpx.post(f"{server.url}/{path}", json=body).status_code == 400, body


@pytest.mark.parametrize(
    "wrong",
    [
        {"model_names": ()},
        {"port": 70000},
        {"api_keys": ("",)},
        {"max_body_bytes": 1},
        {"ping_s": 0},
        {"max_model_len": 0},
    ],
)
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ValueError) as refused:
        ServerSettings(**({"model_names": ("a",)} | wrong))
    assert "\n" not in str(refused.value)


def test_a_dead_engine_is_told_to_who_asks():
    engine = new_engine()
    with running_server(engine) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        engine.close()
        assert httpx.get(f"{server.url}/health").status_code == 503
        response = httpx.post(f"{server.url}/v1/completions", json=PROMPT)
        assert response.status_code == 503 and response.headers["retry-after"]
        assert b" 200 " in raw(server, b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (CompletionChoice, {"index": 1, "text": "é", "logprobs": None, "finish_reason": None, "token_ids": [3, 4]}),
        (CompletionChoice, {"index": 0, "text": "", "finish_reason": "stop", "stop_reason": "timeout"}),
        (ChoiceDelta, {}),
        (ChoiceDelta, {"content": "a", "reasoning": "b"}),
    ],
)
def test_filled_is_what_pydantic_constructs(kind, fields):
    """Set fields, defaults, fields of ours that `openai` doesn't know, and what is set later."""
    made, expected = filled(kind, **fields), BaseModel.model_construct.__func__(kind, **fields)
    for one in (made, expected):
        one.added_later = [1]
    assert made == expected
    for unset in (True, False):
        texts = [one.model_dump_json(exclude_unset=unset) for one in (made, expected)]
        assert json.loads(texts[0]) == json.loads(texts[1])
