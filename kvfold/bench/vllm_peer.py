"""The other side of a comparison: vLLM on the same checkpoint, in a process and an environment of its own, since it pins its
own torch and transformers.

The far end of the pipe is this same file, run under the Python in which vLLM is installed, where it needs nothing of kvfold: the
first line of stdin is the engine's settings, every further line a job; each is answered by one line of JSON on stdout. What vLLM
and its libraries print goes to stderr.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

PYTHON_VARIABLE = "KVFOLD_VLLM_PYTHON"
"""The environment variable that names the Python in which vLLM is installed."""

_SIZE_LINE = "KV cache size"
"""Words of the line in which vLLM logs how many tokens its cache holds."""
_WRAPPED = re.compile(r"Value error, (.*?) \[type=value_error")
"""A sentence that says what is wrong, as pydantic, which reads vLLM's settings, wraps it."""
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
    def step_seconds(self) -> tuple[float, ...]:
        """Of each step behind the prompts: those until every row had its first token; of rows that wait for memory, all until the
        last one has begun.
        """
        ends = self.step_ends[self.step_begun.index(len(self.new_ids)) :]
        return tuple(after - before for before, after in pairwise(ends))

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
            [str(python or vllm_python()), __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
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
            raise _refused(f"vLLM: {wrapped[1] if wrapped else error}")
        return answer

    def _logged(self, words: str) -> str | None:
        """The first message with these words in what vLLM has printed so far."""
        printed = os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode(errors="replace")
        line = next((line for line in printed.split("\n") if words in line), None)
        return None if line is None else line.rpartition("] ")[2]

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "nothing")
        code = self._process.wait(timeout=_PATIENCE_SECONDS)  # -9 is what a machine without memory gives
        return f"its process ended with {code}; the last it said: {said}"


def _refused(text: str) -> ValueError:
    """A `UserError`, which the far end lacks."""
    from kvfold.errors import UserError

    return UserError(text)


def vllm_python() -> str:
    """The Python in which vLLM is installed: the one that a variable names, or this one. Raises `UserError` for neither."""
    named = os.environ.get(PYTHON_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise _refused(f"{PYTHON_VARIABLE} {named}: there is no such file: name the Python of vLLM's environment")
        return named
    if importlib.util.find_spec("vllm") is None:
        raise _refused(
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


def _answered(llm: Any, job: Mapping[str, Any], first: int) -> dict[str, Any]:
    """At the far end, greedy: `new_tokens` for each of `prompts` (token ids), all handed over at once and named from `first` on.
    Gives the `ids`, and of each step its end in seconds since the start, the rows that got a token in it, and those that have
    had one by then.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    def preemptions() -> int:
        return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")

    wanted = SamplingParams(
        temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )  # fmt: skip
    ids: dict[str, list[int]] = {}
    ends, rows, begun, before = [], [], [], preemptions()
    for number, prompt in enumerate(job["prompts"], start=first):
        ids[str(number)] = []
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, wanted)
    start = time.perf_counter()
    while llm.llm_engine.has_unfinished_requests():
        told = [(output.request_id, output.outputs[0].token_ids) for output in llm.llm_engine.step()]
        ends.append(time.perf_counter() - start)
        rows.append(sum(1 for _, new in told if new))
        for name, new in told:
            ids[name] += new
        begun.append(sum(1 for row in ids.values() if row))
    return {
        "ids": list(ids.values()), "step_ends": ends, "step_rows": rows, "step_begun": begun,
        "preemptions": preemptions() - before,
    }  # fmt: skip


def main() -> None:
    """The far end: vLLM's offline engine, driven step by step; answers until stdin ends, or until something fails."""
    # What stdout was is for answers alone; from here on everybody else's stdout is stderr.
    answers, asked = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1), 0
    os.dup2(2, 1)
    try:
        import vllm

        llm = vllm.LLM(**json.loads(sys.stdin.readline()), enable_prefix_caching=False, disable_log_stats=False)
        cache = llm.llm_engine.vllm_config.cache_config
        about = {"kv_tokens": cache.kv_cache_size_tokens, "block_tokens": cache.block_size}
        answers.write(json.dumps({"version": vllm.__version__, **about}) + "\n")
        for line in sys.stdin:
            job = json.loads(line)
            answers.write(json.dumps(_answered(llm, job, asked)) + "\n")
            asked += len(job["prompts"])
    except Exception as error:
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        raise


# vLLM may start further processes, which import this file again.
if __name__ == "__main__":
    main()
