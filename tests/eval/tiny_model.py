"""A tiny random model that reads bytes, with weights large enough for its predictions to differ."""

import torch

from byte_tokenizer import VOCAB_SIZE
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM


def tiny_model(**settings) -> FoldForCausalLM:
    """Two layers, four query heads on two KV heads of 8, 64 positions."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    model = FoldForCausalLM(FoldConfig(**(shape | settings))).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return model
