"""A real server on loopback for tests: a tiny random model, uvicorn in a thread, a port of its own."""

import socket
import threading
import time
from contextlib import contextmanager

from kvfold.engine.engine import Engine
from kvfold.serve.app import create_app
from kvfold.serve.http import Server
from kvfold.serve.serving import ServerSettings
from tiny import TOKENIZER, tiny_model

METHODS = ["full", "dms:8", "h2o:16+16"]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}\n{% endfor %}"
    "{% if tools %}{{ tools | length }} tools\n{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% if think %}<think>\n{% endif %}{% endif %}"
    "{# <tool_call> and </think> are known to this template #}"
)


def new_engine(**options) -> Engine:
    options = {"page_slots": 4, "max_running": 16} | options
    return Engine(tiny_model(), TOKENIZER, options.pop("kv_memory", "2MB"), METHODS, **options)


@contextmanager
def running_server(engine: Engine | None = None, **settings):
    """A server that answers at `server.url`; stopped and closed at the end."""
    engine = engine or new_engine()
    settings = {
        "model_names": ("tiny", "alias"),
        "port": 0,
        "chat_template": TEMPLATE,
        "shutdown_timeout_s": 5.0,
    } | settings
    server = Server(create_app(engine, ServerSettings(**settings)))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    server.url = f"http://127.0.0.1:{server.bound_port}"
    server.thread, server.engine = thread, engine
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(20)
        engine.close()
        assert not thread.is_alive(), "the server did not stop"


def raw(server, data: bytes, *, timeout: float = 5.0, close: bool = True) -> bytes:
    """What a server answers to these bytes."""
    with socket.create_connection(("127.0.0.1", server.bound_port), timeout) as connection:
        connection.sendall(data)
        found = b""
        while True:
            try:
                more = connection.recv(65536)
            except (ConnectionResetError, TimeoutError):
                return found
            if not more:
                return found
            found += more
            if not close and b"\r\n\r\n" in found:
                return found
