"""Golden: each family, `ours` against `theirs`: logits, loss and the gradient of every weight."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from kvfold.models.families import FAMILIES, fold_config, fold_weights

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)]}

CASES = {
    "llama": ("llama", {}),
    "llama biases, wide heads, tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 32, "tie_word_embeddings": True},
    ),
    "llama mqa": ("llama", {"num_key_value_heads": 1}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}}),
    "llama linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama dynamic rope, short": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "llama dynamic rope, long": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, "max_position_embeddings": 8},
    ),
    "llama yarn rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral, window shorter than the text": ("mistral", {"sliding_window": 5}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, sliding layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 32, "attention_bias": True}),
    "qwen3, sliding layers": (
        "qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "smollm3, layers without rope": ("smollm3", {"no_rope_layer_interval": 2}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.02,
            "logits_scaling": 6.0,
        },
    ),
    "hunyuan": ("hunyuan_v1_dense", {"head_dim": 16, "attention_bias": True}),
    "hunyuan, a larger base": (
        "hunyuan_v1_dense",
        {
            "head_dim": 32,
            "rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 1e4},
        },
    ),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {}),
    "phi3, window": ("phi3", {"sliding_window": 6}),
    "phi3, half of each head turned": ("phi3", {"partial_rotary_factor": 0.5}),
    "phi3 longrope, short": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    "phi3 longrope, long": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 8}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": (
        "gemma2",
        {"head_dim": 32, "sliding_window": 4, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 5.0},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 32,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            },
        },
    ),
}


def test_every_family_has_a_case():
    assert {model_type for model_type, _ in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(case, pair, ids):
    ours, theirs = pair(CASES[case][0], **CASES[case][1])
    labels = ids.clone()
    labels[0, :4] = -100
    mine, reference = (model(ids, labels=labels, use_cache=False) for model in (ours, theirs))
    torch.testing.assert_close(mine.logits, reference.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mine.loss, reference.loss, atol=1e-5, rtol=1e-5)
    mine.loss.backward()
    reference.loss.backward()
    expected = fold_weights(ours.config, {name: weight.grad for name, weight in theirs.named_parameters()})
    gradients = {name: weight.grad for name, weight in ours.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected[name], atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", CASES)
def test_left_padding_and_given_positions(case, pair, ids):
    ours, theirs = pair(CASES[case][0], **CASES[case][1])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
        for given in ({}, {"position_ids": positions}):
            logits = ours(ids, attention_mask=mask, use_cache=False, **given).logits[mask.bool()]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        shifted = {"position_ids": positions * 2 + 3}
        expected = theirs(ids, attention_mask=mask, **shifted).logits[mask.bool()]
        logits = ours(ids, attention_mask=mask, use_cache=False, **shifted).logits[mask.bool()]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "settings", "line"),
    [
        ("gpt2", {}, "model family 'gpt2': kvfold has no decoder for it: it knows gemma, gemma2"),
        ("mixtral", {}, "model family 'mixtral'"),
        ("gpt_oss", {}, "model family 'gpt_oss'"),
        (
            "gemma2",
            {"use_bidirectional_attention": True},
            "gemma2 with use_bidirectional_attention=True: attention to later tokens",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "only phi3 turn",
        ),
        ("qwen3", {"layer_types": ["chunked_attention"] * 32}, "qwen3 with layers of type chunked_attention"),
        ("llama", {"per_layer_config": {1: {"intermediate_size": 8}}}, "llama with per_layer_config"),
    ],
)
def test_unknown_families_and_variants_are_refused_by_name(model_type, settings, line):
    with pytest.raises(ValueError) as caught:
        fold_config(CONFIG_MAPPING[model_type](**settings))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
