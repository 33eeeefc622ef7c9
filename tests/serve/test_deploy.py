"""The examples of deployment say nothing that the server doesn't know."""

import json
import re
from pathlib import Path

import httpx

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_the_board_asks_for_metrics_that_exist(server):
    board = json.loads((DEPLOY / "grafana.json").read_text())
    asked = {
        name for panel in board["panels"] for one in panel["targets"] for name in re.findall(r"kvfold:\w+", one["expr"])
    }
    httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 2, "stream": True})
    told = set(re.findall(r"^(kvfold:\w+)", httpx.get(f"{server.url}/metrics").text, re.MULTILINE))
    assert len(asked) > 12 and asked <= told, asked - told


def test_the_commands_are_the_servers():
    for file in ("Dockerfile", "kvfold.service"):
        text = (DEPLOY / file).read_text()
        assert "kvfold" in text and "serve" in text and "KVFOLD_API_KEY" in text
