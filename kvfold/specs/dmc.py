"""DMC, dynamic memory compression: a trained gate per KV head merges a token into the newest entry or opens one."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from kvfold.specs.base import TimeSpec, parse_count


@dataclass(frozen=True, kw_only=True, slots=True)
class DMCSpec(TimeSpec):
    """Merge tokens by a learned decision; a merged entry is the weighted mean of its newest `window` tokens.

    Source: arXiv 2403.09636, section 3.
    Differs: the window's entries are kept and summed anew in fp32; the official kernel subtracts from an fp16 sum.
    """

    name: ClassVar[str] = "dmc"
    title: ClassVar[str] = "DMC"
    source: ClassVar[str] = "Nawrot et al. 2024, arXiv 2403.09636"
    state_of: ClassVar[Literal["prefix", "steps"]] = "prefix"
    trained: ClassVar[bool] = True
    lossy: ClassVar[bool] = True

    window: int | None = 12
    """Newest tokens of a segment that its entry averages; None = all of them, by one running sum."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"dmc window {self.window}: an entry averages at least 1 token: write e.g. 'dmc:12' or 'dmc:inf'"
            )

    @classmethod
    def parse(cls, args: str) -> Self:
        """ "", `W` or `inf`."""
        if not args:
            return cls()
        return cls(window=None if args == "inf" else parse_count(cls.name, args, "dmc:12' or 'dmc:inf"))

    def format(self) -> str:
        """`dmc:W`."""
        return f"{self.name}:{'inf' if self.window is None else self.window}"

    def max_kept(self, seen: int) -> int:
        """An upper bound, reached by a gate that never merges."""
        return seen

    def lane_state_bytes(self, head_dim: int) -> int:
        """Weighted k and v of the window's tokens and the weights, in fp32; one running sum if it is unbounded."""
        return 4 * (self.window or 1) * (2 * head_dim + 1)
