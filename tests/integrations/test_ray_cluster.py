"""Engines as replicas of a real Ray Serve on this machine: clients that leave, replicas that are added, batches. A killed
replica, and what routing is worth: studies/ray_serve.py, whose result test_ray_results.py reads.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("ray") is None:
    pytest.skip("Ray is not installed here: `make test-integrations`", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]


def test_clients_that_leave_replicas_that_are_added_and_batches(tmp_path):
    script = ROOT / "tests" / "integrations" / "ray_script.py"
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["left", "refused", "scaled", "answered"]
