"""Block tables: which pages each KV stream holds, in order. Each sequence has tables of its own length, so that one long
sequence costs the others nothing.

All tables of a cache group lie in one flat array; a sequence owns a block of it, `width` entries for each of its streams.
Letters: Z streams of one sequence (owners x kv heads), B sequences of a call, R places for sequences.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

WIDTH_STEP = 8
"""Widths grow by whole steps, so that a block is not moved for every page."""


class BlockTables:
    """The tables of a group's sequences. A width is what the host knows; what is filled the lengths say."""

    @torch.inference_mode(False)
    def __init__(self, streams: int, sequences: int, device: torch.device, *, is_bounded: bool):
        """`streams`: of one sequence. `sequences`: places for them. `is_bounded`: no room is kept for later growth."""
        self._streams, self._device, self._is_bounded = streams, device, is_bounded
        # The last entry takes what a masked write must not touch.
        self.flat = torch.zeros(1, dtype=torch.int32, device=device)
        self._base, self.width = [0] * sequences, [0] * sequences
        """Entries of each stream, by sequence."""
        self._end = 0
        self.place_R2 = torch.zeros((sequences, 2), dtype=torch.int64, device=device)
        """Base and width of each sequence's block: its table number z starts at base + z * width."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tables and of where they lie."""
        return self.flat.nbytes + self.place_R2.nbytes

    def bytes_with(self, sequences: int, widths: Mapping[int, int]) -> int:
        """`num_bytes` once there are places for so many sequences, and some of them have tables at least so wide."""
        live = sum(max(width, widths.get(one, 0)) for one, width in enumerate(self.width))
        new = sum(width for one, width in widths.items() if one >= len(self.width))
        places = max(sequences, len(self.width))
        return 4 * (self._streams * (live + new) + 1) + 16 * places

    @torch.inference_mode(False)
    def resize(self, sequences: int) -> None:
        """Places for so many sequences."""
        missing = sequences - len(self.width)
        if missing > 0:
            self._base += [0] * missing
            self.width += [0] * missing
            self.place_R2 = torch.cat((self.place_R2, self.place_R2.new_zeros((missing, 2))))

    def widen(self, widths: Mapping[int, int]) -> None:
        """Tables at least so wide for these sequences."""
        grown = {one: width for one, width in widths.items() if width > self.width[one]}
        if not grown:
            return
        if not self._is_bounded:
            grown = {one: -(-width // WIDTH_STEP) * WIDTH_STEP for one, width in grown.items()}
        size = self._streams * sum(grown.values())
        if self._end + size > self.flat.shape[0] - 1:
            self._compact(grown)
            return
        for one, width in grown.items():
            self._end = self._move(self.flat, one, self._end, width)
        self._tell()

    def clear(self, sequences: list[int], *, compact: bool) -> None:
        """These sequences hold nothing any more; `compact`: what is left may be moved."""
        for one in sequences:
            self._base[one] = self.width[one] = 0
        if compact and 2 * self._streams * sum(self.width) < self.flat.shape[0] - 1:
            self._compact({})
        else:
            self._tell()

    def copy(self, source: int, target: int) -> None:
        """The target's table is the source's; widths are equal already."""
        size = self._streams * self.width[source]
        start, end = self._base[source], self._base[target]
        self.flat[end : end + size] = self.flat[start : start + size]

    @torch.inference_mode(False)
    def _compact(self, grown: Mapping[int, int]) -> None:
        """Lay all blocks side by side in a new array, some of them wider."""
        widths = [grown.get(one, width) for one, width in enumerate(self.width)]
        live = self._streams * sum(widths)
        capacity = live if self._is_bounded else live + live // 2
        flat, end = self.flat.new_zeros(capacity + 1), 0
        for one, width in enumerate(widths):
            if width:
                end = self._move(flat, one, end, width)
        self.flat, self._end = flat, end
        self._tell()

    def _move(self, flat: Tensor, one: int, to: int, width: int) -> int:
        """Copy a sequence's block to `to`, each stream's table widened; gives the end of the block."""
        streams, old, base = self._streams, self.width[one], self._base[one]
        block = flat[to : to + streams * width].view(streams, width)
        block[:, :old] = self.flat[base : base + streams * old].view(streams, old)
        block[:, old:] = 0
        self._base[one], self.width[one] = to, width
        return to + streams * width

    def _tell(self) -> None:
        places = torch.tensor([self._base, self.width], dtype=torch.int64).t()
        self.place_R2.copy_(places.to(self._device))
