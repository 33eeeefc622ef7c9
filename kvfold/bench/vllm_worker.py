"""vLLM at the other end of a pipe: one engine, asked again and again. It runs under the Python in which vLLM is installed,
as a file, and needs nothing of kvfold.

The first line of stdin is the engine's settings, every further line a job; each is answered by one line of JSON on stdout.
What vLLM and its libraries print goes to stderr. vllm_peer.py is the near end.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

_SIZE_LINE = "KV cache size"
"""The words of the line in which vLLM logs how many tokens its cache holds."""


class Engine:
    """vLLM's offline engine, driven step by step."""

    def __init__(self, settings: Mapping[str, Any]):
        """`settings`: `model`, and what vLLM's engine takes beside it."""
        import vllm

        # vLLM sets up its logging with the first of its names that is used, and takes away the handlers that were there.
        make, self._lines = vllm.LLM, []
        logging.getLogger("vllm").addHandler(_Keeper(self._lines))
        self._llm = make(**settings, enable_prefix_caching=False, disable_log_stats=False)
        self._engine, self._version, self._asked = self._llm.llm_engine, vllm.__version__, 0

    def about(self) -> dict[str, Any]:
        """The version, the tokens that the cache holds, and the line of vLLM's log that says so."""
        cache = self._engine.vllm_config.cache_config
        return {
            "version": self._version, "kv_tokens": cache.kv_cache_size_tokens, "block_tokens": cache.block_size,
            "log": next((line for line in self._lines if _SIZE_LINE in line), None),
        }  # fmt: skip

    def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Greedy: `new_tokens` for each of `prompts` (token ids), all handed over at once. Gives the `ids`, and of each step its
        end in seconds since the start, the rows that got a token in it, and those that have had one by then.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        wanted = SamplingParams(
            temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        ids: dict[str, list[int]] = {}
        ends, rows, begun, before = [], [], [], self._preemptions()
        for prompt in job["prompts"]:
            name, self._asked = str(self._asked), self._asked + 1
            ids[name] = []
            self._engine.add_request(name, {"prompt_token_ids": prompt}, wanted)
        start = time.perf_counter()
        while self._engine.has_unfinished_requests():
            told = [(output.request_id, output.outputs[0].token_ids) for output in self._engine.step()]
            ends.append(time.perf_counter() - start)
            rows.append(sum(1 for _, new in told if new))
            for name, new in told:
                ids[name] += new
            begun.append(sum(1 for row in ids.values() if row))
        return {
            "ids": list(ids.values()), "step_ends": ends, "step_rows": rows, "step_begun": begun,
            "preemptions": self._preemptions() - before,
        }  # fmt: skip

    def _preemptions(self) -> int:
        return sum(int(metric.value) for metric in self._llm.get_metrics() if metric.name == "vllm:num_preemptions")


class _Keeper(logging.Handler):
    """Keeps what is logged."""

    def __init__(self, lines: list[str]):
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        """Add the line."""
        self._lines.append(record.getMessage())


def _own_stdout() -> TextIO:
    """What stdout was, for answers alone; from here on everybody else's stdout is stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    return answers


def main() -> None:
    """Answer until stdin ends, or until something fails."""
    answers = _own_stdout()
    try:
        engine = Engine(json.loads(sys.stdin.readline()))
        answers.write(json.dumps(engine.about()) + "\n")
        for line in sys.stdin:
            answers.write(json.dumps(engine.run(json.loads(line))) + "\n")
    except Exception as error:
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        raise


# vLLM may start further processes, which import this file again.
if __name__ == "__main__":
    main()
