"""What keepeven is, as data: text form, and how much it keeps."""

from dataclasses import dataclass
from typing import Self

from kvfold.specs.base import TimeSpec, parse_count


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepEvenSpec(TimeSpec):
    """The newest tokens stay; older ones are thinned a block at a time, to those at even positions.

    Source: none, an example.
    Differs: none.
    """

    name, title, source = "keepeven", "every other token", "an example of kvfold"
    state_of, trained, lossy = "prefix", False, True

    block: int
    """Tokens thinned at once; as many newest ones at least stay whole."""

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"keepeven block {self.block}: a block is 1 token or more: write e.g. 'keepeven:32'")

    @classmethod
    def parse(cls, args: str) -> Self:
        """`N`, in tokens."""
        return cls(block=parse_count(cls.name, args, "keepeven:32"))

    def format(self) -> str:
        """`keepeven:N`."""
        return f"{self.name}:{self.block}"

    def thinned(self, seen: int) -> int:
        """Tokens of the text, from its beginning, of which only every other one is left."""
        return max(0, seen // self.block - 1) * self.block

    def max_kept(self, seen: int) -> int:
        """The most that was held at any time so far: just before the last block was thinned, unless it is more now."""
        before = seen // self.block * self.block - 1
        return max(n - self.thinned(n) // 2 for n in (seen, before) if n >= 0)
