"""lm-eval's own `hf` model of the same checkpoint, to hold the kvfold model against: scores, and every log probability."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import transformers
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

PEER = "hf"
"""Stands where methods stand in rows."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """The other side, loaded when it is first asked."""

    load: Callable[[], PreTrainedModel]
    """Gives transformers' model."""
    tokenizer: Any
    rows: int
    """Requests read side by side."""

    @property
    def identity(self) -> str:
        """What it is called, and known again by."""
        return f"transformers {transformers.__version__} by lm-eval's hf"

    @cached_property
    def lm(self) -> "HFLM":
        """As lm-eval asks."""
        from lm_eval.models.huggingface import HFLM

        return HFLM(self.load(), backend="causal", tokenizer=self.tokenizer, batch_size=self.rows)


def likelihoods(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[float] | None:
    """The log probabilities, nats, that lm-eval was given for the requests of all samples, in their order; None where what a
    model wrote was asked.
    """
    found = []
    for of_task in samples.values():
        for sample in of_task:
            for (answer, *_), *_ in sample["resps"] if _are_pairs(sample["resps"]) else []:
                found.append(float(answer))
    return found or None


def _are_pairs(answers: Sequence[Any]) -> bool:
    return all(isinstance(one, Sequence) and one and isinstance(one[0], tuple | list) for one in answers)


def largest_difference(one: Sequence[float] | None, other: Sequence[float] | None) -> float | None:
    """Between the two answers to any request, nats; None where they were not asked the same number of them."""
    if one is None or other is None or len(one) != len(other):
        return None
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
