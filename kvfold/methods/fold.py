"""fold: what DMS's gates mark leaves at the borders of a grid, and is merged where something like it stays.

Each entry keeps two numbers beside its mark: the log of the attention that it was expected to receive, and the bias that its
merged mass gives its logits. Between two borders tokens are appended and nothing moves. A border is crossed when the first
query behind it comes, so that what is stored depends on the tokens seen alone.
Letters: B sequences, T tokens of the call, E entries, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from kvfold.errors import UserError
from kvfold.methods.base import GateForm, Method, parse_count
from kvfold.methods.plans import Crossed, Held, Lives

if TYPE_CHECKING:
    from torch import Tensor

    from kvfold.ops.gating import Gates

IMPORTANCE, BIAS, MARKED = "importance", "mass_bias", "marked"
_EXAMPLE = "fold:256' or 'fold:256+32@0.65"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fold(Method):
    """Merge marked tokens that leave into the most similar entry that stays, weighted by learned importance; drop the rest.

    Source: arXiv 2506.05345, section 3, for the gates and the delayed eviction; what becomes of what leaves is ours.
    Differs: tokens leave at the borders of a grid instead of one at a time, and are merged where something like them stays.
    """

    name: ClassVar[str] = "fold"
    title: ClassVar[str] = "fold"
    source: ClassVar[str] = "kvfold; gates as in Lancucki et al. 2025, arXiv 2506.05345"
    chunk_invariant: ClassVar[bool] = True
    lossy: ClassVar[bool] = True
    slot_arrays: ClassVar[Mapping[str, str]] = MappingProxyType(
        {IMPORTANCE: "float16", BIAS: "float16", MARKED: "uint8"}
    )
    bias_array: ClassVar[str | None] = BIAS
    mark_array: ClassVar[str | None] = MARKED
    allows_window: ClassVar[bool] = False
    gate_form: ClassVar[GateForm] = GateForm(
        adapter=True, reads=("own", "next"), outputs=2, head_numbers=(0.0, 0.0, 1.0), gates_of="dms"
    )
    reach: ClassVar[int] = 512
    """A token merges into an entry at most so many positions older, so that a copy of a sequence copies few pages."""

    delay: int = 256
    """Tokens behind a query that it sees whatever is marked."""
    grid: int = 32  # type: ignore[misc]
    """Tokens between two borders."""
    threshold: float | None = 0.65
    """Least similarity at which a token is merged; None = all that leave are dropped."""

    def __post_init__(self) -> None:
        for what, number in (("delay", self.delay), ("grid", self.grid)):
            if number < 1:
                raise UserError(f"fold {what} {number}: it is 1 token or more: write e.g. '{_EXAMPLE}'")
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise UserError(f"fold threshold {self.threshold:g}: it is between -1 and 1: write e.g. '{_EXAMPLE}'")

    @classmethod
    def parse(cls, args: str) -> Self:
        """ "", `W`, `W+G` or `W+G@S`: delay, grid, and the similarity from which on a token is merged (`none` = never)."""
        if not args:
            return cls()
        counts, at, similarity = args.partition("@")
        delay, plus, spacing = counts.partition("+")
        given: dict[str, Any] = {"delay": parse_count(cls.name, delay, _EXAMPLE)}
        if plus:
            given["grid"] = parse_count(cls.name, spacing, _EXAMPLE)
        if at:
            given["threshold"] = None if similarity == "none" else _similarity(args, similarity)
        return cls(**given)

    def format(self) -> str:
        """`fold:W`, with `+G@S` where grid or similarity are not the usual ones."""
        text = f"{self.name}:{self.delay}"
        if (self.grid, self.threshold) == (type(self)().grid, type(self)().threshold):
            return text
        return f"{text}+{self.grid}@{'none' if self.threshold is None else repr(self.threshold)}"

    def always_kept(self, seen: int) -> int:
        """What is younger than the delay was at the last border."""
        return seen - max(0, (seen - 1) // self.grid * self.grid - self.delay)

    def expected_kept(self, seen: int, compression: float) -> int:
        """See `Method.expected_kept`; of all phases of the grid the one in which most is held."""
        return max(min(seen, self.delay + self.grid), ceil(seen / compression))

    @property
    def eviction_delay(self) -> int:
        """`delay`."""
        return self.delay

    def noted(self, gates: Gates | None, real_BT: Tensor | None) -> dict[str, Tensor]:
        """See `Method.noted`; of the newest token no later one has decided yet."""
        from kvfold.ops.gating import from_next

        if gates is None or gates.alpha_BTK is None:
            return {}
        alpha = from_next(gates.alpha_BTK, real_BT, 0.0) if gates.from_next else gates.alpha_BTK
        found = {MARKED: alpha > 0.5}
        if gates.outputs_BTKF is not None:
            found[IMPORTANCE] = gates.outputs_BTKF[..., 0]
        return found

    def noted_before(self, gates: Gates | None) -> dict[str, Tensor]:
        """See `Method.noted_before`."""
        if gates is None or gates.alpha_BTK is None or not gates.from_next:
            return {}
        return {MARKED: gates.alpha_BTK > 0.5}

    def cross(self, held: Held, gates: Gates | None) -> Crossed:
        """See `Method.cross`. Without gates what was marked before is dropped."""
        from kvfold.ops.folding import FoldEntries, fold_entries, half_rounded

        arrays = held.arrays
        entries = FoldEntries(
            k_BKED=held.k_BEKD.transpose(1, 2), v_BKED=held.v_BEKD.transpose(1, 2), position_BKE=held.position_BKE.long(),
            marked_BKE=arrays[MARKED] > 0, s_BKE=half_rounded(arrays[IMPORTANCE].float()), bias_BKE=arrays[BIAS].float(),
        )  # fmt: skip
        lives, after = fold_entries(
            entries, before_B=held.before_B, seen_B=held.seen_B, delay=self.delay, grid=self.grid,
            threshold=self.threshold, reach=self.reach, heads_KP=None if gates is None else gates.heads_KP,
            as_stored=held.as_stored,
        )  # fmt: skip
        return Crossed(lives=Lives(**lives), arrays={**arrays, BIAS: after.pop("bias_BKE")}, **after)


def _similarity(args: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"'fold:{args}': a similarity is a number or none: write e.g. '{_EXAMPLE}'") from None
