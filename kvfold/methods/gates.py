"""Where the decisions of a learned method come from in one model, as data: it stands in a checkpoint's config and in an
adapter's. How logits are computed is the model's business (models/gates.py).
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

from kvfold.errors import UserError
from kvfold.methods.base import GateForm
from kvfold.methods.registry import METHODS, method_class


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """Where the decisions of one method come from.

    Source: arXiv 2403.09636, section 3 (DMC); arXiv 2506.05345, section 3 (DMS).
    Differs: decisions are taken in fp32 (official: the model's dtype, or a kernel's rounding of it); a method may read the
    token's own decision (`reads="own"`) where the official DMS reads the next token's.
    """

    method: str
    """The method that the gates decide for."""
    source: Literal["channel", "adapter"] = "channel"
    """A freed channel, or a small module beside the layer."""
    reads: Literal["own", "next"] = "own"
    """Which token's decision governs a token: its own, or that of the one after it."""
    per: Literal["head", "layer"] = "head"
    """Every KV head decides, or head 0 for all heads of its layer."""
    channel: int = -1
    """The freed channel."""
    scale: float = 1.0
    """Factor of the channels or of the adapter's output: the larger, the faster a gate learns beside other weights."""
    offset: float = 5.0
    """Subtracted from the scaled value, so that an untrained gate stays shut; calibration moves it."""
    tau: float = 0.1
    """Temperature of soft decisions in training."""
    bias: bool = False
    """The adapter has a bias for each head (always where the family's q, k, v have one)."""
    base_masked: bool = False
    """Trained as LoRA: what the base weights write into the freed channel is masked out; theirs stay as they are."""
    form: GateForm = field(init=False, repr=False, compare=False)
    """What the method's gates look like. Derived."""

    def __post_init__(self) -> None:
        form = method_class(self.method).gate_form
        object.__setattr__(self, "form", form)
        if form is None:
            learned = sorted(name for name, method in METHODS.items() if method.gate_form is not None)
            raise UserError(f"gates of {self.method}: it learns nothing: use gates of {' or '.join(learned)}")
        for name, known in (("source", ("channel", "adapter")), ("reads", ("own", "next")), ("per", ("head", "layer"))):
            if getattr(self, name) not in known:
                raise UserError(f"gates: {name} '{getattr(self, name)}' is not known: use {' or '.join(known)}")
        possible = form.adapter if self.source == "adapter" else form.channel_of is not None
        if not possible or self.reads not in form.reads:
            raise UserError(
                f"gates of {self.method} from its {self.source}, {self.reads}: the method has no such form: give these up"
            )
        if not self.tau > 0:
            raise UserError(f"gates: tau {self.tau}: a temperature is above 0: write e.g. 0.1")

    @classmethod
    def published_channel(cls, method: str) -> Self:
        """The published channel form, for a model whose checkpoint says nothing of its gates. Raises `UserError` where the
        method has none.
        """
        form = method_class(method).gate_form
        if form is None or form.channel_of is None:
            raise UserError(f"gates 'channel' under {method}: it has no published channel form: leave gates out")
        return cls(method=method, reads=form.reads[-1], scale=form.scale)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """From config.json; raises `UserError` at a key that is not known."""
        unknown = sorted(set(values) - {one.name for one in fields(cls) if one.init})
        if unknown or "method" not in values:
            raise UserError(
                f"gates: {f'unknown key {unknown[0]}' if unknown else 'no method'}: "
                "they were written by another version: fetch the checkpoint again"
            )
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.init}
