"""The device of a GPU run, its clock, and rows that say whether they were measured.

A row has labels, which are known beforehand, and figures, or a `state` of `not measured` or `failed` with the reason. So a
table has the same rows on a machine without a GPU, and no figure that was not measured.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]


@dataclass(kw_only=True, slots=True)
class Gpu:
    """The device, and how much time is left on it."""

    device: torch.device
    """A CUDA device; tests use the CPU and Triton's interpreter."""
    attend: Callable[..., Tensor]
    """`decode_triton`."""
    deadline: float
    """When, by `time.monotonic`, no further row is begun."""
    bandwidth: float | None = None
    """Bytes per second of a long read or copy; `bandwidth_rows` measures it."""
    repeats: int = 20
    """Timed runs behind each median."""
    state: dict[str, Any] = field(default_factory=dict)
    """What row functions leave for those after them."""

    def milliseconds(self, work: Callable[[], None]) -> Row:
        """Median, least and most time of `work` on the device."""
        work()
        self._wait()
        times = []
        for _ in range(self.repeats):
            if self.device.type == "cuda":
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                before.record()
                work()
                after.record()
                self._wait()
                times.append(before.elapsed_time(after))
            else:
                start = time.perf_counter()
                work()
                times.append(1e3 * (time.perf_counter() - start))
        return {"median": statistics.median(times), "min": min(times), "max": max(times)}

    def host_microseconds(self, work: Callable[[], None], calls: int) -> float:
        """Time that the host takes to put `work`, which makes so many calls, on the stream: each call's share."""
        self._wait()
        start = time.perf_counter()
        work()
        elapsed = time.perf_counter() - start
        self._wait()
        return 1e6 * elapsed / calls

    def captured(self, work: Callable[[], None]) -> Callable[[], None]:
        """`work` as a CUDA graph: its replay. On a CPU `work` itself."""
        if self.device.type != "cuda":
            return work
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()  # compiles, which can't be captured
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


RowFunction = Callable[[Gpu | None], Iterator[Row]]


def measured(gpu: Gpu | None, labels: Row, figures: Callable[[], Row]) -> Row:
    """A row with its figures, or with the reason why it has none."""
    if gpu is None:
        return labels | {"state": "not measured", "why": "no GPU"}
    if time.monotonic() > gpu.deadline:
        return labels | {"state": "not measured", "why": "out of time"}
    try:
        return labels | {"state": "measured", **figures()}
    except Exception as problem:  # whatever it is, the other rows are still worth their time
        return labels | {"state": "failed", "why": f"{type(problem).__name__}: {_first_line(problem)}"}


def _first_line(problem: Exception) -> str:
    return str(problem).partition("\n")[0]
