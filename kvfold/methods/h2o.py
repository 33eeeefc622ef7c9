"""H2O, heavy-hitter oracle: the newest tokens stay, and of the older ones those that were attended to most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Self

from kvfold.methods.base import Method
from kvfold.methods.budget import Budget, parse_pair

if TYPE_CHECKING:
    from torch import Tensor

    from kvfold.methods.plans import Entries


@dataclass(frozen=True, kw_only=True, slots=True)
class H2O(Method):
    """Keep the `recent` newest tokens and the `heavy` ones with the largest attention received so far, per KV head.

    Source: arXiv 2306.14048, section 4, algorithm 1.
    Differs: scores are summed over a KV head's query heads and over all its readers; ties go to the older token.
    """

    name: ClassVar[str] = "h2o"
    title: ClassVar[str] = "H2O"
    source: ClassVar[str] = "Zhang et al. 2023, arXiv 2306.14048"
    chunk_invariant: ClassVar[bool] = False
    lossy: ClassVar[bool] = True
    attention_scores: ClassVar[str] = "cumulative"
    slot_arrays: ClassVar[Mapping[str, str]] = MappingProxyType({"score": "float32"})

    recent: Budget
    """Newest tokens kept whatever their score."""
    heavy: Budget
    """Tokens kept for their score among the rest."""

    @classmethod
    def parse(cls, args: str) -> Self:
        """`R+Y`, each in tokens or percent."""
        recent, heavy = parse_pair(cls.name, args, "h2o:64+64")
        return cls(recent=Budget.parse(recent), heavy=Budget.parse(heavy))

    def format(self) -> str:
        """`h2o:R+Y`."""
        return f"{self.name}:{self.recent.format()}+{self.heavy.format()}"

    def max_kept(self, seen: int) -> int:
        """Exact, but for two shares that grow at the same token: fed one token a call it is one less, for one step."""
        return min(seen, self.recent.tokens(seen) + self.heavy.tokens(seen))

    def retain(self, entries: Entries) -> Tensor:
        """See `Method.retain`. The newest tokens can't have been evicted yet, so their age tells which they are."""
        from kvfold.methods.select import budget_tokens, evict_lowest

        seen, position = entries.seen_B, entries.position_BKE
        edge = seen - budget_tokens(self.recent, seen)
        candidates = (position >= 0) & (position < edge[:, None, None])
        return ~evict_lowest(entries.score_BKE, position, candidates, budget_tokens(self.heavy, seen))
