"""TOVA, token omission via attention: after each step the tokens that the newest query attended to least go."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from kvfold.specs.base import TimeSpec
from kvfold.specs.budget import Budget


@dataclass(frozen=True, kw_only=True, slots=True)
class TOVASpec(TimeSpec):
    """Keep the tokens with the largest attention from the newest query, averaged over all heads of the layer.

    Source: arXiv 2401.06104, section 3.2.
    Differs: the mean runs over the heads of all layers that read the owner; ties go to the older token.
    """

    name: ClassVar[str] = "tova"
    title: ClassVar[str] = "TOVA"
    source: ClassVar[str] = "Oren et al. 2024, arXiv 2401.06104"
    state_of: ClassVar[Literal["prefix", "steps"]] = "steps"
    trained: ClassVar[bool] = False
    lossy: ClassVar[bool] = True

    tokens: Budget
    """Tokens kept in all; no place is reserved for the newest."""

    @classmethod
    def parse(cls, args: str) -> Self:
        """`N`, in tokens or percent."""
        if not args.strip():
            raise ValueError("'tova': tova takes one budget: write e.g. 'tova:128'")
        return cls(tokens=Budget.parse(args))

    def format(self) -> str:
        """`tova:N`."""
        return f"{self.name}:{self.tokens.format()}"

    def max_kept(self, seen: int) -> int:
        """Exact."""
        return min(seen, self.tokens.tokens(seen))
