"""The forms that a call takes, as a method sees them: a decoding step, a chunk of a prompt, a training text.

`Streams`, `Chunk` and `TrainingTokens` are what a method is given; `StepPlan`, `ChunkPlan` and `TrainingForm` are its
answers. The base classes here serve every method that decides by positions or by attention scores; a learned method
overrides what its gates change, in its own module.
Letters: O owners that step together, B sequences, T tokens of the call, S stored, E = S + T entries, K kv heads, D head dim,
X KV streams of a cache group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from kvfold.methods.base import Method
    from kvfold.ops.gating import Gates


@dataclass(frozen=True, kw_only=True, slots=True)
class Entries:
    """What the heads of some sequences hold and were just given, side by side, in no particular order."""

    position_BKE: Tensor
    """int32, the real tokens before this one; -1 where there is no entry."""
    score_BKE: Tensor | None
    """fp32: what `Method.attention_scores` asked for; None where it asks for nothing."""
    seen_B: Tensor
    """int64, real tokens seen, this call's included."""


# -- a decoding step: one token a sequence ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Streams:
    """The KV streams of one decoding step, before the new tokens are stored."""

    position_B: Tensor
    """int64: position of each sequence's new token."""
    length_OBK: Tensor
    """int64: entries stored."""
    id_OBK: Tensor
    """int64: each stream's line in `state_X`."""
    state_X: Tensor | None
    """What the method keeps for each stream, [X, ...]; written in place."""
    stored_positions: Callable[[], Tensor]
    """int32 [O, B, K, S], -1 where there is no entry."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entered:
    """What takes the new token's place in the attention of one owner's layer."""

    k_BKD: Tensor
    """Before rotary positions."""
    v_BKD: Tensor
    place_BK: Tensor
    """int64: the entry that it overwrites; the stream's length = it is appended."""


class StepPlan:
    """One decoding step under a method. Whatever is not overridden evicts what the new token does not see."""

    def __init__(self, method: Method, streams: Streams):
        self.method, self.streams = method, streams

    def overwritten(self) -> Tensor | None:
        """int64 [O, B, K]: the entry whose slot the new token takes, the stream's length where it takes none; None = ask
        `evicted` instead. Between two borders of a grid tokens are appended.
        """
        return None if self.method.grid is None else self.streams.length_OBK

    def evicted(self) -> Tensor | None:
        """bool [O, B, K, S]: stored entries that leave before the new token is attended to; None = none."""
        if not self.method.lossy:
            return None
        position_OBKS = self.streams.stored_positions()
        query_B = self.streams.position_B.repeat(position_OBKS.shape[0])
        seen = self.method.sees(query_B[:, None], position_OBKS.flatten(0, 1))
        return None if seen is None else (position_OBKS >= 0) & ~seen[:, :, 0].unflatten(0, position_OBKS.shape[:2])

    def placed(self, place_OBK: Tensor) -> None:
        """The new tokens were stored at these places of their streams."""

    def enter(self, owner: int, gates: Gates | None, k_BKD: Tensor, v_BKD: Tensor) -> Entered | None:
        """Owner number `owner` of the step brings its token; None = it is attended to as it came."""
        return None

    def close(self) -> None:
        """All owners have brought theirs, in their order."""


# -- a chunk of a prompt: several tokens a sequence ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A call of several tokens, of one owner: what is stored, and what the call brings."""

    k_BTKD: Tensor
    """Before rotary positions."""
    v_BTKD: Tensor
    gates: Gates | None
    real_BT: Tensor
    """False at padding."""
    padded: bool
    """Whether there is any padding."""
    position_BT: Tensor
    """Real tokens before each token, -1 at padding."""
    before_B: Tensor
    """Real tokens seen before the call."""
    seen_B: Tensor
    """Real tokens seen once it is done."""
    position_BKE: Tensor
    """int32, of the stored entries (-1 where there is none), then of the call's tokens."""
    stored: int
    """Stored entries among E."""
    length_BK: Tensor
    """int64: entries stored."""
    id_BK: Tensor
    """int64: each stream's line in `state_X`."""
    state_X: Tensor | None
    """As in `Streams`."""

    @property
    def first_BT(self) -> Tensor:
        """The first real token of each sequence in this call."""
        return self.real_BT & (self.position_BT == self.before_B[:, None])


class ChunkPlan:
    """A call of several tokens under a method. What `k_BTKD` and `v_BTKD` hold is attended to and stored."""

    def __init__(self, method: Method, chunk: Chunk):
        self.method, self.chunk = method, chunk
        self.k_BTKD, self.v_BTKD = chunk.k_BTKD, chunk.v_BTKD

    def sees(self) -> Tensor | None:
        """bool [B, K or 1, T, E]: what each query sees of the entries that are not later than itself; None = all."""
        chunk = self.chunk
        # With nothing stored all heads see alike.
        position = chunk.position_BKE if chunk.stored else chunk.position_BKE[:, :1]
        return self.method.sees(chunk.position_BT, position)

    def last_query(self) -> Tensor | None:
        """int64 [B, K or 1, E]: the position of the last query that sees each entry; None = only `sees` can tell."""
        return self.method.last_query(self.chunk.position_BKE)

    def retained(self, score_BKE: Tensor | None) -> Tensor | None:
        """bool [B, K, E]: what stays once all readers have attended; None = all."""
        chunk = self.chunk
        return self.method.retain(Entries(position_BKE=chunk.position_BKE, score_BKE=score_BKE, seen_B=chunk.seen_B))

    def close(self, stored_positions: Callable[[], Tensor]) -> None:
        """What stays is stored; `stored_positions` gives int32 [B, K, S], -1 where there is no entry."""


# -- borders of a grid, in all forms of a call ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """The entries of some streams of one owner, those of a call behind those stored, in the order of their positions."""

    k_BEKD: Tensor
    """Rotated, as they are stored."""
    v_BEKD: Tensor
    position_BKE: Tensor
    """-1 where there is no entry."""
    arrays: dict[str, Tensor]
    """The method's slot arrays, [B, K, E] each."""
    before_B: Tensor
    """Real tokens seen before the call."""
    seen_B: Tensor
    """Real tokens seen once it is done."""
    as_stored: Callable[[Tensor], Tensor] | None = None
    """Rounds values [..., D] as the store does; None = not at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lives:
    """Entries that come and go while a call is read: E of them, and those that took their places."""

    k_BEKD: Tensor
    v_BEKD: Tensor
    first_BKE: Tensor
    """int64: the position of the first query that sees the entry; -1 where there is none."""
    last_BKE: Tensor
    """int64: that of the last one."""
    bias_BKE: Tensor
    """Added to the logits after scale and softcap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Crossed:
    """What became of E entries at the borders of a call. Differentiable."""

    lives: Lives
    stays_BKE: Tensor
    """bool."""
    changed_BKE: Tensor
    """bool: the entry stays with another value and other slot arrays than before."""
    v_BEKD: Tensor
    """Values after the last border."""
    arrays: dict[str, Tensor]
    """The method's slot arrays, [B, K, E] each, after the last border."""


# -- training -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingTokens:
    """A whole text of one owner."""

    k_BTKD: Tensor
    """Before rotary positions."""
    v_BTKD: Tensor
    gates: Gates
    """Soft decisions, or hard ones."""
    real_BT: Tensor | None
    """False at padding; None = no padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingForm:
    """What a whole text attends to: differentiable, and equal to decoding where decisions are hard."""

    k_BTKD: Tensor
    """Before rotary positions."""
    v_BTKD: Tensor
    bias_BTK: Tensor | None = None
    """Added to a key's logits for queries further than `free` tokens behind it; None = none."""
    free: int = 0
    """Distance up to which a key is seen as it is."""
