"""Full attention: every token stays. The default, and the yardstick of every other method."""

from dataclasses import dataclass
from typing import ClassVar, Self

from kvfold.methods.base import Method, refuse_args


@dataclass(frozen=True, kw_only=True, slots=True)
class Full(Method):
    """Nothing is evicted or merged.

    Source: arXiv 1706.03762, section 3.2.
    Differs: none.
    """

    name: ClassVar[str] = "full"
    title: ClassVar[str] = "full attention"
    source: ClassVar[str] = "Vaswani et al. 2017, arXiv 1706.03762"
    chunk_invariant: ClassVar[bool] = True
    lossy: ClassVar[bool] = False

    @classmethod
    def parse(cls, args: str) -> Self:
        """`full` alone."""
        refuse_args(cls.name, args)
        return cls()

    def format(self) -> str:
        """`full`."""
        return self.name

    def max_kept(self, seen: int) -> int:
        """All of them; exact."""
        return seen
