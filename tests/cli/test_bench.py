"""`kvfold bench prefill`, `capacity`, `kernel`, `gpu` and filled caches, small enough to run here."""

import json

import pytest

from kvfold.bench import kernel, measuring
from kvfold.bench.measuring import Reader

FILLED = "bench decode tiny --batch 2 --prompt 48 --new 2 --repeats 1 --filled"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Little is read to learn the bandwidth."""
    monkeypatch.setattr(kernel, "_COLD_BYTES", 1 << 20)
    for module in (kernel, measuring):
        monkeypatch.setattr(module, "Reader", lambda: Reader(buffer_bytes=1 << 20, read_bytes=1 << 16))


def rows_of(done):
    assert (done.code, done.err) == (0, "")
    return json.loads(done.out)["rows"]


def test_caches_are_filled_to_the_compression_that_is_asked_for(kvfold):
    words = (
        "--time full --time dms:16 --gates channel --compression 2 --compression 3 --compare-bits int8 --text text.txt"
    )
    rows = rows_of(kvfold(f"{FILLED} {words} --json"))
    assert [(row["bits"], row["forced"]) for row in rows] == [
        ("model", None), ("model", 2.0), ("model", 3.0), ("int8", None), ("int8", 2.0), ("int8", 3.0),
    ]  # fmt: skip
    full, half, third, packed, *_ = rows
    assert [row["compression"] for row in (full, half, third)] == pytest.approx([1, 2, 3], rel=0.05)
    assert full["kv_bytes_read"] > half["kv_bytes_read"] > third["kv_bytes_read"]
    assert full["kv_bytes_read"] > packed["kv_bytes_read"] and packed["over_first"]["median"] > 0
    assert full["roofline_ms"] > 0 and full["ratio"]["median"] > 0  # transformers took turns
    assert "forced" in kvfold(f"{FILLED} {words}").out


def test_prompts_are_read_beside_what_their_flop_allow(kvfold):
    rows = rows_of(
        kvfold("bench prefill tiny --batch 2 --prompt 40 --time full --time window:8+4 --call 0 --call 16 --json")
    )
    assert [(row["call_tokens"], row["method"]) for row in rows] == [
        (40, "full"), (40, "window:8+4"), (16, "full"), (16, "window:8+4"),
    ]  # fmt: skip
    assert all(row["share_of_allowed"] > 0 for row in rows)
    assert [row["compression"] for row in rows] == pytest.approx([1, 40 / 12, 1, 40 / 12])


def test_rows_are_read_in_until_the_cache_is_full(kvfold):
    done = kvfold("bench capacity tiny --prompt 64 --kv-memory 200kB --time full --time window:12+4 --json")
    full, window = rows_of(done)
    assert full["rows"] == full["planned_rows"] and window["rows"] == window["planned_rows"]
    assert window["rows"] > 2 * full["rows"] > 0 and full["allocated_bytes"] <= 200_000
    (some,) = rows_of(kvfold("bench capacity tiny --prompt 64 --kv-memory 200kB --most 1 --json"))
    assert some["stopped"] and some["rows"] == 1


def test_kernels_and_gpu(kvfold):
    (row,) = rows_of(kvfold("bench kernel --storage int8 --tokens 32 --spread 1 --batch 1 --repeats 1 --json"))
    assert row["storage"] == "int8" and row["share"] > 0
    assert "int8" in kvfold("bench kernel --storage int8 --tokens 32 --spread 1 --batch 1 --repeats 1").out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("bench decode tiny --filled", "one point is measured"),
        ("bench decode tiny --compression 2", "add --filled"),
        ("bench decode tiny --peers pytorch", "peers 'pytorch'"),
        (f"{FILLED} --time window:8+4 --compression 2 --peers none --prompt 300", "the model reads 256"),
        ("bench kernel --storage int3", "storage 'int3'"),
        ("bench kernel --tokens 0", "a size below 1"),
        ("bench prefill tiny --prompt 300", "the model reads 256"),
        ("bench prefill tiny --batch 0", "0 rows of"),
        ("bench capacity tiny --kv-memory none", "memory 'none'"),
    ],
)
def test_what_can_not_be_done_is_one_line(kvfold, line, says):
    assert says in kvfold(line).error
