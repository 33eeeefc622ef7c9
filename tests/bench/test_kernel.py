"""`bench kernel`: rows whose bytes and shares add up. Its speed is nobody's promise here."""

import pytest
import torch

from kvfold.bench import kernel
from kvfold.bench.measuring import Reader
from kvfold.ops import native


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(kernel, "_COLD_BYTES", 1 << 20)
    monkeypatch.setattr(kernel, "Reader", lambda: Reader(buffer_bytes=1 << 20, read_bytes=1 << 16))


def test_a_row_for_each_storage_length_and_spread():
    shape = kernel.KernelShape(batch=2, kv_heads=2, head_dim=40)
    rows = list(kernel.measure_kernel(shape, storages=("fp32", "int4"), tokens=(50,), repeats=2))
    assert [(row["storage"], row["spread"]) for row in rows] == [("fp32", 1), ("fp32", 100), ("int4", 1), ("int4", 100)]
    assert rows[0]["bytes"] == 4 * 50 * 2 * 40 * 4
    for row in rows:
        assert row["share"] == pytest.approx(row["gb_per_s"] / row["read_gb_per_s"])
        assert row["ms"] == pytest.approx(row["bytes"] / row["gb_per_s"] / 1e6)
        assert row["isa"] in (*native.instruction_sets(), "plain torch")


def test_lengths_spread_as_far_as_asked():
    lengths = kernel.stream_lengths(24, 1024, 100)
    assert lengths.max() == pytest.approx(100 * int(lengths.min()), rel=0.02)
    assert lengths.sum() == pytest.approx(24 * 1024, rel=0.01)
    assert torch.equal(kernel.stream_lengths(6, 64, 1), torch.full((6,), 64, dtype=torch.int32))


def test_huge_pages_change_no_number():
    x = torch.arange(3_000_000)
    assert native.huge_pages(x) is x and torch.equal(x, torch.arange(3_000_000))
    native.huge_pages(torch.empty(0))
