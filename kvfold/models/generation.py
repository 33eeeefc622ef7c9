"""What `generate` needs of a kvfold model beyond a plain forward: its own cache, and no padding after a row has ended.

transformers goes on feeding padding, marked as real, to rows that have ended. A cache that merges or evicts would lose
real tokens to it, so here such tokens reach the store as what they are.
"""

from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import GenerationMixin, GenerationMode

from kvfold.cache.hf import FoldCache
from kvfold.errors import UserError
from kvfold.models.blocks import pack

FEEDS_CHUNKS_RIGHT = Version("5.23")
"""Before this release `prefill_chunk_size` feeds a continued cache its whole text again."""


class EndedRows(StoppingCriteriaList):
    """The stopping rules of one `generate`, which also tell its cache the rows that get padding from now on."""

    def __init__(self, criteria: StoppingCriteriaList, cache: FoldCache):
        super().__init__(criteria)
        self._cache, self._done_B = cache, None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Rows that are done, bool [B]. What ended a row is its own last word, and is still fed; what follows is padding."""
        done_B = super().__call__(input_ids, scores, **kwargs)
        self._cache.padding_B = self._done_B
        self._done_B = done_B if self._done_B is None else self._done_B | done_B
        return done_B


def check_cache(given: Any) -> None:
    """Raise `UserError` for a cache of another library."""
    if not isinstance(given, FoldCache):
        raise UserError(
            f"past_key_values is a {type(given).__name__}: a kvfold model needs its own cache: "
            "pass model.new_cache(rows=...) or leave it out"
        )


class FoldGeneration(GenerationMixin):
    """Mixed into the language model before transformers' own generation."""

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """transformers' `generate`; what a kvfold cache can't do is refused before anything runs."""
        implementation = kwargs.get("cache_implementation") or getattr(generation_config, "cache_implementation", None)
        if implementation is not None:
            raise UserError(f"cache_implementation='{implementation}': a kvfold model has its own cache: leave it out")
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if ids is not None and ids.numel() == 0:
            raise UserError(f"an input of shape {tuple(ids.shape)}: nothing to go on from: give 1 token or more")
        if kwargs.get("past_key_values") is not None:
            check_cache(kwargs["past_key_values"])
        return super().generate(inputs, generation_config, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> None:  # fmt: skip
        """A cache of ours where none was given; a given one is made to fit the rows of this call."""
        if generation_mode is GenerationMode.ASSISTED_GENERATION:
            raise UserError("assisted generation cuts the cache back, which kvfold's can't do: leave the assistant out")
        expansion = max(generation_config.num_beams, generation_config.num_return_sequences)
        pack(self, rows=batch_size * expansion)
        cache = model_kwargs.get("past_key_values")
        if cache is None and generation_config.use_cache is not False:
            cache = model_kwargs["past_key_values"] = self.new_cache(rows=batch_size * expansion)
        elif cache is not None and cache.get_seq_length():
            if generation_config.prefill_chunk_size and Version(transformers.__version__) < FEEDS_CHUNKS_RIGHT:
                raise UserError(
                    f"prefill_chunk_size on a continued cache: transformers {transformers.__version__} would feed the text "
                    "twice: leave it out"
                )
            if expansion > 1 and cache.batch_size == batch_size:
                cache.batch_repeat_interleave(expansion)
        if cache is not None:
            cache.padding_B = None
            # The prepared config is this call's own copy: it carries the cache to where the stopping rules are made.
            generation_config._kvfold_cache = cache
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _get_stopping_criteria(self, generation_config: Any, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        """transformers' rules, watched. Without an end token transformers pads no row, and beams that end leave the batch."""
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        cache = generation_config.__dict__.pop("_kvfold_cache", None)
        pads = generation_config.num_beams == 1 and any(hasattr(rule, "eos_token_id") for rule in criteria)
        return EndedRows(criteria, cache) if cache is not None and pads else criteria

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, past_key_values: Any = None,
        attention_mask: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """As transformers does, with the padding of ended rows marked as padding."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values,
            attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs,
        )  # fmt: skip
        padding_B = getattr(past_key_values, "padding_B", None)
        if padding_B is None or not bool(padding_B.any()):
            return inputs
        if attention_mask is None:
            # transformers leaves a mask of nothing but ones out; of ours the newest column alone is read.
            attention_mask = torch.ones_like(input_ids)
        newest = attention_mask[:, -1:] * ~padding_B.to(attention_mask.device)[:, None]
        inputs["attention_mask"] = torch.cat((attention_mask[:, :-1], newest), dim=1)
        return inputs
