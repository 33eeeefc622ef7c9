"""The GPU run on a machine without one: its rows say so; where Triton is, its interpreter stands in for the device."""

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kvfold.bench import gpu
from kvfold.bench.gpu import Gpu, measured
from kvfold.bench.kernel import VARIANTS, Variant, random_call
from kvfold.ops.paged import decode_reference

NEEDS_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: its kernels can't be run or compiled"
)
SMALL = Variant(group=2, head_dim=32, q=torch.float32, k_pages=torch.float32, v_pages=torch.float32)
INT8 = dataclasses.replace(SMALL, q=torch.float16, k_pages=torch.int8, v_pages=torch.int8, written=False, scored=True)
LENGTHS = ((0, 1), (15, 16), (20, 3))
TINY = gpu.Shape(name="tiny", layers=2, kv_heads=2, variant=SMALL, context=32)


@pytest.fixture
def interpreter():
    """The CPU in place of a GPU."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
    from kvfold.ops.paged_triton import decode_triton

    return Gpu(device=torch.device("cpu"), attend=decode_triton, deadline=time.monotonic() + 600, repeats=1)


def test_without_a_gpu_every_row_says_not_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main(tmp_path / "gpu.json")
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["state"] for row in result["rows"]} == {"not measured"}
    assert {row["row"] for row in result["rows"]} == {"check", "graph", "bandwidth", "kernel", "tiling"}
    kernels = [row for row in result["rows"] if row["row"] == "kernel"]
    llama = {
        (row["compression"], row["lengths"]) for row in kernels if row["shape"] == "Llama-2-7B" and row["batch"] == 8
    }
    assert llama == set(itertools.product((1, 8), ("even", "uneven")))
    assert all(name in kernels[0] for name in ("layers", "kv_heads", "context", "head_dim"))
    assert not list(tmp_path.glob("*.part"))


def test_a_row_that_fails_or_comes_too_late_says_so():
    late = Gpu(device=torch.device("cpu"), attend=None, deadline=time.monotonic() - 1)
    assert measured(late, {"row": "x"}, lambda: {"ms": 1}) == {
        "row": "x",
        "state": "not measured",
        "why": "out of time",
    }
    early = dataclasses.replace(late, deadline=time.monotonic() + 60)
    assert measured(early, {"row": "x"}, lambda: {"ms": 1}) == {"row": "x", "state": "measured", "ms": 1}
    row = measured(early, {"row": "x"}, lambda: [][0])
    assert (row["state"], row["why"]) == ("failed", "IndexError: list index out of range")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_made_up_calls_hold_together(variant):
    """Every variant is a call that the plain form takes; poison stays where nothing is stored."""
    stored = torch.tensor([[3, 40], [0, 17], [5, 5]])
    call = random_call(variant, stored, device="cpu")
    out = decode_reference(
        call.batch, call.q_BHD, call.k_BKD, call.v_BKD, scale=call.scale, softcap=call.softcap
    )  # fmt: skip
    assert out.isfinite().all() and not out[2].any()
    # In a window the short streams of these sequences hold nothing that is young enough.
    assert out[0, -1].any() and (variant.windowed or out[:2].any(dim=-1).all())
    pool = call.batch.k_PND if call.batch.k_scale_PNS is None else call.batch.k_scale_PNS
    free = pool.isnan().all(dim=-1).sum().item()
    assert free == pool.shape[0] * pool.shape[1] - stored.sum() - (4 if variant.written else 0)
    assert torch.equal(call.batch.length_BK, (stored + variant.written).int())


def test_uneven_lengths_have_the_mean_of_even_ones():
    shape = dataclasses.replace(TINY, kv_heads=32, context=4096)
    even, uneven = (gpu.stream_lengths(shape, 3, 8, spread).double() for spread in ("even", "uneven"))
    assert (even == 512).all()
    assert uneven.mean().item() == pytest.approx(512, rel=1e-3)
    assert uneven.max() / uneven.min() == pytest.approx(100, rel=0.01)
    assert not torch.equal(uneven[0], uneven[1])


@NEEDS_TRITON
def test_checks_pass_on_the_kernels_and_fail_on_others(interpreter):
    for row in gpu.check_rows(interpreter, (SMALL, INT8), LENGTHS):
        assert row["state"] == "measured" and row["passed"], row
        assert row["output_error"] < row["bound"]
    assert row["score_error"] < 1e-3 and row["received_error"] < 1e-3

    def wrong(*call, **kwargs):
        return 1.02 * decode_reference(*call, **kwargs)

    interpreter.attend = wrong
    assert not any(row["passed"] for row in gpu.check_rows(interpreter, (SMALL,), LENGTHS))

    def silent(batch, q, k, v, **kwargs):
        return decode_reference(dataclasses.replace(batch, slots_BK=None), q, k, v, **kwargs)

    interpreter.attend = silent
    rows = [*gpu.check_rows(interpreter, (SMALL,), LENGTHS)]
    assert not rows[0]["pages_equal"] and not rows[0]["passed"]


@NEEDS_TRITON
def test_a_replayed_call_sees_new_lengths(interpreter):
    variant = dataclasses.replace(SMALL, written=False)
    calls = []

    def replayed(*call, **kwargs):
        calls.append(decode_reference(*call, **kwargs))
        return calls[-1]

    for attend in (interpreter.attend, replayed):
        interpreter.attend = attend
        (row,) = gpu.graph_rows(interpreter, variant, LENGTHS)
        assert row["passed"], row
    assert len(calls) == 1


@NEEDS_TRITON
def test_times_are_set_beside_bytes(interpreter):
    interpreter.bandwidth = 1e9
    cases = [(TINY, 1, 4, "even"), (dataclasses.replace(TINY, variant=INT8), 1, 1, "uneven")]
    even, uneven = gpu.kernel_rows(interpreter, cases)
    assert even["read_bytes"] == 2 * 2 * (8 + 1) * 2 * 32 * 4
    assert even["of_bandwidth"] == pytest.approx(even["bytes_ms"] / even["graph_ms"]["median"])
    assert even["sdpa_ms"]["median"] > 0 and even["host_us_per_layer"] > 0
    assert uneven["read_bytes"] % (2 * (32 + 2)) == 0 and "sdpa_ms" not in uneven
    rows = itertools.islice(gpu.tiling_rows(interpreter, (TINY,)), 2)
    assert all(row["graph_ms"]["median"] > 0 for row in rows)
    (row,) = gpu.bandwidth_rows(interpreter, 1 << 16)
    assert interpreter.bandwidth == max(row["copy_bytes_per_second"], row["read_bytes_per_second"])


@NEEDS_TRITON
@pytest.mark.timeout(600)
def test_machine_code_is_made_without_a_gpu_and_once_for_all_lengths():
    """In a process of its own: kernels of this one may be interpreted."""
    code = """
import json, torch
from cubins import cubin_rows, example
from kvfold.bench.kernel import Variant
from kvfold.ops import paged_triton
variant = Variant(group=4, k_pages=torch.int8, scored=True, biased=True, windowed=True, written=False)
rows = list(cubin_rows((80, 90), (variant,)))
for length in (1, 16, 33, 4097, 65536):
    for rows_of in (1, 16):
        for launch in example(variant, rows=rows_of, length=length):
            for name in ("lengths", "starts", "received"):
                if launch.arguments.get(name) is not None:  # cut out of a larger tensor, at any place
                    launch.arguments[name] = torch.zeros(99, dtype=launch.arguments[name].dtype)[length % 16 :]
            launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.constants, **launch.options)
kernels = [paged_triton._attend_span, paged_triton._join_spans, paged_triton._hand_out]
print(json.dumps([rows, [len(kernel.device_caches[90][0]) for kernel in kernels]]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(Path(__file__).parents[2] / "studies"), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    rows, versions = json.loads(told.stdout)
    assert [row["kernel"] for row in rows] == ["attend_span", "join_spans", "hand_out"] * 2
    assert all(row["stack_bytes"] == 0 and row["cubin_bytes"] > 0 and row["resident_programs"] >= 2 for row in rows)
    assert versions == [1, 1, 1], "a length of its own gets machine code of its own"
