"""A new model, as the settings of training from scratch describe it."""

from typing import Any

import torch

from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM
from kvfold.train.pretrain_settings import PretrainSettings


def config_of(settings: PretrainSettings, tokenizer: Any = None) -> FoldConfig:
    """Pre-norm, SwiGLU, rotary positions; the special tokens are the tokenizer's."""
    ends = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return FoldConfig(
        vocab_size=settings.vocabulary, hidden_size=settings.hidden_size, intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers, num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads, head_dim=settings.head_dim, layout=settings.layout,
        kv_norm=settings.has_kv_norm, tie_word_embeddings=settings.tie_embeddings, rms_norm_eps=settings.norm_eps,
        initializer_range=settings.init_std, max_position_embeddings=settings.sequence_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta}, **ends,
    )  # fmt: skip


def new_model(settings: PretrainSettings, tokenizer: Any = None) -> FoldForCausalLM:
    """Its weights are drawn by the seed; fp32, in training mode."""
    torch.manual_seed(settings.seed)
    return FoldForCausalLM(config_of(settings, tokenizer)).train()
