"""What every method along the time axis declares about itself, as data: text form, costs, what its state depends on.

What a method does to tensors lives in `kvfold.policies`. No torch here: the planner needs no more than these numbers.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Literal, Self


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeSpec(ABC):
    """One method of keeping, dropping or merging tokens, with its settings. Hashable, equal where the settings are."""

    name: ClassVar[str]
    """The word that opens the text form, as in `window:64+4`."""
    title: ClassVar[str]
    """What people call the method."""
    source: ClassVar[str]
    """Where it was published."""
    state_of: ClassVar[Literal["prefix", "steps"]]
    """`prefix`: what is kept depends on the tokens alone; `steps`: also on where the calls were cut."""
    trained: ClassVar[bool]
    """Whether the model must have been trained for it."""
    lossy: ClassVar[bool]
    """Whether anything is ever dropped or merged (a cache that lost tokens can't be cut back)."""

    @classmethod
    @abstractmethod
    def parse(cls, args: str) -> Self:
        """The spec from what stands after `name:` in its text form, "" where nothing does. Raises `ValueError`."""

    @abstractmethod
    def format(self) -> str:
        """The canonical text form, name included; parsing it gives an equal spec."""

    @abstractmethod
    def max_kept(self, seen: int) -> int:
        """Entries that one head holds after a step, `seen` real tokens having been seen."""

    def expected_kept(self, seen: int, compression: float) -> int:
        """Entries that one head holds where gates were trained to `compression`, tokens seen over tokens kept; of a method that
        needs no training `max_kept`.
        """
        return max(1, ceil(seen / compression)) if self.trained and seen else self.max_kept(seen)

    @property
    def slot_state_bytes(self) -> int:
        """Bytes that the method keeps with each stored entry, beyond k, v and the position."""
        return 0

    def lane_state_bytes(self, head_dim: int) -> int:
        """Bytes that the method keeps for each (row, kv head), beyond the length."""
        return 0


def refuse_args(name: str, args: str) -> None:
    """Raise `ValueError` where a method that takes no settings was given some."""
    if args:
        raise ValueError(f"'{name}:{args}': {name} takes no settings: write '{name}'")


def parse_count(name: str, args: str, example: str) -> int:
    """A whole number of tokens from a method's settings; `example` is a text form that would have been right."""
    if not (args.isascii() and args.isdigit()):
        raise ValueError(f"'{name}:{args}': {name} takes a whole number of tokens: write e.g. '{example}'")
    return int(args)
