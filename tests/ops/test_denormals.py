"""Numbers that a CPU would take long over count as zero, in all threads."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
from kvfold.ops.native import flush_denormals

torch.set_num_threads({threads})
{before}
print(flush_denormals(), (torch.full((1 << 20,), 1e-30) * 1e-10).count_nonzero().item())
torch.set_num_threads({threads} + 1)
print((torch.full((1 << 20,), 1e-30) * 1e-10).count_nonzero().item())
"""
WORK = "torch.full((1 << 20,), 1e-30) * 1e-10"


def told(threads: int, before: str = "") -> list[str]:
    program = PROGRAM.format(threads=threads, before=before)
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()


@pytest.mark.skipif(os.cpu_count() < 2, reason="one core")
def test_threads_that_were_there_before_do_not_and_it_says_so():
    said, left, _ = told(2, WORK)
    assert said == "False" and 0 < int(left) < 1 << 20


def test_one_thread_flushes_at_any_time_and_threads_that_come_later_too():
    assert told(1, WORK) == ["True", "0", "0"]
