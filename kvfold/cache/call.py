"""One call on the store: its batch description, made once and read by all layers, and the view that layers attend through.

A call may bring one token to some sequences and many to others, and none to a third kind whose columns are all padding. It
is cut into segments: the sequences that decode (exactly one real token), attended over pages in place (decode.py), and
those with a chunk of text (chunk.py). Letters: B rows of the call, T its columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.cache.chunk import ChunkSegment
from kvfold.cache.decode import DecodeSegment
from kvfold.cache.store import Store
from kvfold.ops.gating import Gates
from kvfold.ops.rotation import Rotation


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What a call brings, and how attention is scaled."""

    sequences: list[int]
    """Handles of the store, one for each row."""
    added: list[int]
    """Real tokens of each row."""
    real_BT: Tensor | None
    """bool, False at padding; None = no padding."""
    columns: int
    scale: float
    softcap: float | None = None

    def part(self, rows: list[int]) -> "Batch":
        """Some of the rows."""
        if len(rows) == len(self.sequences):
            return self
        return Batch(
            sequences=[self.sequences[row] for row in rows], added=[self.added[row] for row in rows],
            real_BT=None if self.real_BT is None else self.real_BT[rows], columns=self.columns, scale=self.scale,
            softcap=self.softcap,
        )  # fmt: skip


class StoreView:
    """The layers of one call attend through it; see `KVView`."""

    def __init__(self, store: Store, batch: Batch):
        decoding = [row for row, added in enumerate(batch.added) if added == 1]
        chunks = [row for row, added in enumerate(batch.added) if added > 1]
        self._segments: list[tuple[Tensor | None, DecodeSegment | ChunkSegment]] = []
        for rows, kind in ((decoding, DecodeSegment), (chunks, ChunkSegment)):
            if rows:
                whole = len(rows) == len(batch.added)
                index = None if whole else torch.tensor(rows, device=store.device)
                self._segments.append((index, kind(store, batch.part(rows))))

    def attend(
        self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor | None, v_BTKD: Tensor | None, rotation: Rotation | None,
        gates: Gates | None = None,
    ) -> Tensor:  # fmt: skip
        """See `KVView`. Rows without a real token get zeros."""
        if len(self._segments) == 1 and self._segments[0][0] is None:
            return self._segments[0][1].attend(layer, q_BTHD, k_BTKD, v_BTKD, rotation, gates)
        out = torch.zeros_like(q_BTHD)
        for index, segment in self._segments:
            q, k, v = (None if x is None else x[index] for x in (q_BTHD, k_BTKD, v_BTKD))
            turned = None if rotation is None else rotation.rows(index)
            told = None if gates is None else gates.rows(index)
            out[index] = segment.attend(layer, q, k, v, turned, told)
        return out

    def close(self) -> None:
        """All layers have attended: what the call evicts leaves now."""
        for _, segment in self._segments:
            segment.close()

    def abandon(self) -> None:
        """The call has failed: pages that it allocated and did not use are free again."""
        for _, segment in self._segments:
            segment.abandon()
