"""How many tokens a head may keep: a fixed number, or a share of what has been seen.

A share grows with the text, but what was evicted stays evicted. Shares are counted in integers, so that every
machine and every package rounds alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from kvfold.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """A number of tokens, or a whole percentage of the tokens seen. Exactly one of the two fields is set."""

    fixed: int | None = None
    """Tokens, at least 1."""
    percent: int | None = None
    """Whole percent of the tokens seen so far, 1 to 100."""

    def __post_init__(self) -> None:
        if (self.fixed is None) == (self.percent is None):
            raise UserError(f"{self!r}: a budget is either tokens or a share: set one of fixed and percent")
        if self.fixed is not None and self.fixed < 1:
            raise UserError(f"budget {self.fixed}: a budget keeps at least 1 token: write 1 or more")
        if self.percent is not None and not 1 <= self.percent <= 100:
            raise UserError(f"budget {self.percent}%: a share is 1% to 100% of the tokens seen: write e.g. 25%")

    @classmethod
    def parse(cls, text: str) -> Self:
        """`64` or `25%`."""
        digits = text.strip().removesuffix("%").rstrip()
        if not (digits.isascii() and digits.isdigit()):
            raise UserError(f"budget '{text}': a budget is whole tokens or a whole percentage: write e.g. 64 or 25%")
        return cls(percent=int(digits)) if text.strip().endswith("%") else cls(fixed=int(digits))

    def format(self) -> str:
        """`64` or `25%`."""
        return f"{self.fixed}" if self.percent is None else f"{self.percent}%"

    def of(self, seen: Tensor) -> Tensor | int:
        """`tokens` of many sequences at once, int64."""
        return self.fixed if self.percent is None else ((self.percent * seen + 99) // 100).clamp(min=1)

    def tokens(self, seen: int) -> int:
        """Tokens that may stay after `seen` tokens: the fixed number, or max(1, ceil(percent * seen / 100))."""
        return self.fixed if self.percent is None else max(1, -(-self.percent * seen // 100))


def parse_pair(name: str, args: str, example: str) -> tuple[str, str]:
    """The two sides of `A+B` in the settings of method `name`; `example` is a text form that would have been right."""
    left, plus, right = args.partition("+")
    if not plus or not left.strip() or not right.strip():
        raise UserError(f"'{name}:{args}': {name} takes two budgets joined by '+': write e.g. '{example}'")
    return left.strip(), right.strip()
