"""The view that the layers of one call attend through.

A call may bring one token to some sequences and many to others, and none to a third kind whose columns are all padding. It
is cut into segments: the sequences that decode (exactly one real token), attended over pages in place (decode.py), and
those with a chunk of text (chunk.py). Letters: B rows of the call, T its columns.
"""

import torch
from torch import Tensor

from kvfold.cache.chunk import ChunkSegment
from kvfold.cache.decode import DecodeSegment, decoding
from kvfold.cache.store import Batch, Store
from kvfold.ops.gating import Gates
from kvfold.ops.rotation import Rotation


def view_of(store: Store, batch: Batch) -> "DecodeSegment | ChunkSegment | SegmentedView":
    """The view that a call's layers attend through."""
    if max(batch.added) == 1 == min(batch.added):
        return decoding(store, batch)
    return ChunkSegment(store, batch) if min(batch.added) > 1 else SegmentedView(store, batch)


class SegmentedView:
    """A call whose sequences are at different work; see `KVView`."""

    def __init__(self, store: Store, batch: Batch):
        steps = [row for row, added in enumerate(batch.added) if added == 1]
        chunks = [row for row, added in enumerate(batch.added) if added > 1]
        self._segments: list[tuple[Tensor, DecodeSegment | ChunkSegment]] = []
        for rows, kind in ((steps, decoding), (chunks, ChunkSegment)):
            if rows:
                index = torch.tensor(rows, device=store.device)
                self._segments.append((index, kind(store, batch.segment(store, rows))))

    def attend(
        self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor | None, v_BTKD: Tensor | None, rotation: Rotation | None,
        gates: Gates | None = None,
    ) -> Tensor:  # fmt: skip
        """See `KVView`. Rows without a real token get zeros."""
        out = torch.zeros_like(q_BTHD)
        for index, segment in self._segments:
            q, k, v = (None if x is None else x[index] for x in (q_BTHD, k_BTKD, v_BTKD))
            segment_rotation = None if rotation is None else rotation.rows(index)
            segment_gates = None if gates is None else gates.rows(index)
            out[index] = segment.attend(layer, q, k, v, segment_rotation, segment_gates)
        return out

    def close(self) -> None:
        """All layers have attended: what the call evicts leaves now."""
        for _, segment in self._segments:
            segment.close()

    def abandon(self) -> None:
        """The call has failed: pages that it allocated and did not use are free again."""
        for _, segment in self._segments:
            segment.abandon()
