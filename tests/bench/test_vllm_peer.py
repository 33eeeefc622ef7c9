"""vLLM as a peer, with a stand-in for vLLM at the far end of the pipe: what is asked, what is told, and what goes wrong."""

import os
import stat
import sys
import textwrap
from pathlib import Path

import pytest

from kvfold.bench import vllm_peer
from kvfold.bench.vllm_peer import VllmPeer, VllmRun, worker_environment

STAND_IN = """
    import logging, os, types

    __version__ = "9.9"
    logger = logging.getLogger("vllm.core")
    logging.basicConfig(format="(MainProcess) INFO [core.py:1] %(message)s", level=logging.INFO)
    print("noise of a library on stdout")

    class SamplingParams:
        def __init__(self, max_tokens, **_):
            self.max_tokens = max_tokens

    class LLM:
        '''Counts on from each prompt's last token; a prompt is read in a step of its own.'''

        def __init__(self, model, **settings):
            if model == "unknown":
                raise ValueError("no such\\n model")
            if model == "odd":
                raise ValueError("1 error\\n  Value error, heads (9) must be even. [type=value_error, input_value=1]\\n  see x")
            if model == "crash":
                os._exit(3)
            logger.info("CPU KV cache size: %s tokens, and so on", f"{settings['kv_cache_memory_bytes']:,}")
            cache = types.SimpleNamespace(kv_cache_size_tokens=settings["kv_cache_memory_bytes"], block_size=16)
            self.llm_engine, self.rows, self.preempted = self, [], 0
            self.vllm_config = types.SimpleNamespace(cache_config=cache)

        def add_request(self, name, prompt, wanted):
            self.rows.append([name, prompt["prompt_token_ids"][-1], wanted.max_tokens, False])

        def has_unfinished_requests(self):
            return bool(self.rows)

        def step(self):
            waiting = [row for row in self.rows if not row[3]]
            told = waiting[:1] or self.rows
            outputs = []
            for row in told:
                row[1:] = [row[1] + 1, row[2] - 1, True]
                outputs.append(types.SimpleNamespace(request_id=row[0], outputs=[types.SimpleNamespace(token_ids=[row[1]])]))
            self.rows = [row for row in self.rows if row[2]]
            self.preempted += 1
            return outputs

        def get_metrics(self):
            return [types.SimpleNamespace(name="vllm:num_preemptions", value=float(self.preempted))]
"""
SIZES = {"max_rows": 2, "max_tokens": 16, "kv_bytes": 4096}


@pytest.fixture
def python(tmp_path) -> Path:
    """A Python in which the stand-in is installed."""
    package = tmp_path / "site" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(textwrap.dedent(STAND_IN))
    (package / "sampling_params.py").write_text("class RequestOutputKind:\n    DELTA = 1\n")
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path / "site"}" exec "{sys.executable}" "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def test_jobs_are_answered_one_after_the_other(python):
    with VllmPeer("model", python=python, **SIZES) as peer:
        assert peer.about == {
            "version": "9.9", "kv_tokens": 4096, "block_tokens": 16, "log": "CPU KV cache size: 4,096 tokens, and so on",
        }  # fmt: skip
        run = peer.run([[5, 10], [20]], 3)
        assert run.new_ids == ((11, 12, 13), (21, 22, 23))
        assert run.step_rows == (1, 1, 2, 2) and run.step_begun == (1, 2, 2, 2) and run.preemptions == 4
        assert peer.run([[7]], 2).new_ids == ((8, 9),)


def test_what_vllm_refuses_comes_back_on_one_line(python):
    with pytest.raises(ValueError, match="^vLLM: ValueError: no such model$"):
        VllmPeer("unknown", python=python, **SIZES)


def test_of_a_setting_that_pydantic_refuses_the_sentence_is_left(python):
    with pytest.raises(ValueError, match=r"^vLLM: heads \(9\) must be even\.$"):
        VllmPeer("odd", python=python, **SIZES)


def test_a_process_that_dies_is_an_error_and_no_wait(python):
    with pytest.raises(
        ValueError, match="^vLLM: its process ended with 3; the last it said: noise of a library on stdout$"
    ):
        VllmPeer("crash", python=python, **SIZES)


def test_decoding_is_timed_apart_from_prompts():
    run = VllmRun(
        new_ids=((1, 2, 3), (4, 5, 6)), step_ends=(2.0, 3.0, 3.5, 4.5), step_rows=(1, 1, 2, 2), step_begun=(1, 2, 2, 2),
        preemptions=0,
    )  # fmt: skip
    assert run.step_seconds == (0.5, 1.0)
    assert run.tokens_per_second == pytest.approx(6 / 4.5)
    assert run.rows_in_flight == pytest.approx((1 * 2 + 1 * 1 + 2 * 0.5 + 2 * 1) / 4.5)


def test_threads_are_bound_to_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    bound = [
        worker_environment(threads, devices)["VLLM_CPU_OMP_THREADS_BIND"]
        for threads, devices in ((2, 1), (4, 2), (2, 3))
    ]
    assert bound == ["0,1", "0,1|2,3", "0|1|0"]
    assert "OMP_NUM_THREADS" not in worker_environment(1, 1)


def test_an_environment_without_vllm_is_told_of(monkeypatch, tmp_path):
    monkeypatch.setenv(vllm_peer.PYTHON_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="there is no such file"):
        vllm_peer.vllm_python()
    monkeypatch.delenv(vllm_peer.PYTHON_VARIABLE)
    monkeypatch.setattr(vllm_peer.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="set KVFOLD_VLLM_PYTHON"):
        vllm_peer.vllm_python()
    monkeypatch.setattr(vllm_peer.importlib.util, "find_spec", lambda _: object())
    assert vllm_peer.vllm_python() == sys.executable
