"""What `generate` needs of a kvfold model beyond a plain forward: its own cache, and no padding after a row has ended.

transformers goes on feeding padding, marked as real, to rows that have ended. A cache that merges or drops would lose
real tokens to it, so here such tokens reach the store as what they are.
"""

from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers.generation.utils import GenerationMode

FEEDS_CHUNKS_RIGHT = Version("5.23")
"""Before this release `prefill_chunk_size` feeds a continued cache its whole text again."""


class FoldGeneration:
    """Mixed into the language model before transformers' own generation."""

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        """A cache of ours where none was given; a given one is made to fit the rows of this call."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation='{generation_config.cache_implementation}': a kvfold model has its own cache: leave it out"
            )
        if generation_mode is GenerationMode.ASSISTED_GENERATION:
            raise ValueError("assisted generation cuts the cache back, which a kvfold cache can't do: leave the assistant out")
        expansion = max(generation_config.num_beams, generation_config.num_return_sequences)
        cache = model_kwargs.get("past_key_values")
        if cache is None and generation_config.use_cache is not False:
            cache = model_kwargs["past_key_values"] = self.new_cache(rows=batch_size * expansion)
        elif cache is not None and cache.get_seq_length():
            if generation_config.prefill_chunk_size and Version(transformers.__version__) < FEEDS_CHUNKS_RIGHT:
                raise ValueError(
                    f"prefill_chunk_size on a continued cache: transformers {transformers.__version__} would feed the text "
                    "twice: leave it out"
                )
            if expansion > 1 and cache.batch_size == batch_size:
                cache.batch_repeat_interleave(expansion)
        if cache is not None:
            cache.generated = 0
            cache.end_tokens, cache.pad_token = generation_config._eos_token_tensor, generation_config._pad_token_tensor
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, past_key_values: Any = None,
        attention_mask: Tensor | None = None, **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """As transformers does, with the padding of ended rows marked as padding."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values,
            attention_mask=attention_mask, **kwargs,
        )  # fmt: skip
        decoding = next_sequence_length == 1 and not kwargs.get("is_first_iteration", False)
        if not decoding or past_key_values is None or attention_mask is None:
            return inputs
        past_key_values.generated += 1
        ended = _ended(input_ids[:, -past_key_values.generated :], past_key_values.end_tokens, past_key_values.pad_token)
        if bool(ended.any()):
            inputs["attention_mask"] = torch.cat((attention_mask[:, :-1], attention_mask[:, -1:] * ~ended[:, None]), dim=1)
        return inputs


def _ended(generated_BT: Tensor, end_tokens: Tensor | None, pad_token: Tensor | None) -> Tensor:
    """Rows whose newest token is padding, bool [B]: an end token came before it, or the row was stopped by another rule
    and goes on with padding (one such token may be the model's own word, two are not).
    """
    ended = torch.zeros_like(generated_BT[:, 0], dtype=torch.bool)
    if end_tokens is not None:
        ended = torch.isin(generated_BT[:, :-1], end_tokens).any(dim=1)
    if pad_token is not None and generated_BT.shape[1] > 1:
        ended = ended | (generated_BT[:, -2:] == pad_token).all(dim=1)
    return ended
