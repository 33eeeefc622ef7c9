"""Norms of q and k behind rotary positions, with gains that differ within a group (Hunyuan): one cache of keys normed once
gives what norming the shared keys again in every layer gives.
"""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from kvfold.convert.conversion import Conversion, convert
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.load import load

LAYERS, HEADS, KV_HEADS, DIM, WIDTH, WORDS, EPS = 6, 4, 2, 8, 32, 97, 1e-5
CONFIG = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "head_dim": DIM,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 64, "rms_norm_eps": EPS,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def theirs() -> torch.nn.Module:
    """A model without feed-forward blocks, for a short reference; every other weight is random."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["hunyuan_v1_dense"](**CONFIG), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(0.0) if "down_proj" in name else weight.add_(torch.randn_like(weight) * 0.3)
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def normed(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPS) * gain


def turned(x_THD: torch.Tensor) -> torch.Tensor:
    angles = torch.arange(len(x_THD))[:, None] / 10000.0 ** (torch.arange(DIM // 2) / (DIM // 2))
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    left, right = x_THD.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def slow(weights: dict[str, torch.Tensor], owners: list[int], ids_T: torch.Tensor) -> torch.Tensor:
    """Logits of one text: turned keys are shared without their norm, and each layer norms them with its own gain."""
    hidden, cache, tokens = weights["model.embed_tokens.weight"][ids_T], {}, len(ids_T)
    hidden_mask = torch.ones(tokens, tokens).triu(1).bool()
    for layer, owner in enumerate(owners):
        own = {name.split(f"layers.{layer}.")[1]: one for name, one in weights.items() if f"layers.{layer}." in name}
        x = normed(hidden, own["input_layernorm.weight"])
        q, k, v = (
            (x @ own[f"self_attn.{part}_proj.weight"].T).view(tokens, -1, DIM)
            if layer == owner or part == "q"
            else None
            for part in "qkv"
        )
        if layer == owner:
            cache[layer] = turned(k), v
        k, v = cache[owner]
        q, k = (
            normed(turned(q), own["self_attn.query_layernorm.weight"]),
            normed(k, own["self_attn.key_layernorm.weight"]),
        )
        k, v = (one.repeat_interleave(HEADS // KV_HEADS, dim=1) for one in (k, v))
        scores = (torch.einsum("thd,shd->hts", q, k) * DIM**-0.5).masked_fill(hidden_mask, -torch.inf)
        hidden = (
            hidden
            + torch.einsum("hts,shd->thd", scores.softmax(dim=-1), v).flatten(1) @ own["self_attn.o_proj.weight"].T
        )
    return normed(hidden, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_a_checkpoint_that_shares_is_loaded_and_run(factor, ids, tmp_path):
    model = theirs()
    model.config.use_cla, model.config.cla_share_factor = factor > 1, factor
    owners = [layer - layer % factor for layer in range(LAYERS)]
    weights = model.state_dict()
    for layer in set(range(LAYERS)) - set(owners):
        del (
            weights[f"model.layers.{layer}.self_attn.k_proj.weight"],
            weights[f"model.layers.{layer}.self_attn.v_proj.weight"],
        )
    model.save_pretrained(tmp_path, state_dict=dict(weights))
    ours = load(tmp_path)
    assert ours.config.layout.layers_text() == KVLayout.plain(LAYERS, KV_HEADS, DIM).with_owners(owners).layers_text()
    expected = torch.stack([slow(weights, owners, row) for row in ids])
    torch.testing.assert_close(logits(ours, ids), expected, atol=1e-4, rtol=1e-4)
    cache, parts = ours.new_cache(rows=2), []
    with torch.no_grad():
        for start, end in ((0, 7), (7, 8), (8, 9), (9, 13)):
            parts.append(ours(ids[:, start:end], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-4)
    if factor == 1:
        torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)


def test_conversion_leaves_each_layer_its_gain(ids, tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path / "plain")
    ours = convert(tmp_path / "plain", tmp_path / "cla2", Conversion(layers="cla2", init="drop"))
    owners = [layer - layer % 2 for layer in range(LAYERS)]
    expected = torch.stack([slow(dict(model.state_dict()), owners, row) for row in ids])
    torch.testing.assert_close(logits(ours, ids), expected, atol=1e-4, rtol=1e-4)
