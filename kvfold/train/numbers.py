"""Whether the numbers of a training's settings can be: one line for the first that can't. No torch."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from kvfold.errors import UserError


def check_numbers(
    settings: Any, *, counts: Iterable[str], from_zero: Iterable[str], above_zero: Mapping[str, str]
) -> None:
    """Raise `UserError` for a count below 1, a number below 0 or not above it, and for betas and a final learning rate out of
    their range. `above_zero`: names with a usual value; None is left alone.
    """
    for name in counts:
        if getattr(settings, name) < 1:
            raise UserError(f"{name} {getattr(settings, name)}: it is 1 or more: ask for more")
    for name in from_zero:
        if not 0 <= getattr(settings, name) < math.inf:
            raise UserError(f"{name} {getattr(settings, name):g}: it is 0 or more: use e.g. 0")
    for name, example in above_zero.items():
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name} {value:g}: it is a number above 0: use e.g. {example}")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(settings, name) < 1:
            raise UserError(f"{name} {getattr(settings, name):g}: it is from 0 to below 1: use e.g. 0.9")
    if not 0 <= settings.final_learning_rate <= 1:
        raise UserError(f"final_learning_rate {settings.final_learning_rate:g}: it is a share, 0 to 1: use e.g. 0.1")
