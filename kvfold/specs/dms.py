"""DMS, dynamic memory sparsification: a trained gate flags tokens, which leave a fixed number of tokens later."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from kvfold.specs.base import TimeSpec, parse_count


@dataclass(frozen=True, kw_only=True, slots=True)
class DMSSpec(TimeSpec):
    """Drop flagged tokens once they are more than `delay` tokens old.

    Source: arXiv 2506.05345, section 3.
    Differs: whether a token's own gate or the next token's decides is the adapter's to say, and stands in its config.
    """

    name: ClassVar[str] = "dms"
    title: ClassVar[str] = "DMS"
    source: ClassVar[str] = "Lancucki et al. 2025, arXiv 2506.05345"
    state_of: ClassVar[Literal["prefix", "steps"]] = "prefix"
    trained: ClassVar[bool] = True
    lossy: ClassVar[bool] = True

    delay: int = 256
    """A flagged token k is seen by queries t with t - k <= delay."""

    def __post_init__(self) -> None:
        if self.delay < 1:
            raise ValueError(f"dms delay {self.delay}: a delay is 1 token or more: write e.g. 'dms:256'")

    @classmethod
    def parse(cls, args: str) -> Self:
        """ "" or `W`."""
        return cls(delay=parse_count(cls.name, args, "dms:256")) if args else cls()

    def format(self) -> str:
        """`dms:W`."""
        return f"{self.name}:{self.delay}"

    def max_kept(self, seen: int) -> int:
        """An upper bound, reached by a gate that never flags."""
        return seen

    def expected_kept(self, seen: int, compression: float) -> int:
        """See `TimeSpec.expected_kept`; the newest `delay` + 1 tokens are there in any case."""
        return max(min(seen, self.delay + 1), TimeSpec.expected_kept(self, seen, compression))

    def lane_state_bytes(self, head_dim: int) -> int:
        """A ring of the window's delay + 1 tokens, one int32 each: the slot, its sign the flag."""
        return 4 * (self.delay + 1)
