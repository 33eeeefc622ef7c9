"""From `git clone` to a chat whose memory falls: how long does a newcomer wait?

    python studies/serve_newcomer.py [results/serve/newcomer.json]

Clones this repository as it is committed, types `make serve`, asks the page's own question through the page's own address,
and reads the page's live state until less is kept than was seen. Seconds from the clone's beginning.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]
QUESTION = "Write a story about a lighthouse keeper who finds a letter in a bottle."
LIMIT_S = 600


def main(out: Path) -> None:
    """One try, one file."""
    began, found = time.monotonic(), {}

    def reached(what: str) -> None:
        found[what] = round(time.monotonic() - began, 1)
        print(what, found[what], flush=True)

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), f"{folder}/kvfold"], check=True)
        reached("cloned")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        process = subprocess.Popen(
            ["make", "serve", "PORT=0"], cwd=f"{folder}/kvfold", env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        killer = threading.Timer(LIMIT_S, os.killpg, (process.pid, signal.SIGKILL))
        killer.start()
        try:
            for line in process.stdout:
                place = re.search(r"at (http://[\d.:]+)/v1", line)
                if place:
                    break
                if line.startswith("·"):
                    reached(line.strip("· \n").partition(",")[0])
            else:
                raise SystemExit("the server did not start")
            reached("the server answers")
            found |= chat(place[1], reached)
        finally:
            killer.cancel()
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


def chat(url: str, reached) -> dict:
    """Ask, and look at the live state meanwhile."""
    assert "<title>kvfold</title>" in httpx.get(url).text
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 400, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    usage, pieces, fell = {}, 0, False
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=300) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            data = json.loads(line[6:])
            usage = data.get("usage") or usage
            pieces += 1
            if pieces == 2:
                reached("the first words")
            if not fell and pieces % 16 == 0:
                for one in httpx.get(f"{url}/kvfold/live?once=1").json()["requests"]:
                    heads = [number for owner in one["kept"] for number in owner]
                    if heads and sum(heads) / len(heads) < 0.8 * one["seen_tokens"]:
                        fell = True
                        reached("a fifth of the memory gone")
    reached("the answer is whole")
    return {"kvfold": usage.get("kvfold")}


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results/serve/newcomer.json"))
