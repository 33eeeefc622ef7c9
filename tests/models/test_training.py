"""What a training loop leans on: gradient checkpointing, LoRA, initial weights."""

import pytest
import torch

from kvfold.layout.kvlayout import KVLayout
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM

SMALL = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def build(layers: str = "full", **switches) -> FoldForCausalLM:
    torch.manual_seed(0)
    layout = KVLayout.parse(layers, KVLayout.plain(4, 2, 16))
    return FoldForCausalLM(FoldConfig(**SMALL, layout=layout, **switches))


@pytest.mark.parametrize("layers", ["full", "cla2", "yoco"])
def test_gradient_checkpointing_changes_no_gradient(layers, ids):
    gradients = []
    for checkpointed in (False, True):
        model = build(layers).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_lora_trains_a_step_and_leaves_the_base_alone(ids):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4))
    model.train()
    base = {name: weight.clone() for name, weight in model.named_parameters() if not weight.requires_grad}
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, weight in model.named_parameters():
        assert weight.requires_grad or torch.equal(weight, base[name])


def test_a_text_is_overfitted(ids):
    model = build("cla2", kv_norm=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1


@pytest.mark.parametrize(("offset", "gain"), [(False, 1.0), (True, 0.0)])
def test_initial_weights(offset, gain):
    model = build(norm_offset=offset, qk_norm="head", kv_norm=True, qkv_bias=True, initializer_range=0.05)
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert (weight == gain).all(), name
        elif name.endswith("bias"):
            assert (weight == 0).all(), name
        else:
            assert 0.04 < weight.std() < 0.06, name


def test_bf16_stays_bf16_and_close_to_fp32(ids):
    model = build(norm_offset=True, norm_placement="sandwich", embedding_multiplier=8.0).eval()
    with torch.no_grad():
        exact = model(ids).logits
        rounded = model.to(torch.bfloat16)(ids).logits
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.05)
