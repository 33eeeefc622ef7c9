"""What speed benchmarks share: sides that take turns, spreads, the peak of memory, and the roofline.

All sides of a comparison take turns, round after round, so that whatever else the machine does hits all; ratios are taken
within a round. The time of a step is no less than max(weight bytes / bandwidth, FLOP / peak) + KV bytes read / bandwidth, where
bandwidth and peak are measured in the same process and with the same threads as what they are compared with.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kvfold.errors import UserError
from kvfold.eval.progress import Report
from kvfold.ops import native

if TYPE_CHECKING:  # the kernels' benchmarks need no model
    from kvfold.models.decoder import FoldForCausalLM


def check_size(model: "FoldForCausalLM", what: str, tokens: int, repeats: int = 1) -> None:
    """Refuse more tokens than the model reads, and no repeats; `what` has so many tokens."""
    if repeats < 1:
        raise UserError(f"{repeats} repeats: 1 or more are measured: ask for more")
    most = model.config.max_position_embeddings
    if tokens > most:
        raise UserError(f"{what} of {tokens:,} tokens: the model reads {most:,} at most: ask for fewer")


def measured_on(model: "FoldForCausalLM", name: str, **environment: Any) -> dict[str, Any]:
    """A result's `model` and `environment`."""
    return {
        "model": {"name": name, "parameters": model.num_parameters()},
        "environment": {
            "device": model.device.type, "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(), **environment,
        },
    }  # fmt: skip


def in_turns(
    sides: Sequence[Callable[[int], Any]], repeats: int, what: str, report: Report, *, warm_up: bool = False,
    turning: bool = False,
) -> list[list[Any]]:  # fmt: skip
    """Of each side what it gave in every round; it is given the round's number, from 1 on. `warm_up`: there is a round 0, which
    doesn't count. `turning`: the order turns, so that no side is always the one behind another.
    """
    runs: list[list[Any]] = [[] for _ in sides]
    total = (repeats + warm_up) * len(sides)
    for number in range(total):
        turn, place = divmod(number, len(sides))
        side = (place + turn) % len(sides) if turning else place
        report(what, number, total)
        run = sides[side](turn + 1 - warm_up)
        if turn >= warm_up:
            runs[side].append(run)
    report(what, total, total)
    return runs


def seconds(work: Callable[[], Any], device: torch.device | None = None) -> float:
    """Of one call, all work of a GPU included."""

    def now() -> float:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    work()
    return now() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(ours: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """The spread of ratios, round by round."""
    return spread([one / other for one, other in zip(ours, others, strict=True)])


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_HIGH_WATER = "5"
"""What Linux wants written to set the high-water mark back to what is held now."""


class PeakMemory:
    """Measures from its making on. On a GPU what torch allocated; on a CPU the process's resident memory."""

    def __init__(self, device: torch.device):
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        # Memory that was freed but kept by the C library would hide what comes next.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        try:
            _CLEAR.write_text(_RESET_HIGH_WATER, encoding="ascii")
            self._before = _resident_bytes("VmRSS")
        except OSError:
            self._before = None

    def bytes(self) -> int | None:
        """Peak since the making, less what was held then; None where the system doesn't tell."""
        if self._before is None:
            return None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device) - self._before
        peak = _resident_bytes("VmHWM")
        return None if peak is None else max(0, peak - self._before)


def _resident_bytes(name: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


BUFFER_BYTES = 1 << 28
"""More than a cache keeps between two visits of a stretch."""
READ_BYTES = 1 << 24
"""Read at a time."""


class Reader:
    """Reads stretches of a large buffer, one after the other."""

    def __init__(self, buffer_bytes: int = BUFFER_BYTES, read_bytes: int = READ_BYTES):
        self._buffer = native.huge_pages(torch.empty(buffer_bytes // 4)).fill_(1)
        self._size, self._turn = read_bytes // 4, 0

    def rate(self) -> float:
        """Bytes per second of the next stretch, with torch's threads."""
        self._turn = (self._turn + 1) % (self._buffer.numel() // self._size)
        part = self._buffer[self._turn * self._size : (self._turn + 1) * self._size]
        library = native.library()
        start = time.perf_counter()
        if library is None:
            part.sum()
        else:
            library.read(part.data_ptr(), self._size, torch.get_num_threads(), library.parallel)
        return 4 * self._size / (time.perf_counter() - start)


_SIDE = 1024
_READS, _PRODUCTS = 24, 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What torch's threads reach on this machine."""

    read_bytes_per_second: float
    """Reading a large buffer: the best stretch of several."""
    flops: float
    """Multiplying square matrices in the model's dtype: the best of several."""

    def about(self) -> dict[str, float]:
        """For a result's environment."""
        return {"read_gb_per_s": self.read_bytes_per_second / 1e9, "gflop_per_s": self.flops / 1e9}


def measure_machine(dtype: torch.dtype = torch.float32) -> Machine:
    """Takes under a second on a CPU."""
    reader = Reader()
    a, b = (torch.randn(_SIDE, _SIDE).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    quickest = min(seconds(lambda: torch.mm(a, b, out=out)) for _ in range(_PRODUCTS))
    return Machine(read_bytes_per_second=max(reader.rate() for _ in range(_READS)), flops=2 * _SIDE**3 / quickest)


def linear_flop(model: "FoldForCausalLM", *, tokens: int, logits: int) -> float:
    """Of the linear layers for so many tokens, `logits` of which reach the output embedding."""
    head = model.get_output_embeddings()
    body = sum(layer.weight.numel() for layer in _linears(model) if layer is not head)
    return 2.0 * (tokens * body + logits * head.weight.numel())


def attention_flop(model: "FoldForCausalLM", *, pairs: float) -> float:
    """Of all layers, for so many (query, key) pairs of one query head: the logits and the sums of values."""
    layout = model.config.layout
    heads = sum(model.config.num_attention_heads * layer.head_dim for layer in layout.layers)
    return 4.0 * pairs * heads


def step_allowed(
    machine: Machine, model: "FoldForCausalLM", *, rows: int, kv_bytes: float, kept_mean: float
) -> dict[str, float]:
    """The roofline of a decoding step: `kv_bytes` are read (sharing layers each read their owner's), `kept_mean` entries are
    attended to by each query head. Of the weights every step reads all linear layers, the output embedding among them.
    """
    flop = linear_flop(model, tokens=rows, logits=rows) + attention_flop(model, pairs=rows * kept_mean)
    weights = sum(layer.weight.nbytes for layer in _linears(model))
    rate = machine.read_bytes_per_second
    allowed = max(weights / rate, flop / machine.flops) + kv_bytes / rate
    return {"roofline_ms": 1e3 * allowed, "weight_bytes": weights, "kv_bytes_read": kv_bytes, "flop": flop}


def _linears(model: "FoldForCausalLM") -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]
