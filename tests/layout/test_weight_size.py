"""What weights weigh: counted from a config, read from files."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

from kvfold.layout.planner import counted_bytes, weight_bytes
from tiny_model import tiny_model

# Parameters as their makers publish them, in billions.
PUBLISHED = {
    "llama-2-7b": 6.738, "llama-2-70b": 68.98, "llama-3.1-8b": 8.030, "llama-3.2-1b": 1.236, "mistral-7b": 7.248,
    "qwen2.5-0.5b": 0.494, "qwen3-0.6b": 0.596, "qwen3-8b": 8.19, "gemma-2-2b": 2.614, "gemma-3-1b": 1.000,
    "smollm2-135m": 0.1345,
    "smollm2-360m": 0.3618, "smollm2-1.7b": 1.711, "tinyllama-1.1b": 1.100,
}  # fmt: skip


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_of_known_models_it_is_what_their_makers_say(name, billions):
    assert weight_bytes(name) == pytest.approx(2e9 * billions, rel=2e-3)


@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig, Qwen3Config, Gemma2Config])
@pytest.mark.parametrize("tied", [True, False])
def test_of_a_config_it_is_what_transformers_builds(config_class, tied):
    config = config_class(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied, dtype="float32",
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert counted_bytes(config.to_dict()) == pytest.approx(4 * model.num_parameters(), rel=0.02)


def test_of_a_folder_it_is_what_its_files_have(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    held = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    assert weight_bytes(model) == held
    assert held <= weight_bytes(tmp_path) < held + 20_000


@pytest.mark.parametrize("key", ["num_experts", "vision_config"])
def test_other_weights_are_not_guessed(key):
    assert counted_bytes(LlamaConfig().to_dict() | {key: 8}) is None
