"""The other side of a comparison: vLLM on the same checkpoint, in a process and an environment of its own, since it pins its
own torch and transformers. vllm_worker.py is the far end of the pipe.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from kvfold.errors import UserError

PYTHON_VARIABLE = "KVFOLD_VLLM_PYTHON"
"""The environment variable that names the Python in which vLLM is installed."""

_SIZE_LINE = "KV cache size"
"""Words of the line in which vLLM logs how many tokens its cache holds."""
_WRAPPED = re.compile(r"Value error, (.*?) \[type=value_error")
"""A sentence that says what is wrong, as pydantic, which reads vLLM's settings, wraps it."""
_WORKER = Path(__file__).with_name("vllm_worker.py")
_SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
"""One process, so that a step can be timed, and no word to the network."""

_PATIENCE_SECONDS = 20
"""For a process that was told to end, or that has stopped answering."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmRun:
    """One job: all rows handed over at once, greedy."""

    new_ids: tuple[tuple[int, ...], ...]
    """What was generated, a row each."""
    step_ends: tuple[float, ...]
    """When each step ended, seconds since the start."""
    step_rows: tuple[int, ...]
    """Rows that got a token in each step."""
    step_begun: tuple[int, ...]
    """Rows that have had a token by the end of each step."""
    preemptions: int
    """Times that a row gave up its memory and had to begin again."""

    @property
    def num_steps(self) -> int:
        """Steps of the engine, prompts included."""
        return len(self.step_ends)

    @property
    def prefill_steps(self) -> int:
        """Steps until every row had its first token; of rows that wait for memory, all until the last one has begun."""
        return self.step_begun.index(len(self.new_ids)) + 1

    @property
    def prefill_seconds(self) -> float:
        """Seconds until every row had its first token."""
        return self.step_ends[self.prefill_steps - 1]

    @property
    def step_seconds(self) -> tuple[float, ...]:
        """Of each step behind the prompts."""
        ends = self.step_ends[self.prefill_steps - 1 :]
        return tuple(after - before for before, after in pairwise(ends))

    @property
    def decode_tokens_per_second(self) -> float:
        """Of all rows together, from the step that ends the prompts to the last."""
        return sum(self.step_rows[self.prefill_steps :]) / (self.step_ends[-1] - self.prefill_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together, prompts included in the time."""
        return sum(self.step_rows) / self.step_ends[-1]

    @property
    def rows_in_flight(self) -> float:
        """Mean number of rows that got a token, over the time of all steps."""
        starts = (0.0, *self.step_ends[:-1])
        spans = [end - start for start, end in zip(starts, self.step_ends, strict=True)]
        return sum(rows * span for rows, span in zip(self.step_rows, spans, strict=True)) / self.step_ends[-1]


class VllmPeer:
    """vLLM's engine on one checkpoint; to be used in a `with`."""

    def __init__(
        self, model: str | Path, *, max_rows: int, max_tokens: int, kv_bytes: int, dtype: str = "float32",
        threads: int | None = None, python: str | Path | None = None, options: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        """`max_tokens`: of one row, prompt and answer. A step takes all rows' prompts, so that all begin to decode at once.
        `options`: more settings of vLLM's engine. Raises `UserError` where vLLM can't serve the model, in its own words.
        """
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
        threads = threads or len(os.sched_getaffinity(0))
        settings = {
            "model": str(model), "dtype": dtype, "max_model_len": max_tokens, "max_num_seqs": max_rows,
            "max_num_batched_tokens": max_rows * max_tokens, "kv_cache_memory_bytes": kv_bytes,
            **(options or {}),
        }  # fmt: skip
        self._process = subprocess.Popen(
            [str(python or vllm_python()), str(_WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            env=worker_environment(threads, settings.get("tensor_parallel_size", 1)), text=True, bufsize=1,
        )  # fmt: skip
        try:
            self.about = self._asked(settings) | {"log": self._logged(_SIZE_LINE)}
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> VllmRun:
        """`new_tokens` for each prompt of token ids."""
        told = self._asked({"prompts": [list(prompt) for prompt in prompts], "new_tokens": new_tokens})
        return VllmRun(
            new_ids=tuple(tuple(ids) for ids in told["ids"]), step_ends=tuple(told["step_ends"]),
            step_rows=tuple(told["step_rows"]), step_begun=tuple(told["step_begun"]), preemptions=told["preemptions"],
        )  # fmt: skip

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            pipe.close()
        try:
            self._process.wait(timeout=_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _asked(self, question: Mapping[str, Any]) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            error = " ".join(answer["error"].split())
            wrapped = _WRAPPED.search(error)
            raise UserError(f"vLLM: {wrapped[1] if wrapped else error}")
        return answer

    def _logged(self, words: str) -> str | None:
        """The first message with these words in what vLLM has printed so far."""
        printed = os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode(errors="replace")
        line = next((line for line in printed.split("\n") if words in line), None)
        return None if line is None else line.rpartition("] ")[2]

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        return f"its process ended with {self._ended()}; the last it said: " + next(
            (line for line in reversed(lines) if line.strip()), "nothing"
        )

    def _ended(self) -> int:
        """The exit code; -9 is what a machine without memory gives."""
        return self._process.wait(timeout=_PATIENCE_SECONDS)


def vllm_python() -> str:
    """The Python in which vLLM is installed: the one that a variable names, or this one. Raises `UserError` for neither."""
    named = os.environ.get(PYTHON_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise UserError(f"{PYTHON_VARIABLE} {named}: there is no such file: name the Python of vLLM's environment")
        return named
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            f"vLLM is not installed beside kvfold: set {PYTHON_VARIABLE} to the Python of an environment that has it"
        )
    return sys.executable


def worker_environment(threads: int, devices: int) -> dict[str, str]:
    """This process's environment, but for how many threads vLLM's CPU build takes, and on which cores: its own variable says
    so, one range of cores for each of `devices`.
    """
    cores = sorted(os.sched_getaffinity(0))[:threads]
    share = max(1, len(cores) // devices)
    groups = [cores[share * device % len(cores) :][:share] for device in range(devices)]
    bound = "|".join(",".join(map(str, group)) for group in groups)
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "PYTHONPATH")}
    return kept | _SETTINGS | {"VLLM_CPU_OMP_THREADS_BIND": bound}
