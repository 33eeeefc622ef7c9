"""What changes from step to step: how hard gates are pressed, and the learning rate. Plain numbers, no torch.

The compression that people ask for is the real one at the end of a training sequence, delay window included. What the loss
presses is the share of decisions that fire; here one is solved from the other.
"""

import math
from dataclasses import dataclass
from typing import Literal

from kvfold.methods.base import Method

LearningRate = Literal["constant", "cosine", "tail-cosine"]


def share_for(real_compression: float, context_tokens: int, spec: Method) -> float:
    """alpha*, the share of decisions that must fire so that a head which saw `context_tokens` tokens keeps
    1 / `real_compression` of them. Raises `ValueError` below 1, and where a DMS delay alone keeps more.
    """
    if not real_compression >= 1:
        raise ValueError(f"compression {real_compression:g}: it is times smaller, 1 or more: ask for e.g. 4")
    kept = context_tokens / real_compression
    always = always_kept(context_tokens, spec)
    free = context_tokens - always
    if real_compression == 1:
        return 0.0
    if free <= 0 or kept <= always:
        raise ValueError(_unreachable(real_compression, context_tokens, always, spec))
    return 1 - (kept - always) / free


def nominal_for(real_compression: float, context_tokens: int, spec: Method) -> float:
    """CR*, what the papers call compression: 1 / (1 - alpha*), the delay window not counted."""
    return 1 / (1 - share_for(real_compression, context_tokens, spec))


def real_for(share: float, context_tokens: int, spec: Method) -> float:
    """The inverse of `share_for`: tokens seen / tokens kept when this share of decisions fires."""
    always = always_kept(context_tokens, spec)
    return context_tokens / (always + (context_tokens - always) * (1 - share))


def always_kept(context_tokens: int, spec: Method) -> int:
    """Tokens that no decision reaches, such as DMS's delay window, or DMC's first token, which has nothing to merge into."""
    assert spec.trained, f"{spec.name} has no gates"
    return spec.always_kept(context_tokens)


def _unreachable(real: float, tokens: int, always: int, spec: Method) -> str:
    most = math.ceil(tokens / real) - 2
    remedy = f"use a delay of {most} or less, or longer sequences" if most >= 1 else "ask for less, or longer sequences"
    return (
        f"compression {real:g} of {tokens:,} tokens keeps {tokens / real:,.0f}, and {spec.format()} always keeps "
        f"{always:,}: it can't be reached: {remedy}"
    )


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
            raise ValueError(f"compression {self.compression:g}: it is times smaller, 1 or more: ask for e.g. 4")
        if min(self.zero_out_steps, self.ramp_steps, self.tail_steps) < 0 or not self.total:
            raise ValueError(
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
