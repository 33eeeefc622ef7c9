"""`serve`: what can't be served is said in one line; what can answers, in a process of its own, and stops when told."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from kvfold.serve.app import generation_defaults, serve
from tiny import TOKENIZER, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("model") / "tiny-model"
    tiny_model().save_pretrained(found)
    TOKENIZER.save_pretrained(found)
    recommended = {"do_sample": True, "temperature": 0.5, "top_k": 7, "max_new_tokens": 5}
    (found / "generation_config.json").write_text(json.dumps(recommended))
    return found


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"model": None}, "--demo"),
        ({"device": "cuda:0,cuda:1"}, "1 device"), ({"model": "no/such-model"}, "no/such-model"), ({"port": -1}, "port"),
        ({"chat_template": "nowhere.jinja"}, "chat_template"), ({"max_model_len": 10**6}, "max_model_len"),
        ({"method": ["nonsense"]}, "nonsense"), ({"generation_config": "nowhere"}, "generation_config"),
        ({"kv_memory": "1kB"}, "kv_memory"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_what_cannot_be_served_is_said_in_one_line(folder, wrong, word):
    with pytest.raises(ValueError, match=word) as refused:
        serve(**({"model": str(folder), "port": 0, "served_model_name": ["tiny"]} | wrong))
    assert "\n" not in str(refused.value)


def test_sampling_defaults_of_the_checkpoint(folder, tmp_path):
    model = tiny_model()
    assert generation_defaults("auto", model, str(folder)) == {"temperature": 0.5, "top_k": 7, "max_tokens": 5}
    assert generation_defaults("vllm", model, str(folder)) == {}
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": 0.4}))
    assert generation_defaults(str(tmp_path), model, "elsewhere") == {"top_p": 0.4}


SERVE = """
import sys
from kvfold.serve.app import serve

serve(
    sys.argv[1], port=int(sys.argv[2]), served_model_name=["tiny-model"], kv_memory="2MB",
    say=lambda line: print(line, flush=True),
)
"""
LISTEN = """
import socket

listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
connections = []
while True:
    connections.append(listener.accept())
    connections[-1][0].sendall(b"taken")
"""


def begin(script, *more):
    """A process, and the first line that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "KVFOLD_API_KEY": "secret"},
    )  # fmt: skip
    return process, process.stdout.readline()


def ask(url):
    body = {"model": "tiny-model", "prompt": "hello"}
    response = httpx.post(f"{url}/v1/completions", json=body, headers={"Authorization": "Bearer secret"}, timeout=20)
    return response.json()["usage"]["completion_tokens"]


@pytest.fixture
def left_port():
    """A port whose process was killed with a client on the line: the system still holds the connection's end."""
    process, port = begin(LISTEN)
    with socket.create_connection(("127.0.0.1", int(port)), timeout=20) as connection:
        assert connection.recv(5) == b"taken"
        process.kill()
        process.communicate(timeout=20)
        yield port.strip()


def test_a_process_serves_on_a_port_left_by_a_kill_and_stops_when_told(folder, left_port):
    process, line = begin(SERVE, str(folder), left_port)
    try:
        url = f"http://127.0.0.1:{left_port}"
        assert f" at {url}/v1" in line, process.stderr.read()
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).status_code == 401
        assert ask(url) <= 5
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
        assert time.monotonic() - began < 15 and "/v1/completions 200" in log and "hello" not in log
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=20)
