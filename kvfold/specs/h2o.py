"""H2O, heavy-hitter oracle: the newest tokens stay, and of the older ones those that were attended to most."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from kvfold.specs.base import TimeSpec
from kvfold.specs.budget import Budget, parse_pair


@dataclass(frozen=True, kw_only=True, slots=True)
class H2OSpec(TimeSpec):
    """Keep the `recent` newest tokens and the `heavy` ones with the largest attention received so far, per KV head.

    Source: arXiv 2306.14048, section 4, algorithm 1.
    Differs: scores are summed over a KV head's query heads and over all its readers; ties go to the older token.
    """

    name: ClassVar[str] = "h2o"
    title: ClassVar[str] = "H2O"
    source: ClassVar[str] = "Zhang et al. 2023, arXiv 2306.14048"
    state_of: ClassVar[Literal["prefix", "steps"]] = "steps"
    trained: ClassVar[bool] = False
    lossy: ClassVar[bool] = True

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

    @property
    def slot_state_bytes(self) -> int:
        """One fp32 score."""
        return 4
