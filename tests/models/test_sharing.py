"""Layers that share keys and values: the decoder against a slow loop over layers, heads and tokens, and the identities."""

import pytest
import torch

from kvfold.layout import KVLayout
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM

PLAIN = KVLayout.plain(4, 2, 16)


def build(layout: KVLayout, **switches) -> FoldForCausalLM:
    torch.manual_seed(0)
    model = FoldForCausalLM(
        FoldConfig(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, layout=layout, **switches,
        )
    )  # fmt: skip
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def rms(x: torch.Tensor, norm: torch.nn.Module, eps: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * norm.weight


def turned(x: torch.Tensor, position: int) -> torch.Tensor:
    """One head [16] turned to its position, pair by pair."""
    out = x.clone()
    for i in range(8):
        angle = torch.tensor(position / 10000.0 ** (i / 8))
        out[i] = x[i] * angle.cos() - x[i + 8] * angle.sin()
        out[i + 8] = x[i + 8] * angle.cos() + x[i] * angle.sin()
    return out


def slow_logits(model: FoldForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The logits of one text, [T, V], by the definition."""
    config, eps = model.config, model.config.rms_norm_eps
    hidden, stored = model.model.embed_tokens.weight[ids], {}
    for index, layer in enumerate(model.model.layers):
        attention, owner = layer.self_attn, config.layout.owner_of(index)
        normed = rms(hidden, layer.input_layernorm, eps)
        if owner == index:
            source = rms(hidden, attention.kv_norm, eps) if config.kv_norm else normed
            k, v = (proj(source).view(len(ids), 2, 16) for proj in (attention.k_proj, attention.v_proj))
            stored[owner] = torch.stack([torch.stack([turned(h, t) for h in k[t]]) for t in range(len(ids))]), v
        k, v = stored[owner]
        q = attention.q_proj(normed).view(len(ids), 4, 16)
        attended = torch.zeros_like(q)
        for t in range(len(ids)):
            for head in range(4):
                weights = (k[: t + 1, head // 2] @ turned(q[t, head], t) / 4.0).softmax(dim=0)
                attended[t, head] = weights @ v[: t + 1, head // 2]
        hidden = hidden + attention.o_proj(attended.flatten(1))
        normed, mlp = rms(hidden, layer.post_attention_layernorm, eps), layer.mlp
        gate = mlp.gate_proj(normed)
        hidden = hidden + mlp.down_proj(gate * gate.sigmoid() * mlp.up_proj(normed))
    return model.lm_head(rms(hidden, model.model.norm, eps))


@pytest.mark.parametrize("kv_norm", [False, True])
@pytest.mark.parametrize("layers", ["full", "cla2", "cla3", "yoco", "trailing:2", "0_1_0_1"])
def test_logits_equal_the_slow_loop(layers, kv_norm, ids):
    model = build(KVLayout.parse(layers, PLAIN), kv_norm=kv_norm)
    with torch.no_grad():
        for row in range(2):
            expected = slow_logits(model, ids[row])
            torch.testing.assert_close(model(ids[row : row + 1]).logits[0], expected, atol=1e-4, rtol=1e-4)


def test_gradients_of_a_shared_layout_equal_the_slow_loops(ids):
    model = build(KVLayout.parse("cla2", PLAIN), kv_norm=True)
    probe = torch.randn(13, 97)
    (model(ids[:1]).logits[0] * probe).sum().backward()
    ours = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    (slow_logits(model, ids[0]) * probe).sum().backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(ours[name], weight.grad, atol=1e-3, rtol=1e-3)


def test_a_reader_has_no_keys_and_values_of_its_own():
    model = build(KVLayout.parse("cla2", PLAIN), qk_norm="head", qkv_bias=True, kv_norm=True)
    names = {f"model.layers.{i}.self_attn.{part}" for i in (0, 1, 2, 3) for part in
             ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias", "k_norm.weight", "kv_norm.weight")}  # fmt: skip
    held = names & model.state_dict().keys()
    assert held == {name for name in names if ".0." in name or ".2." in name}


def test_fewer_heads_in_the_layout_make_narrower_projections(ids):
    model = build(PLAIN.with_heads(1))
    assert model.model.layers[3].self_attn.k_proj.weight.shape == (16, 64)
    with torch.no_grad():
        assert model(ids).logits.shape == (2, 13, 97)


def test_every_layer_an_owner_equals_the_plain_layout(ids):
    with torch.no_grad():
        plain, explicit = (build(layout)(ids).logits for layout in (PLAIN, KVLayout.parse("0_1_2_3", PLAIN)))
    assert torch.equal(plain, explicit)


@pytest.mark.parametrize("layers", ["cla2", "yoco", "0_1_0_1"])
def test_a_shared_layout_through_a_cache(layers, ids):
    model = build(KVLayout.parse(layers, PLAIN))
    with torch.no_grad():
        expected, cache = model(ids, use_cache=False).logits, model.new_cache(rows=2)
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([6, 1, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-4, rtol=1e-4)
