"""What a policy is: tensors in, tensors out. It never sees a module, a hook or a cache.

A policy belongs to one spec of `kvfold.specs` (which says what the method *is*) and says what the method *does*.
Letters: B rows (of all owners that are asked at once), K kv heads, E entries: those stored, then those of this call.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvfold.specs.base import TimeSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Entries:
    """What the heads of some rows hold and were just given, side by side, in no particular order."""

    position_BKE: Tensor
    """int32, the real tokens before this one; -1 where there is no entry."""
    score_BKE: Tensor | None
    """fp32: what `Policy.weights` asked for; None where it asks for nothing."""
    seen_B: Tensor
    """int64, real tokens seen, this call's included."""


class Policy:
    """Keeps everything: the base of all methods, and what `full` does."""

    weights: ClassVar[Literal[None, "sum", "last"]] = None
    """The attention that entries receive, summed over the query heads of all layers that read them: `sum` over all
    queries since the entry came, `last` of the newest query alone, or None: the method asks for no weights. With
    weights, what to drop is decided after the call has attended; without, before, and per query."""

    gate: ClassVar[Literal[None, "flag", "merge"]] = None
    """What the model's gates decide: `flag` tokens that leave later (`DMSPolicy`), `merge` tokens (`DMCPolicy`)."""

    def __init__(self, spec: TimeSpec):
        self.spec = spec

    def keep(self, entries: Entries) -> Tensor | None:
        """bool [B, K, E]: the entries that stay; None = all. May be True where there is no entry."""
        return None

    def sees(self, query_BT: Tensor, position_BKE: Tensor) -> Tensor | None:
        """bool [B, K, T, E]: the entries, none later than itself, that a query at a position sees; None = all.

        For methods without weights, whose decisions depend on the tokens alone.
        """
        return None
