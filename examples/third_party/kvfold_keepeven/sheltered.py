"""sheltered: a learned method of a third party. Gates mark tokens as in DMS, and the first tokens of a text can't be marked.

What DMS brings is used: the gate's form (so that adapters are trained, saved and loaded as DMS's are), the ring, the delayed
eviction. What differs is one rule, and it holds in all three forms: training, chunks, decoding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from kvfold.methods.base import GateForm, parse_count
from kvfold.methods.dms import DMS, MarkedChunk, MarkedStep
from kvfold.methods.plans import Chunk, ChunkPlan, Entered, StepPlan, Streams, TrainingForm, TrainingTokens

if TYPE_CHECKING:
    from torch import Tensor

    from kvfold.ops.gating import Gates


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheltered(DMS):
    """Evict marked tokens after `delay` tokens, but never one of the `sinks` first.

    Source: none, an example; after arXiv 2506.05345, section 3.
    Differs: the first tokens stay whatever their gate says.
    """

    name, title, source = "sheltered", "sheltered DMS", "an example of kvfold"
    gate_form: ClassVar[GateForm] = GateForm(adapter=True, reads=("own",), scale=100.0)

    sinks: int = 4
    """First tokens that stay."""

    @classmethod
    def parse(cls, args: str) -> Self:
        """`W+S`."""
        delay, _, sinks = args.partition("+")
        return cls(
            delay=parse_count(cls.name, delay, "sheltered:64+4"), sinks=parse_count(cls.name, sinks, "sheltered:64+4")
        )

    def format(self) -> str:
        """`sheltered:W+S`."""
        return f"{self.name}:{self.delay}+{self.sinks}"

    def governing(self, tokens: int, from_next: bool) -> slice:
        """Decisions over tokens that have left the window by the text's end, the first ones not counted."""
        return slice(self.sinks, max(self.sinks, tokens - 1 - self.delay))

    def always_kept(self, seen: int) -> int:
        """The window and the first tokens."""
        return min(seen, self.delay + 1 + self.sinks)

    def masked(self, gates: Gates | None, position_BT: Tensor) -> Gates | None:
        """The gates with no decision at the first tokens."""
        if gates is None or gates.alpha_BTK is None:
            return gates
        first = (position_BT < self.sinks)[..., None]
        return replace(
            gates,
            alpha_BTK=gates.alpha_BTK.masked_fill(first, 0.0),
            log_stay_BTK=gates.log_stay_BTK.masked_fill(first, 0.0),
        )

    def open_step(self, streams: Streams) -> StepPlan:
        """See `Method.open_step`."""
        return _Step(self, streams)

    def open_chunk(self, chunk: Chunk) -> ChunkPlan:
        """See `Method.open_chunk`."""
        return MarkedChunk(self, replace(chunk, gates=self.masked(chunk.gates, chunk.position_BT)))

    def training_form(self, tokens: TrainingTokens) -> TrainingForm:
        """See `Method.training_form`."""
        import torch

        real = tokens.real_BT
        if real is None:
            position = torch.arange(tokens.k_BTKD.shape[1], device=tokens.k_BTKD.device)[None]
        else:
            position = real.long().cumsum(dim=1) - 1
        return DMS.training_form(self, replace(tokens, gates=self.masked(tokens.gates, position)))


class _Step(MarkedStep):
    def enter(self, owner: int, gates: Gates | None, k_BKD: Tensor, v_BKD: Tensor) -> Entered | None:
        gates = self.method.masked(gates, self.streams.position_B[:, None])
        return super().enter(owner, gates, k_BKD, v_BKD)
