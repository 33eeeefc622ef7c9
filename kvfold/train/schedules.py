"""What changes from step to step: how hard gates are pressed, and the learning rate. Plain numbers, no torch.

The compression that people ask for is the real one at the end of a training sequence: all owners count, those without gates
too, by their bytes, delay windows included. What the loss presses is the share of decisions that fire; here one is solved
from the other.
"""

import math
from dataclasses import dataclass
from typing import Literal, Self

from kvfold.errors import UserError
from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.base import Method

LearningRate = Literal["constant", "cosine", "tail-cosine"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """What a layout keeps of a sequence at its end, as shares of the bytes of a cache that keeps every token."""

    context_tokens: int
    """Tokens of the sequence."""
    without_gates: float
    """Kept by owners that have none."""
    always: float
    """Kept by owners with gates, whatever these decide: DMS's delay window, DMC's first token."""
    decided: float
    """What gates decide about."""
    time: str
    """The layout's text along time, to name it."""

    @classmethod
    def of(cls, layout: KVLayout, context_tokens: int, model_bytes: int = 2) -> Self:
        """`model_bytes`: one number in the model's dtype; it matters where owners differ in their storage."""
        total = without = always = decided = 0.0
        for owner in layout.owners:
            size, method = entry_bytes(layout, owner, model_bytes), layout.time_of(owner)
            total += size * context_tokens
            if method.trained:
                kept = method.always_kept(context_tokens)
                always, decided = always + size * kept, decided + size * (context_tokens - kept)
            else:
                without += size * method.max_kept(context_tokens)
        return cls(
            context_tokens=context_tokens, without_gates=without / total, always=always / total, decided=decided / total,
            time=layout.time_text(),
        )  # fmt: skip

    @classmethod
    def of_method(cls, method: Method, context_tokens: int) -> Self:
        """Where all owners are under one learned method."""
        assert method.trained, f"{method.name} has no gates"
        return cls.of(KVLayout.plain(1, 1, 1).with_time(method.format()), context_tokens)

    def share_for(self, compression: float) -> float:
        """alpha*, the share of decisions that must fire so that 1 / `compression` is kept; 0 where less is kept anyway. Raises
        `UserError` below 1, and where more is kept whatever fires.
        """
        if not compression >= 1:
            raise UserError(f"compression {compression:g}: it is times smaller, 1 or more: ask for e.g. 4")
        wanted = 1 / compression - self.without_gates - self.always
        if compression == 1 or wanted >= self.decided > 0:
            return 0.0
        if wanted * self.context_tokens <= 1e-9:
            raise UserError(self._unreachable(compression))
        return 1 - wanted / self.decided

    def compression_for(self, share: float) -> float:
        """The inverse of `share_for`: tokens seen / tokens kept when this share of decisions fires."""
        return 1 / (self.without_gates + self.always + self.decided * (1 - share))

    def nominal_for(self, compression: float) -> float:
        """CR*, what the papers call compression: 1 / (1 - alpha*), delay windows and owners without gates not counted."""
        return 1 / (1 - self.share_for(compression))

    def _unreachable(self, compression: float) -> str:
        tokens = self.context_tokens
        most = math.ceil(tokens * (1 / compression - self.without_gates)) - 2
        remedy = "ask for less, or longer sequences"
        if self.without_gates:
            remedy += ", or leave fewer layers without gates"
        elif most >= 1:
            remedy = f"use a delay of {most} or less, or longer sequences"
        return (
            f"compression {compression:g} of {tokens:,} tokens keeps {tokens / compression:,.0f}, and {self.time} always keeps "
            f"{tokens * (self.without_gates + self.always):,.0f}: it can't be reached: {remedy}"
        )


def entry_bytes(layout: KVLayout, owner: int, model_bytes: int) -> int:
    """Bytes of K and V of one token in all heads of an owner."""
    layer = layout.layers[owner]
    return layer.num_kv_heads * sum(layout.bits_of(owner).slot_bytes(layer.head_dim, model_bytes))


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """The steps of a retrofit: DMC's zero-out, the ramp from no compression to the target, and a tail at the target.

    Source: arXiv 2403.09636, section 3.3; arXiv 2506.05345, section 3.
    Differs: the ramp is linear in the real compression at the training length, not in 1 / (1 - share of decisions).
    """

    compression: float
    """Real compression at the end of the ramp."""
    zero_out_steps: int = 0
    """Steps in which the freed channel fades out, gates off (DMC)."""
    ramp_steps: int
    """Steps from no compression to the target; 0 = the target from the first step on."""
    tail_steps: int = 0
    """Steps at the target."""

    def __post_init__(self) -> None:
        if not self.compression >= 1:
            raise UserError(f"compression {self.compression:g}: it is times smaller, 1 or more: ask for e.g. 4")
        if min(self.zero_out_steps, self.ramp_steps, self.tail_steps) < 0 or not self.total:
            raise UserError(
                f"stages of {self.zero_out_steps} + {self.ramp_steps} + {self.tail_steps} steps: a retrofit takes 1 step or "
                "more: give it more tokens"
            )

    @property
    def total(self) -> int:
        """Steps in all."""
        return self.zero_out_steps + self.ramp_steps + self.tail_steps

    @property
    def tail_start(self) -> int:
        """The first step of the tail, counted from 0."""
        return self.zero_out_steps + self.ramp_steps

    def zero_out_factor(self, step: int) -> float | None:
        """What the freed channel is multiplied by at `step` (from 0): 0 after four fifths of the stage; None after it."""
        if step >= self.zero_out_steps:
            return None
        return max(0.0, 1 - step / (0.8 * self.zero_out_steps))

    def compression_at(self, step: int) -> float:
        """The real compression that is asked for at `step` (from 0)."""
        if step < self.zero_out_steps:
            return 1.0
        if step >= self.tail_start:
            return self.compression
        return 1 + (self.compression - 1) * (step - self.zero_out_steps + 1) / self.ramp_steps

    def targets(self, retention: Retention | None) -> list["Target"]:
        """What is asked for in each step; `retention`: where anything is compressed."""
        return [
            Target(
                channel_factor=self.zero_out_factor(step), compression=self.compression_at(step),
                share=0.0 if retention is None else retention.share_for(self.compression_at(step)),
                unit=None if retention is None else self.unit_after(step + 1),
            )
            for step in range(self.total)
        ]  # fmt: skip

    def unit_after(self, done_steps: int) -> int | None:
        """The whole compression (2, 3, ...) that the ramp asked for in the last of `done_steps` steps for the first time,
        and short of the target, whose result is the run's own.
        """
        if not self.zero_out_steps < done_steps <= self.tail_start:
            return None
        now = math.floor(self.compression_at(done_steps - 1) + 1e-9)
        before = 1.0 if done_steps - 1 == self.zero_out_steps else self.compression_at(done_steps - 2)
        reached = now > math.floor(before + 1e-9) and now >= 2
        return now if reached and now < self.compression else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What is asked for in one step."""

    channel_factor: float | None
    """Of the freed channel, while it fades out; None = gates are on, if there are any."""
    compression: float
    """The real one, at the end of a sequence."""
    share: float
    """alpha*: of decisions, those that must fire for it."""
    unit: int | None
    """The whole compression that is come to in this step."""


def learning_rate_factor(
    step: int, *, kind: LearningRate, stages: Stages, warmup_steps: int = 0, final: float = 0.1
) -> float:
    """What the learning rate is multiplied by at `step` (from 0).

    `constant`; `cosine` over the whole run down to `final`; `tail-cosine`: constant until the tail begins, cosine from there.
    """
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    start = {"constant": stages.total, "cosine": warmup_steps, "tail-cosine": stages.tail_start}[kind]
    if step < start or start >= stages.total:
        return warm
    done = (step - start) / max(1, stages.total - start)
    return warm * (final + (1 - final) * (1 + math.cos(math.pi * min(1.0, done))) / 2)
