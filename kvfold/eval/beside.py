"""Other models beside the one that is measured: trained or converted from it, each under its own method.

Their rows are compared with the first model unfolded, which is what they came from: perplexity on the same windows, and the
divergence from its next-token distribution. They are opened one at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from kvfold.errors import UserError
from kvfold.eval.folding import method_about
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.decoder import FoldForCausalLM


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """A model to be measured beside another."""

    label: str
    """What its rows are called."""
    open: Callable[[], FoldForCausalLM]
    """Loads it."""
    trained_tokens: int | None = None
    """Tokens it was trained on to become what it is; None = not known."""


def check_labels(beside: Sequence[Beside]) -> None:
    """Raises `UserError` where two models would have the same name."""
    labels = [other.label for other in beside]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UserError(f"two models beside are called '{twice}': a row's name is its folder's: rename one of the two")


@contextmanager
def opened(other: Beside, first: FoldForCausalLM) -> Iterator[FoldForCausalLM]:
    """The other model. Raises `UserError` where it does not read the first one's tokens."""
    model = other.open()
    if model.config.vocab_size != first.config.vocab_size:
        raise UserError(
            f"{other.label}: its vocabulary has {model.config.vocab_size:,} tokens and the model's "
            f"{first.config.vocab_size:,}: put models with the same tokenizer beside each other"
        )
    yield model


def method_beside(other: Beside, layout: KVLayout) -> str:
    """The method of another model's row: its own, and whose it is."""
    return f"{layout.time_text()} of {other.label}"


def about_beside(other: Beside, layout: KVLayout) -> dict[str, object]:
    """As `method_about`; a model that drops nothing goes by its own name."""
    about = method_about(layout)
    folds = layout != layout.base()
    return {
        "method": method_beside(other, layout),
        "title": about["title"] if folds else other.label,
        "trained": True,
        "model": other.label,
        "trained_tokens": other.trained_tokens,
        "layers": layout.layers_text(),
    }
