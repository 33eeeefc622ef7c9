"""The rows of a plan's table."""

import pytest

from kvfold.layout.planner import plan, plan_rows


def test_each_axis_alone_and_all_together():
    axes = {"heads": 8, "layers": "cla2", "time": "h2o:64+64", "bits": "int8"}
    rows = plan_rows("llama-2-7b", context_tokens=4096, rows=2, memory_bytes=80 * 10**9, **axes)
    names = ["as it is", "heads 8", "layers cla2", "time h2o:64+64", "bits int8", "together"]
    assert [row.name for row in rows] == names
    together = plan("llama-2-7b", **axes)
    assert rows[-1].layout == together.layout
    assert rows[-1].context_bytes == together.bytes([4096, 4096])
    assert rows[-1].max_rows == together.max_rows(80 * 10**9, 4096)
    assert rows[-1].max_context_tokens == 4096
    assert rows[0].max_context_tokens == plan("llama-2-7b").max_context_tokens(80 * 10**9, 2)
    assert rows[0].compression == 1
    assert all(row.compression > 1 for row in rows[1:])
    assert rows[2].compression == pytest.approx(2, rel=1e-3)


def test_one_axis_is_not_shown_twice_and_no_axis_is_the_model_alone():
    assert [row.name for row in plan_rows("qwen3-0.6b", context_tokens=10, layers="cla2")] == [
        "as it is",
        "layers cla2",
    ]
    only = plan_rows("qwen3-0.6b", context_tokens=10)
    assert [row.name for row in only] == ["as it is"]
    assert only[0].max_rows is None and only[0].max_context_tokens is None
    assert only[0].bytes_per_token == plan("qwen3-0.6b").bytes_per_token


def test_amounts_are_checked():
    with pytest.raises(ValueError, match="0 rows of 5 tokens"):
        plan_rows("qwen3-0.6b", context_tokens=5, rows=0)
