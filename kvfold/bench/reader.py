"""The memory's read bandwidth: a large buffer, read a stretch at a time by the library that decode attention uses."""

import time

import torch

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
