"""Start the OpenAI-compatible server on loopback, and ask it with OpenAI's client.

  python examples/serve.py MODEL

The server is a thread here and takes a free port; `kvfold serve MODEL` runs it as a process. Needs `pip install 'kvfold[serve]'`.
"""

import sys
from queue import SimpleQueue
from threading import Thread

from openai import OpenAI

import kvfold
from kvfold.serve.app import create_app
from kvfold.serve.http import Server
from kvfold.serve.serving import ServerSettings


def main() -> None:
    """One question under each of two methods, which share one pool of memory."""
    source, started = sys.argv[1], SimpleQueue()
    model, tokenizer = kvfold.load(source), kvfold.load_tokenizer(source)
    with kvfold.Engine(model, tokenizer, "64MB", methods=["full", "h2o:32+32"]) as engine:
        server = Server(create_app(engine, ServerSettings(model_names=("mine",), port=0)), say=started.put)
        thread = Thread(target=server.run, daemon=True)
        thread.start()
        print(started.get(timeout=60))
        with OpenAI(base_url=f"http://127.0.0.1:{server.bound_port}/v1", api_key="none") as client:
            for time in engine.methods:
                method = {"kvfold": {"time": time}}
                answer = client.completions.create(model="mine", prompt="Once upon", max_tokens=80, extra_body=method)
                print(f"{time}: {answer.choices[0].text!r}")
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
