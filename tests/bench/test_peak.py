import pytest
import torch

from kvfold.bench import measuring
from kvfold.bench.measuring import PeakMemory

CPU = torch.device("cpu")


def test_memory_that_came_and_went_is_seen():
    before = PeakMemory(CPU)
    quiet = before.bytes()
    if quiet is None:
        pytest.skip("this system doesn't tell a process's peak memory")
    peak_memory = PeakMemory(CPU)
    torch.ones(64 * 2**18).sum()
    seen = peak_memory.bytes()
    # 64 MiB were filled; other threads of the process may move the mark by a little.
    assert seen > 60 * 2**20
    assert quiet < 16 * 2**20


def test_a_system_that_does_not_tell_gives_none(monkeypatch, tmp_path):
    monkeypatch.setattr(measuring, "_CLEAR", tmp_path / "none" / "clear_refs")
    assert PeakMemory(CPU).bytes() is None
    monkeypatch.undo()
    monkeypatch.setattr(measuring, "_STATUS", tmp_path / "none")
    assert PeakMemory(CPU).bytes() is None
