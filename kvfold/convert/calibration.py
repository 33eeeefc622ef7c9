"""Windows of text that a conversion is fitted on. Letters: W windows, T tokens of a window."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.data.texts import read_text_file
from kvfold.data.windows import text_windows
from kvfold.errors import UserError


def calibration_windows(tokenizer: Any, files: Sequence[Path], *, tokens: int, context_tokens: int) -> Tensor:
    """Token ids [W, T] of about `tokens` tokens, an equal share of windows from each file, evenly spaced over it.

    Raises `UserError` where that is less than a window.
    """
    windows = tokens // context_tokens
    if windows < 1:
        raise UserError(
            f"{tokens} tokens of calibration text: a window has {context_tokens}, and 1 window is the least: ask for more"
        )
    shares = [len(range(place, windows, len(files))) for place in range(len(files))]
    return torch.cat(
        [
            text_windows(read_text_file(path), tokenizer, windows=share, context_tokens=context_tokens).ids_WT
            for path, share in zip(files, shares, strict=True)
            if share
        ]
    )
