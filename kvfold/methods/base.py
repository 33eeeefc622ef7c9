"""What a method along the time axis is: its text form and costs as data, and what it does to tensors.

A method is one frozen dataclass. It sees tensors and answers with tensors: never a module, a hook or a cache. The forms that a
call takes (a decoding step, a chunk of a prompt, training) stand in plans.py; this file has the class itself, and what
settings are made of. Nothing here imports torch when it is loaded: planning needs numbers only.
Letters: B sequences, T queries, K kv heads, E entries: those stored, then those of this call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from kvfold.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from kvfold.methods.gates import GateConfig
    from kvfold.methods.plans import (
        Chunk,
        ChunkPlan,
        Crossed,
        Entries,
        Held,
        StepPlan,
        Streams,
        TrainingForm,
        TrainingTokens,
    )
    from kvfold.ops.gating import Gates

DTYPE_BYTES = {"float32": 4, "float16": 2, "int32": 4, "uint8": 1}
"""Bytes of the dtypes that a method may keep state in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StateForm:
    """What a method keeps for each KV stream (one sequence, one KV head) beside its entries."""

    shape: tuple[int, ...]
    """Of one stream."""
    dtype: str
    """A key of `DTYPE_BYTES`."""

    @property
    def num_bytes(self) -> int:
        """Bytes of one stream."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class GateForm:
    """What the gates of a learned method look like: where decisions may come from, and what a recipe assumes."""

    adapter: bool
    """Whether a small module beside a frozen layer may decide."""
    channel_of: Literal["key", "query"] | None = None
    """Whose freed channel may decide: each KV head's key, or the first query head of each group. None = no such form."""
    frees: Literal["keys and queries", "first query"] | None = None
    """Heads in which a freed channel carries nothing but decisions and is zeroed for attention."""
    reads: tuple[Literal["own", "next"], ...] = ("own",)
    """Which token's decision may govern a token: `own`, or that of the `next` one."""
    with_weights: bool = False
    """Whether the query's channel also gives each token a weight (its importance in a merge)."""
    outputs: int = 1
    """Numbers that an adapter gives for each KV head; the first is the decision, the others reach the method as they are."""
    head_numbers: tuple[float, ...] = ()
    """Numbers that an adapter holds for each KV head, whatever the token, as a new one has them."""
    gates_of: str | None = None
    """The method whose trained gates are taken over, frozen; None = the method's own are trained."""
    zero_out: bool = False
    """Whether training first fades the freed channel out of the weights (arXiv 2403.09636, section 3.3)."""
    source: Literal["adapter", "channel"] = "adapter"
    """What a recipe trains unless told otherwise."""
    scale: float = 100.0
    """Factor of the gate's output in a recipe."""
    distils: Literal["reverse", "forward", "none"] = "reverse"
    """A recipe's loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method(ABC):
    """One method of keeping, evicting or merging tokens, with its settings. Hashable, equal where the settings are."""

    name: ClassVar[str]
    """The word that opens the text form, as in `window:64+4`."""
    title: ClassVar[str]
    """What people call the method."""
    source: ClassVar[str]
    """Where it was published."""
    chunk_invariant: ClassVar[bool]
    """Whether what is kept depends on the tokens alone; else also on where the calls were cut."""
    lossy: ClassVar[bool]
    """Whether anything is ever evicted or merged."""
    attention_scores: ClassVar[Literal["cumulative", "last"] | None] = None
    """The attention that `retain` wants to see, summed over the query heads of all layers that read an entry: from all
    queries since the entry came, from the newest query alone, or none. With scores, eviction is decided after a call has
    attended; without, before, and for each query."""
    slot_arrays: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """What is kept with each stored entry beyond key, value and position: name -> dtype. `score` holds cumulative attention."""
    bias_array: ClassVar[str | None] = None
    """The slot array that is added to the logit of its entry, after scale and softcap."""
    mark_array: ClassVar[str | None] = None
    """The slot array that is not 0 where an entry is marked and still there."""
    allows_window: ClassVar[bool] = True
    """Whether owners whose architecture has a sliding window may be under it."""
    places_at_layer: ClassVar[bool] = False
    """Whether the place of a new token is known only when its owner's layer is reached (a merge): it gets keys before rotary
    positions."""
    merges_tokens: ClassVar[bool] = False
    """Whether a token may go into the newest entry in place of one of its own."""
    grid: ClassVar[int | None] = None
    """Tokens between two borders, at positions that it divides, where alone entries leave (`cross`); None = no borders. A field
    of methods that have it."""
    gate_form: ClassVar[GateForm | None] = None
    """The gates of a learned method; None = nothing is learned."""

    @classmethod
    @abstractmethod
    def parse(cls, args: str) -> Self:
        """The method from what stands after `name:` in its text form, "" where nothing does. Raises `UserError`."""

    @abstractmethod
    def format(self) -> str:
        """The canonical text form, name included; parsing it gives an equal method."""

    def max_kept(self, seen: int) -> int:
        """Entries that one head holds after a step, `seen` real tokens having been seen; of a learned method the most. By default
        all: nothing is evicted, or gates never fire.
        """
        return seen

    # -- costs ---------------------------------------------------------------------------------------------------

    @property
    def trained(self) -> bool:
        """Whether a model must have been trained for it."""
        return self.gate_form is not None

    def gates_among(self, given: GateConfig | None) -> GateConfig | None:
        """Of the gates that a model or a cache has, those that decide for this method; None where it learns nothing.

        Raises `UserError` for a learned method that they do not decide for.
        """
        if not self.trained:
            return None
        if given is None or given.method != self.name:
            has = "no gates" if given is None else f"gates of {given.method}"
            raise UserError(
                f"time '{self.format()}': the model has {has}, and {self.name} is learned: give it an adapter that was trained "
                "for it, or gates='channel' for the published freed channel as it stands"
            )
        return given

    def always_kept(self, seen: int) -> int:
        """Entries that no gate can evict or merge once `seen` tokens have been seen."""
        return min(seen, 1)

    def expected_kept(self, seen: int, compression: float) -> int:
        """Entries that one head holds where gates were trained to `compression`, tokens seen over tokens kept; of a method
        that needs no training `max_kept`.
        """
        if not (self.trained and seen):
            return self.max_kept(seen)
        return max(self.always_kept(seen), ceil(seen / compression))

    def stream_state(self, head_dim: int) -> StateForm | None:
        """What the method keeps for each KV stream, beyond its length."""
        return None

    def stream_state_bytes(self, head_dim: int) -> int:
        """Bytes of `stream_state`."""
        form = self.stream_state(head_dim)
        return 0 if form is None else form.num_bytes

    # -- what a decision changes: for training, calibration and pictures ------------------------------------------

    @property
    def eviction_delay(self) -> int | None:
        """Tokens after which a marked entry leaves; None where nothing is marked."""
        return None

    @property
    def merge_window(self) -> int | None:
        """Newest tokens that a merged entry averages; None = all of them."""
        return None

    def governing(self, tokens: int, from_next: bool) -> slice:
        """Which decisions of a text of so many tokens change what is held at its end: each fires one entry away. By default
        those over tokens that can have left by then; where tokens merge, all but the first.
        """
        if self.merges_tokens:
            return slice(1, None)
        return slice(int(from_next), int(from_next) + tokens - self.always_kept(tokens))

    def marked(self, state_X: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Entries that are marked and still stored, from the state of all streams: stream and entry, flat; None = no marks."""
        return None

    # -- what it does to tensors ----------------------------------------------------------------------------------

    def sees(self, query_BT: Tensor, position_BKE: Tensor) -> Tensor | None:
        """bool [B, K, T, E]: the entries, none later than itself, that a query at a position sees; None = all.

        For methods whose decisions depend on positions alone.
        """
        return None

    def last_query(self, position_BKE: Tensor) -> Tensor | None:
        """int64 [B, K, E]: the position of the last query that sees each entry (`ops.attention.FOREVER` for one that stays);
        None = only `sees` can tell. A long prompt is read faster where it is given.
        """
        return None

    def retain(self, entries: Entries) -> Tensor | None:
        """bool [B, K, E]: the entries that stay once a call is done; None = all. May be True where there is no entry.

        By default those that the newest query sees.
        """
        seen = self.sees((entries.seen_B - 1)[:, None], entries.position_BKE)
        return None if seen is None else seen.squeeze(2)

    def noted(self, gates: Gates | None, real_BT: Tensor | None) -> dict[str, Tensor]:
        """Under a `grid`: what slot arrays hold of a call's tokens, [B, T, K] each; 0 in those that are not named."""
        return {}

    def noted_before(self, gates: Gates | None) -> dict[str, Tensor]:
        """Under a `grid`: what a token says of the one before it, which takes the place of what slot arrays hold of that,
        [B, T, K] each.
        """
        return {}

    def cross(self, held: Held, gates: Gates | None) -> Crossed:
        """Under a `grid`: what becomes of entries at the borders that a call brings. `gates`: those of the call's layer."""
        raise AssertionError(f"{self.name} has no borders")

    def open_step(self, streams: Streams) -> StepPlan:
        """One decoding step of the streams of all owners that are under this method."""
        from kvfold.methods.plans import StepPlan

        return StepPlan(self, streams)

    def open_chunk(self, chunk: Chunk) -> ChunkPlan:
        """A call of several tokens, of one owner."""
        from kvfold.methods.plans import ChunkPlan

        return ChunkPlan(self, chunk)

    def training_form(self, tokens: TrainingTokens) -> TrainingForm:
        """What a whole text attends to where decisions are soft or gradients are wanted."""
        from kvfold.methods.plans import TrainingForm

        return TrainingForm(k_BTKD=tokens.k_BTKD, v_BTKD=tokens.v_BTKD)


def parse_count(name: str, args: str, example: str) -> int:
    """A whole number of tokens from a method's settings; `example` is a text form that would have been right."""
    if not (args.isascii() and args.isdigit()):
        raise UserError(f"'{name}:{args}': {name} takes a whole number of tokens: write e.g. '{example}'")
    return int(args)


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
