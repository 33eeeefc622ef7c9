"""What one forward call asks for beside its tokens. Nothing of it is set on modules, so calls of any kind may take turns on
one model, from threads too.
"""

from dataclasses import dataclass
from typing import Literal

from kvfold.errors import UserError
from kvfold.layout.kvlayout import KVLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class CallOptions:
    """Given as `model(ids, options=CallOptions(...))`, and through `generate` likewise."""

    gates: Literal["on", "off"] = "on"
    """`off`: nothing is merged or evicted by a learned method, and no channel is zeroed unless the config says
    `channel_freed`."""
    channel_factor: float | None = None
    """Gates are off, and the freed channel is multiplied by this before and after rotary positions.

    Source: arXiv 2403.09636, section 3.3 (the first stage of the official recipe).
    Differs: none.
    """
    sharing: KVLayout | None = None
    """Read keys and values as this layout says, without a cache: the result of the model converted to it with `drop`. Its
    owners are owners in the model, too; what its readers would store is worked out and not used."""

    def __post_init__(self) -> None:
        if self.gates not in ("on", "off"):
            raise UserError(f"gates '{self.gates}': a call has its gates on or off: write one of the two")


PLAIN = CallOptions()
"""Of a call that asks for nothing."""
