"""From cells to rows of the quality table: a method against the unfolded model on the same windows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvfold.data.windows import TextWindows


def quality_row(
    about: Mapping[str, Any], windows: TextWindows, cell: Mapping[str, Any], unfolded: Mapping[str, Any]
) -> dict[str, Any]:
    """One row of a `quality` result: what `about` says of the method, and the figures of its cell against the unfolded one's."""
    scored_tokens = windows.num_windows * (windows.context_tokens - 1)
    loss = _mean(cell["loss"])
    mean, error = paired_difference(cell["loss"], unfolded["loss"])
    change = math.exp(mean)
    return {
        **about,
        "text": windows.name,
        "tokens": scored_tokens,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss * scored_tokens / math.log(2) / sum(windows.scored_bytes),
        "loss_difference": {"mean": mean, "standard_error": error},
        # The error of exp(x) is exp(x) times that of x, for errors that are small.
        "perplexity_change_percent": {
            "mean": 100 * (change - 1),
            "standard_error": None if error is None else 100 * change * error,
        },
        "kl": _mean(cell["kl"]),
        "top1_agreement": _mean(cell["top1_agreement"]),
        "kept_tokens": windows.context_tokens / cell["compression"],
        **{name: cell[name] for name in _AS_MEASURED},
        # Cells of earlier versions lack it.
        **{name: cell[name] for name in ("bytes_by_use",) if name in cell},
    }


_AS_MEASURED = (
    "compression",
    "compression_mean_over_time",
    "allocated_bytes",
    "full_bytes",
    "tokens_per_second",
    "seconds",
    "made",
)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float | None]:
    """Mean of ours - theirs over pairs, and its standard error; None where there is one pair only."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, number = _mean(differences), len(differences)
    if number < 2:
        return mean, None
    variance = sum((difference - mean) ** 2 for difference in differences) / (number - 1)
    return mean, math.sqrt(variance / number)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
