"""DMS, dynamic memory sparsification: a trained gate marks tokens, which leave a fixed number of tokens later.

Each stream has a ring of its newest `delay` + 1 tokens: the slot of each, ~slot once it is marked. A token at position p
writes at column p modulo the ring's length, so nothing in it moves. A mark takes effect `delay` tokens later, so the slot of
a new token is known before any layer has run, and one step places the tokens of all owners at once.
Letters: O owners, B sequences, T tokens of the call, S stored, E = S + T entries, K kv heads, W length of the ring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from kvfold.errors import UserError
from kvfold.methods.base import GateForm, Method, StateForm, parse_count
from kvfold.methods.plans import Chunk, ChunkPlan, Entered, StepPlan, Streams, TrainingForm, TrainingTokens

if TYPE_CHECKING:
    from torch import Tensor

    from kvfold.ops.gating import Gates


@dataclass(frozen=True, kw_only=True, slots=True)
class DMS(Method):
    """Evict marked tokens once they are more than `delay` tokens old; the next token takes the slot.

    Source: arXiv 2506.05345, section 3.
    Differs: whether a token's own gate or the next token's decides is the adapter's to say, and stands in its config.
    """

    name: ClassVar[str] = "dms"
    title: ClassVar[str] = "DMS"
    source: ClassVar[str] = "Lancucki et al. 2025, arXiv 2506.05345"
    chunk_invariant: ClassVar[bool] = True
    lossy: ClassVar[bool] = True
    gate_form: ClassVar[GateForm] = GateForm(
        adapter=True, channel_of="query", frees="first query", reads=("own", "next")
    )

    delay: int = 256
    """A marked token k is seen by queries t with t - k <= delay."""

    def __post_init__(self) -> None:
        if self.delay < 1:
            raise UserError(f"{self.name} delay {self.delay}: a delay is 1 token or more: write e.g. '{self.name}:256'")

    @classmethod
    def parse(cls, args: str) -> Self:
        """ "" or `W`."""
        return cls(delay=parse_count(cls.name, args, f"{cls.name}:256")) if args else cls()

    def format(self) -> str:
        """`dms:W`."""
        return f"{self.name}:{self.delay}"

    def always_kept(self, seen: int) -> int:
        """The window of the newest `delay` + 1 tokens."""
        return min(seen, self.delay + 1)

    def stream_state(self, head_dim: int) -> StateForm:
        """The ring: one int32 for each token of the window."""
        return StateForm(shape=(self.delay + 1,), dtype="int32")

    @property
    def eviction_delay(self) -> int:
        """`delay`."""
        return self.delay

    def marked(self, state_X: Tensor) -> tuple[Tensor, Tensor]:
        """See `Method.marked`."""
        stream, column = (state_X < 0).nonzero(as_tuple=True)
        return stream, ~state_X[stream, column].long()

    def outlives(self, query: Tensor, position: Tensor, marked: Tensor) -> Tensor:
        """bool: whether an entry is still there for a query at a position; all three broadcast."""
        return ~marked | (query - position <= self.delay)

    def open_step(self, streams: Streams) -> StepPlan:
        """See `Method.open_step`."""
        return MarkedStep(self, streams)

    def open_chunk(self, chunk: Chunk) -> ChunkPlan:
        """See `Method.open_chunk`."""
        return MarkedChunk(self, chunk)

    def training_form(self, tokens: TrainingTokens) -> TrainingForm:
        """A key's bias is log(1 - alpha) of the decision that governs it, beyond the delay."""
        from kvfold.ops.gating import from_next

        gates, bias = tokens.gates, tokens.gates.log_stay_BTK
        if gates.from_next:
            bias = from_next(bias, tokens.real_BT, 0.0)
        return TrainingForm(k_BTKD=tokens.k_BTKD, v_BTKD=tokens.v_BTKD, bias_BTK=bias, free=self.delay)


class MarkedStep(StepPlan):
    """The new token goes into the slot of the one that leaves the window marked, or behind the others."""

    method: DMS
    _alphas: dict[int, Tensor]

    def __init__(self, method: DMS, streams: Streams):
        self.method, self.streams, self._width = method, streams, streams.state_X.shape[-1]
        self._column_B1 = (streams.position_B % self._width)[:, None]
        self._alphas, self._from_next = {}, False

    def overwritten(self) -> Tensor:
        """See `StepPlan.overwritten`."""
        oldest = self.streams.state_X[self.streams.id_OBK, self._column_B1]
        leaves = (oldest < 0) & (self.streams.position_B >= self._width)[:, None]
        return (~oldest.long()).where(leaves, self.streams.length_OBK)

    def placed(self, place_OBK: Tensor) -> None:
        """The new token is in its slot, and not marked yet."""
        self.streams.state_X[self.streams.id_OBK, self._column_B1] = place_OBK.int()

    def enter(self, owner: int, gates: Gates | None, k_BKD: Tensor, v_BKD: Tensor) -> Entered | None:
        """What the gate of one owner decided at this token is recorded with that of the others."""
        if gates is not None and gates.alpha_BTK is not None:
            self._alphas[owner], self._from_next = gates.alpha_BTK.transpose(0, 1), gates.from_next
        return None

    def close(self) -> None:
        """Marks into the ring: no layer of this step looks at them."""
        import torch

        if not self._alphas:
            return
        ring, ids = self.streams.state_X, self.streams.id_OBK
        governed_B = self.streams.position_B - int(self._from_next)
        ids = ids if len(self._alphas) == len(ids) else ids[list(self._alphas)]
        place_OBK = ids * self._width + (governed_B % self._width)[:, None]
        slot_OBK = ring.take(place_OBK)
        fires_OBK = (torch.cat(list(self._alphas.values())) > 0.5) & (governed_B >= 0)[:, None] & (slot_OBK >= 0)
        ring.put_(place_OBK, torch.where(fires_OBK, ~slot_OBK, slot_OBK))


class MarkedChunk(ChunkPlan):
    """A marked entry is seen from within the delay only; those that have left it by the end are not stored."""

    method: DMS

    def __init__(self, method: DMS, chunk: Chunk):
        import torch

        from kvfold.ops.gating import from_next

        super().__init__(method, chunk)
        gates = chunk.gates
        fires = torch.zeros(chunk.k_BTKD.shape[:3], dtype=torch.bool, device=chunk.k_BTKD.device)
        if gates is not None and gates.alpha_BTK is not None:
            fires = gates.alpha_BTK > 0.5
        own, later = fires, gates is not None and gates.from_next
        if later:
            own = from_next(fires.float(), chunk.real_BT, 0.0) > 0.5
        self.marked_BKE = own.transpose(1, 2)
        if chunk.stored:
            old = self._stored_marks()
            if later:
                # The newest stored token is governed by the first real one of this call.
                newest = chunk.position_BKE[..., : chunk.stored] == (chunk.before_B - 1)[:, None, None]
                old |= newest & (fires & chunk.first_BT[..., None]).any(dim=1)[..., None]
            self.marked_BKE = torch.cat((old, self.marked_BKE), dim=-1)

    def _stored_marks(self) -> Tensor:
        """bool [B, K, S], read from the ring."""
        import torch

        chunk = self.chunk
        ring = chunk.state_X[chunk.id_BK]
        inside = torch.arange(ring.shape[-1], device=ring.device) < chunk.before_B[:, None, None]
        marked = (ring < 0) & inside
        counts = ring.new_zeros((*chunk.id_BK.shape, chunk.stored))
        slot = torch.where(marked, ~ring, 0).long()
        return counts.scatter_add_(2, slot, marked.int()) > 0

    def last_query(self) -> Tensor:
        """See `ChunkPlan.last_query`."""
        from kvfold.ops.attention import FOREVER

        return (self.chunk.position_BKE.long() + self.method.delay).masked_fill(~self.marked_BKE, FOREVER)

    def sees(self) -> Tensor:
        """See `ChunkPlan.sees`."""
        query, position = self.chunk.position_BT[:, None, :, None], self.chunk.position_BKE.unsqueeze(2)
        return self.method.outlives(query, position, self.marked_BKE.unsqueeze(2))

    def retained(self, score_BKE: Tensor | None) -> Tensor:
        """A marked token is there until the first token beyond its delay has come."""
        last = (self.chunk.seen_B - 1)[:, None, None]
        return self.method.outlives(last, self.chunk.position_BKE, self.marked_BKE)

    def close(self, stored_positions: Callable[[], Tensor]) -> None:
        """Slots and marks of the newest tokens are written into the ring anew."""
        import torch

        chunk, ring = self.chunk, self.chunk.state_X
        width = ring.shape[-1]
        edge = (chunk.seen_B - width)[:, None, None]
        position = stored_positions().long()
        slot = torch.arange(position.shape[-1], device=position.device).expand_as(position)
        marked = _by_column(chunk.position_BKE.long(), self.marked_BKE.long(), edge, width) > 0
        slots = _by_column(position, slot, edge, width).int()
        ring[chunk.id_BK] = torch.where(marked, ~slots, slots)


def _by_column(position: Tensor, value: Tensor, edge: Tensor, width: int) -> Tensor:
    """Values of the entries from position `edge` on, each at its position's column of the ring; 0 elsewhere."""
    recent = (position >= edge) & (position >= 0)
    columns = (position % width).masked_fill(~recent, width)
    found = value.new_zeros((*position.shape[:2], width + 1))
    return found.scatter_(2, columns, value)[..., :width]
