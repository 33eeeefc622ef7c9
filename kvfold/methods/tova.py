"""TOVA, token omission via attention: after each step the tokens that the newest query attended to least go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from kvfold.errors import UserError
from kvfold.methods.base import Method
from kvfold.methods.budget import Budget

if TYPE_CHECKING:
    from torch import Tensor

    from kvfold.methods.plans import Entries


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
    attention_scores: ClassVar[str] = "last"

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
        from kvfold.methods.select import budget_tokens, evict_lowest

        position = entries.position_BKE[:, :1]
        score = entries.score_BKE.sum(dim=1, keepdim=True)
        room = budget_tokens(self.tokens, entries.seen_B)
        return (~evict_lowest(score, position, position >= 0, room)).expand_as(entries.position_BKE)
