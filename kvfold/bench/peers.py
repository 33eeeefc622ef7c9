"""The other side of a comparison: the same checkpoint in transformers' own class."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from kvfold.errors import UserError, one_line
from kvfold.models.config import FoldConfig
from kvfold.models.source import find_source


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
