"""Engines as replicas of a real Ray Serve on this machine: routing, a killed replica, clients that leave, batches."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("ray") is None:
    pytest.skip("Ray is not installed here: `make test-integrations`", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]


def test_nobody_is_left_without_an_answer_when_a_replica_dies(tmp_path):
    """And prompts go where their beginning was read. The study is the test: it keeps the books."""
    out = tmp_path / "ray-serve.json"
    command = [sys.executable, str(ROOT / "studies" / "ray_serve.py"), str(out), "--requests", "96"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    routed, plain, killed = json.loads(out.read_text())["rows"]
    for row in (routed, plain, killed):
        assert row["answered_once"] == row["as_one_engine_answers"] == row["requests"] == 96
        assert row["answered_twice"] == row["never_answered"] == row["failed_otherwise"] == 0
    assert routed["failed_cleanly"] == plain["failed_cleanly"] == 0
    assert routed["hit_rate"] > plain["hit_rate"]
    assert killed["attempts"] == 96 + killed["failed_cleanly"] and killed["killed"]["replaced_after_s"] > 0


def test_clients_that_leave_replicas_that_are_added_and_batches(tmp_path):
    script = ROOT / "tests" / "integrations" / "ray_script.py"
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["left", "refused", "scaled", "answered"]
