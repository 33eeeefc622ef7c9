"""The console script as a process of its own: what really reaches its stdout and stderr."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
MODULE, _, NAME = PROJECT["scripts"]["kvfold"].partition(":")
# What pip writes into the script.
SCRIPT = [sys.executable, "-c", f"import sys; from {MODULE} import {NAME}; sys.argv[0] = 'kvfold'; sys.exit({NAME}())"]


def environment() -> dict[str, str]:
    """No compilation, and the repository in the path even where the tests run without an installation."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    return os.environ | {"KVFOLD_NATIVE": "0", "PYTHONPATH": path}


def run(*words: str, stdin: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [*SCRIPT, *words], input=stdin, capture_output=True, text=True, env=environment(), timeout=170
    )


# Its everyday forms are test_a_prompt_from_stdin, which sees this process's own streams too, and the process below.
@pytest.mark.slow
def test_generate_says_nothing_but_its_text_and_its_figures():
    done = run("generate", "tiny", "-", "--max-new-tokens", "8", "--time", "tova:4", stdin="Sir Walter Elliot")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
    assert done.stdout.startswith("Sir Walter Elliot") and done.stderr.startswith("tova:4: ")


def test_eval_says_nothing_but_json_and_its_notes():
    words = ["eval", "tiny", "--text", "text.txt", "--context", "200", "--windows", "9", "--json"]
    done = run(*words, "--out", "results/a b.json")
    assert done.returncode == 0, done.stderr
    assert [row["method"] for row in json.loads(done.stdout)["rows"]] == ["full"]
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("note: text: the text has ")
    written = json.loads(Path("results/a b.json").read_text())
    assert written["command"] == f"kvfold {' '.join(words)} --out 'results/a b.json'"


def test_bad_input_is_one_line():
    """What a loaded model refuses is tried in tests/cli/test_bad_input.py, in this process."""
    done = run("plan", "tiny", "--time", "tova:0")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("error: ") and "budget 0" in done.stderr


def test_the_package_runs_as_a_module():
    words = [sys.executable, "-m", "kvfold", "plan", "tiny", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=170)
    assert (done.returncode, done.stderr) == (0, "") and json.loads(done.stdout)["kind"] == "plan"


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_reader_that_goes_away_is_no_error(more):
    done = subprocess.Popen(
        [*SCRIPT, "plan", "llama-3.1-8b", *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    done.stdout.close()
    assert done.stderr.read() == b""
    assert done.wait(timeout=60) == 1
