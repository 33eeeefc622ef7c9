"""What `make test-integrations` measured last of Ray Serve and vLLM, as committed: the bars that it has to meet."""

import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "results" / "integrations"


def rows(file: str) -> dict[str, dict]:
    result = json.loads((RESULTS / file).read_text())
    assert result["requests"] == 200
    return {row["name"]: row for row in result["rows"]}


@pytest.mark.parametrize("file", ["ray-serve.json", "ray-serve-routing.json"])
def test_every_request_is_answered_once_and_as_one_engine_answers(file):
    for row in rows(file).values():
        assert row["answered_once"] == row["requests"] == row["as_one_engine_answers"] == 200
        assert row["answered_twice"] == row["never_answered"] == row["failed_otherwise"] == 0
        assert row["attempts"] == 200 + row["failed_cleanly"]


def test_a_replica_that_dies_fails_its_requests_cleanly_and_is_replaced():
    killed = rows("ray-serve.json")["one replica killed"]
    assert killed["failed_cleanly"] > 0 and killed["killed"]["replaced_after_s"] > 0
    assert all(one.startswith("clean: ") for one in killed["failures"])


def test_no_request_is_worked_on_twice_behind_its_client():
    for row in rows("ray-serve.json").values():
        assert row["generated_tokens"] == row["answered_tokens"] > 0


@pytest.mark.parametrize("file", ["ray-serve.json", "ray-serve-routing.json"])
def test_routing_finds_more_of_what_was_read(file):
    found = rows(file)
    assert found["routed by prefix"]["hit_rate"] > found["Serve's own router"]["hit_rate"]
