"""How a command ends: 2 for what the user got wrong, 1 for a failure or a fault of ours, in one line.

The traceback comes on request.
"""

import re
from pathlib import Path

import pytest
import torch

import kvfold as package
from kvfold.cache.allocator import CacheFull
from kvfold.errors import UserError, is_out_of_memory
from kvfold.train.loop import DivergedError

WHERE = "`kvfold --debug ...` shows where"
FAILURES = {
    "a mistake": (UserError("budget 0: write 1 or more"), 2, "error: budget 0: write 1 or more"),
    "a library's ValueError": (ValueError("no idea"), 1, f"failed: ValueError: no idea: {WHERE}"),
    "a KeyError": (KeyError("model.layers.0"), 1, f"failed: KeyError: 'model.layers.0': {WHERE}"),
    "an assertion": (AssertionError(), 1, f"failed: AssertionError: no more is known: {WHERE}"),
    "a full cache": (CacheFull("the call needs 3 more pages"), 1, "failed: the call needs 3 more pages"),
    "a run that diverged": (DivergedError("step 3: the loss is nan"), 1, "failed: step 3: the loss is nan"),
    "a full disk": (OSError(28, "No space left on device"), 1, "failed: [Errno 28] No space left on device"),
    "memory": (MemoryError(), 1, "failed: out of memory (MemoryError): make the batch"),
    "a GPU's memory": (
        torch.OutOfMemoryError("CUDA out of memory."),
        1,
        "failed: out of memory (CUDA out of memory.): make",
    ),
    "several lines": (ValueError("a\n  b"), 1, f"failed: ValueError: a b: {WHERE}"),
    "an interruption": (KeyboardInterrupt(), 1, "stopped"),
}


@pytest.fixture
def raising(monkeypatch):
    """`raising(error)`: planning raises it, as code of ours would."""

    def prepare(error: BaseException) -> None:
        code = compile("def plan_rows(*given, **named):\n    raise error", "somewhere.py", "exec")
        scope = {"error": error, "__name__": "kvfold.layout.planner"}
        exec(code, scope)
        monkeypatch.setattr("kvfold.layout.planner.plan_rows", scope["plan_rows"])

    return prepare


@pytest.mark.parametrize("kind", FAILURES)
def test_one_line_and_the_code(kvfold, raising, kind):
    error, code, line = FAILURES[kind]
    raising(error)
    done = kvfold("plan tiny")
    assert (done.code, done.out, done.err.count("\n")) == (code, "", 1), done
    assert done.err.startswith(line)


@pytest.mark.parametrize("kind", ["a mistake", "a KeyError", "a full cache"])
def test_the_traceback_on_request(kvfold, raising, kind):
    error, code, line = FAILURES[kind]
    raising(error)
    done = kvfold("--debug plan tiny")
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("Traceback (most recent call last):") and 'File "somewhere.py", line 2' in done.err
    assert done.err.splitlines()[-1] == line.removesuffix(f": {WHERE}")
    assert kvfold("plan tiny").err.count("\n") == 1


def test_bad_usage_is_typers(kvfold):
    for line in ("plan", "plan tiny --no-such-option", "plan tiny --batch many", "nothing"):
        done = kvfold(line)
        assert (done.code, done.out) == (2, "") and "Usage:" in done.err


def test_torchs_own_error_on_a_cpu_is_known():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value) and not is_out_of_memory(RuntimeError("sizes don't match"))


def test_it_is_a_value_error_for_those_who_import_kvfold():
    assert package.UserError is UserError and issubclass(UserError, ValueError)
    with pytest.raises(package.UserError, match="unknown time method 'lru'"):
        package.parse_time("lru:4")


def test_no_room_raises_plain_value_errors():
    """What is meant for the user has the type that says so."""
    for path in Path(package.__file__).parent.rglob("*.py"):
        assert not re.search(r"raise ValueError\(", path.read_text(encoding="utf-8")), path
