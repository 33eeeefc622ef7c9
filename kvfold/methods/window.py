"""Methods that know from positions alone what stays: full attention, the default, and the sliding window with attention sinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from kvfold.errors import UserError
from kvfold.methods.base import Budget, Method, parse_pair

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Window(Method):
    """Keep the `sinks` first tokens and the `recent` newest, the newest of all included.

    Source: arXiv 2309.17453, section 3.2 (StreamingLLM).
    Differs: keys keep the rotation of their original position, they are not numbered anew within the cache.
    """

    name: ClassVar[str] = "window"
    title: ClassVar[str] = "window + sinks"
    source: ClassVar[str] = "Xiao et al. 2023, arXiv 2309.17453"
    chunk_invariant: ClassVar[bool] = True
    lossy: ClassVar[bool] = True

    recent: Budget
    """Newest tokens kept; a share grows by at most one token a token, so it never asks for one already evicted."""
    sinks: int = 0
    """First tokens of the text, kept for good. A fixed number: a share would grow into tokens already evicted."""

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise UserError(f"window sinks {self.sinks}: they are 0 tokens or more: write e.g. 'window:64+4'")

    @classmethod
    def parse(cls, args: str) -> Self:
        """`W+S`, W in tokens or percent, S in tokens."""
        recent, sinks = parse_pair(cls.name, args, "window:64+4")
        if not (sinks.isascii() and sinks.isdigit()):
            raise UserError(
                f"'window:{args}': first tokens are a whole number, not '{sinks}': write e.g. 'window:25%+4'"
            )
        return cls(recent=Budget.parse(recent), sinks=int(sinks))

    def format(self) -> str:
        """`window:W+S`."""
        return f"{self.name}:{self.recent.format()}+{self.sinks}"

    def max_kept(self, seen: int) -> int:
        """Exact."""
        return min(seen, self.recent.tokens(seen) + self.sinks)

    def last_query(self, position_BKE: Tensor) -> Tensor | None:
        """A fixed window ends so many tokens later; of a share only `sees` can tell."""
        from kvfold.ops.attention import FOREVER

        if self.recent.fixed is None:
            return None
        return (position_BKE.long() + self.recent.fixed - 1).masked_fill(position_BKE < self.sinks, FOREVER)

    def sees(self, query_BT: Tensor, position_BKE: Tensor) -> Tensor:
        """The `recent` newest tokens, the query's own included, and the `sinks` first."""
        edge_BT = query_BT + 1 - self.recent.of(query_BT + 1)
        position = position_BKE.unsqueeze(2)
        return (position >= edge_BT[:, None, :, None]) | (position < self.sinks)


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
        if args:
            raise UserError(f"'full:{args}': full takes no settings: write 'full'")
        return cls()

    def format(self) -> str:
        """`full`."""
        return self.name
