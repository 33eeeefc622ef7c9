"""What a machine and a model allow: bytes and floating-point operations of a step or a prompt, and the time they need at least.

The time of a step is no less than max(weight bytes / bandwidth, FLOP / peak) + KV bytes read / bandwidth. Bandwidth and peak
are measured here, in the same process and with the same threads as what they are compared with.
Letters: H query heads, D head dim.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvfold.models.decoder import FoldForCausalLM
from kvfold.ops import native

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

    def step_seconds(self, *, weight_bytes: int, kv_bytes: float, flop: float) -> float:
        """A decoding step can't be faster."""
        return max(weight_bytes / self.read_bytes_per_second, flop / self.flops) + kv_bytes / self.read_bytes_per_second

    def about(self) -> dict[str, float]:
        """For a result's environment."""
        return {"read_gb_per_s": self.read_bytes_per_second / 1e9, "gflop_per_s": self.flops / 1e9}


def measure_machine(dtype: torch.dtype = torch.float32) -> Machine:
    """Takes under a second on a CPU."""
    reader = Reader()
    a, b = (torch.randn(_SIDE, _SIDE).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = min(_seconds(lambda: torch.mm(a, b, out=out)) for _ in range(_PRODUCTS))
    return Machine(read_bytes_per_second=max(reader.rate() for _ in range(_READS)), flops=2 * _SIDE**3 / seconds)


def weight_bytes(model: FoldForCausalLM) -> int:
    """Bytes that every decoding step reads of the weights: all linear layers, the output embedding among them."""
    return sum(layer.weight.nbytes for layer in _linears(model))


def linear_flop(model: FoldForCausalLM, *, tokens: int, logits: int) -> float:
    """Of the linear layers for so many tokens, `logits` of which reach the output embedding."""
    head = model.get_output_embeddings()
    body = sum(layer.weight.numel() for layer in _linears(model) if layer is not head)
    return 2.0 * (tokens * body + logits * head.weight.numel())


def attention_flop(model: FoldForCausalLM, *, pairs: float) -> float:
    """Of all layers, for so many (query, key) pairs of one query head: the logits and the sums of values."""
    layout = model.config.layout
    heads = sum(model.config.num_attention_heads * layer.head_dim for layer in layout.layers)
    return 4.0 * pairs * heads


def step_allowed(
    machine: Machine, model: FoldForCausalLM, *, rows: int, kv_bytes: float, kept_mean: float
) -> dict[str, float]:
    """The roofline of a decoding step: `kv_bytes` are read (sharing layers each read their owner's), `kept_mean` entries are
    attended to by each query head.
    """
    flop = linear_flop(model, tokens=rows, logits=rows) + attention_flop(model, pairs=rows * kept_mean)
    weights = weight_bytes(model)
    seconds = machine.step_seconds(weight_bytes=weights, kv_bytes=kv_bytes, flop=flop)
    return {"roofline_ms": 1e3 * seconds, "weight_bytes": weights, "kv_bytes_read": kv_bytes, "flop": flop}


def _linears(model: FoldForCausalLM) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
