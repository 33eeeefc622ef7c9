"""The other side of a comparison: the same checkpoint in transformers' own class, alone and as lm-eval's own `hf` model, whose
scores and log probabilities kvfold's are held against.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import transformers
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM


from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from kvfold.errors import UserError, one_line
from kvfold.models.config import FoldConfig
from kvfold.models.source import find_source

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


def load_theirs(source: str | Path, *, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """transformers' model of a folder, hub name or .gguf file, with SDPA attention, in eval mode.

    Raises `UserError` for a kvfold checkpoint, which plain transformers has no class for.
    """
    found, level, bars = find_source(source), logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(found.name, **found.options)
        if config.model_type == FoldConfig.model_type:
            raise UserError(
                f"{found}: a kvfold checkpoint, which transformers has no class for: give the one it was made from"
            )
        model = AutoModelForCausalLM.from_pretrained(
            found.name, dtype=dtype, attn_implementation="sdpa", **found.options
        )
    except OSError as error:
        raise UserError(
            f"{found}: transformers can't read it ({one_line(error)}): fetch the checkpoint again"
        ) from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    return model.to(device).eval()
