"""Methods that evict by attention: H2O, where the newest tokens stay, and of the older ones those that were attended to most, and
TOVA, where after each step the tokens go that the newest query attended to least.

Letters: B rows, K kv heads, E entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from kvfold.errors import UserError
from kvfold.methods.base import Budget, Method, parse_pair

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
    attention_scores: ClassVar[Literal["cumulative", "last"] | None] = "cumulative"
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
        seen, position = entries.seen_B, entries.position_BKE
        edge = seen - self.recent.of(seen)
        candidates = (position >= 0) & (position < edge[:, None, None])
        return ~evict_lowest(entries.score_BKE, position, candidates, self.heavy.of(seen))


@dataclass(frozen=True, kw_only=True, slots=True)
class TOVA(Method):
    """Keep the tokens with the largest attention from the newest query, averaged over all heads of the layer.

    Source: arXiv 2401.06104, section 3.2.
    Differs: the mean runs over the heads of all layers that read the owner; ties go to the older token.
    """

    name: ClassVar[str] = "tova"
    title: ClassVar[str] = "TOVA"
    source: ClassVar[str] = "Oren et al. 2024, arXiv 2401.06104"
    chunk_invariant: ClassVar[bool] = False
    lossy: ClassVar[bool] = True
    attention_scores: ClassVar[Literal["cumulative", "last"] | None] = "last"

    tokens: Budget
    """Tokens kept in all; no place is reserved for the newest."""

    @classmethod
    def parse(cls, args: str) -> Self:
        """`N`, in tokens or percent."""
        if not args.strip():
            raise UserError("'tova': tova takes one budget: write e.g. 'tova:128'")
        return cls(tokens=Budget.parse(args))

    def format(self) -> str:
        """`tova:N`."""
        return f"{self.name}:{self.tokens.format()}"

    def max_kept(self, seen: int) -> int:
        """Exact."""
        return min(seen, self.tokens.tokens(seen))

    def retain(self, entries: Entries) -> Tensor:
        """See `Method.retain`. The heads of a layer always hold the same tokens, in the same order."""
        position = entries.position_BKE[:, :1]
        score = entries.score_BKE.sum(dim=1, keepdim=True)
        return (~evict_lowest(score, position, position >= 0, self.tokens.of(entries.seen_B))).expand_as(
            entries.position_BKE
        )


def evict_lowest(score_BKE: Tensor, position_BKE: Tensor, candidate_BKE: Tensor, room_B: Tensor | int) -> Tensor:
    """bool [B, K, E]: the candidates that must go so that `room_B` of them are left: those of the lowest score, and of
    equal scores the newer ones. K is 1 where all heads of a layer decide together.
    """
    import torch

    surplus_BK = (candidate_BKE.sum(dim=-1).T - room_B).T.clamp(min=0)
    most = int(surplus_BK.max()) if surplus_BK.numel() else 0
    if most == 0:
        return torch.zeros_like(candidate_BKE)
    score = score_BKE.masked_fill(~candidate_BKE, torch.inf)
    if most == 1:
        lowest = candidate_BKE & (score == score.amin(dim=-1, keepdim=True))
        newest = position_BKE.masked_fill(~lowest, -1)
        return lowest & (newest == newest.amax(dim=-1, keepdim=True)) & (surplus_BK > 0).unsqueeze(-1)
    by_age = position_BKE.masked_fill(~candidate_BKE, -1).argsort(dim=-1, descending=True, stable=True)
    by_score = score.gather(-1, by_age).argsort(dim=-1, stable=True)
    order = by_age.gather(-1, by_score)
    rank = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.zeros_like(candidate_BKE).scatter(-1, order, rank < surplus_BK.unsqueeze(-1)) & candidate_BKE
