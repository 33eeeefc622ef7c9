"""keepeven: the newest tokens stay, and of the older ones those at even positions. Nothing is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from kvfold.errors import UserError
from kvfold.methods.base import Method, parse_count

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepEven(Method):
    """Older tokens are thinned a block at a time, so that several entries of a head leave at once.

    Source: none, an example.
    Differs: none.
    """

    name, title, source = "keepeven", "every other token", "an example of kvfold"
    chunk_invariant, lossy = True, True

    block: int
    """Tokens thinned at once; as many newest ones at least stay whole."""

    def __post_init__(self) -> None:
        if self.block < 1:
            raise UserError(f"keepeven block {self.block}: a block is 1 token or more: write e.g. 'keepeven:32'")

    @classmethod
    def parse(cls, args: str) -> Self:
        """`N`, in tokens."""
        return cls(block=parse_count(cls.name, args, "keepeven:32"))

    def format(self) -> str:
        """`keepeven:N`."""
        return f"{self.name}:{self.block}"

    def max_kept(self, seen: int) -> int:
        """The most that was held at any time so far: just before the last block was thinned, unless it is more now."""
        before = seen // self.block * self.block - 1
        return max(n - max(0, n // self.block - 1) * self.block // 2 for n in (seen, before) if n >= 0)

    def sees(self, query_BT: Tensor, position_BKE: Tensor) -> Tensor:
        """Decided by positions alone, so every query of a long call can be told what it sees."""
        position, seen = position_BKE.unsqueeze(2), query_BT[:, None, :, None] + 1
        thinned = (seen // self.block - 1).clamp(min=0) * self.block
        return (position >= thinned) | (position % 2 == 0)
