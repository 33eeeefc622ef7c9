"""Hunyuan's key norms folded into the queries: one cache of normed keys gives what norming them in every layer gives."""

import pytest
import torch

from kvfold.exchange import read_sharing
from kvfold.layout import KVLayout
from kvfold.models.key_norms import KEY_GAIN, QUERY_GAIN, fold_key_norms

LAYERS, HEADS, KV_HEADS, DIM, WIDTH, TOKENS = 6, 4, 2, 8, 32, 11
PARTS = {"q_proj": HEADS * DIM, "k_proj": KV_HEADS * DIM, "v_proj": KV_HEADS * DIM}


def random_weights(owners: list[int]) -> dict[str, torch.Tensor]:
    """Layers of attention alone; readers have no k_proj and v_proj but a key norm, as Hunyuan's have."""
    drawn = torch.Generator().manual_seed(0)
    weights = {}
    for layer, owner in enumerate(owners):
        name = f"model.layers.{layer}.self_attn."
        for part, rows in PARTS.items():
            if part == "q_proj" or owner == layer:
                weights[f"{name}{part}.weight"] = torch.randn(rows, WIDTH, generator=drawn) * 0.3
        weights[f"{name}o_proj.weight"] = torch.randn(WIDTH, HEADS * DIM, generator=drawn) * 0.3
        for part in (QUERY_GAIN, KEY_GAIN):
            weights[f"model.layers.{layer}.{part}"] = 1.0 + 0.5 * torch.randn(DIM, generator=drawn)
    return weights


def normed(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)


def turned(x_THD: torch.Tensor) -> torch.Tensor:
    angles = torch.arange(TOKENS)[:, None] / 10000.0 ** (torch.arange(DIM // 2) / (DIM // 2))
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    left, right = x_THD.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def run(weights: dict[str, torch.Tensor], owners: list[int], hidden: torch.Tensor, *, folded: bool) -> torch.Tensor:
    """The residual stream behind all layers. `folded`: what is shared is normed once, by its owner."""
    cache = {}
    for layer, owner in enumerate(owners):
        own = {name: weights.get(f"model.layers.{layer}.self_attn.{name}.weight") for name in (*PARTS, "o_proj")}
        x = normed(hidden)
        if owner == layer:
            k = turned((x @ own["k_proj"].T).view(TOKENS, KV_HEADS, DIM))
            k = normed(k) * weights[f"model.layers.{layer}.{KEY_GAIN}"] if folded else k
            cache[layer] = k, (x @ own["v_proj"].T).view(TOKENS, KV_HEADS, DIM)
        k, v = cache[owner]
        if not folded:
            k = normed(k) * weights[f"model.layers.{layer}.{KEY_GAIN}"]
        q = (
            normed(turned((x @ own["q_proj"].T).view(TOKENS, HEADS, DIM)))
            * weights[f"model.layers.{layer}.{QUERY_GAIN}"]
        )
        k, v = (one.repeat_interleave(HEADS // KV_HEADS, dim=1) for one in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) * DIM**-0.5
        scores = scores.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf)
        hidden = hidden + torch.einsum("hts,shd->thd", scores.softmax(dim=-1), v).flatten(1) @ own["o_proj"].T
    return hidden


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_one_normed_cache_gives_the_same(factor):
    config = {"use_cla": factor > 1, "cla_share_factor": factor}
    layout = read_sharing(config, KVLayout.plain(LAYERS, KV_HEADS, DIM))
    owners = [layout.owner_of(layer) for layer in range(LAYERS)]
    weights = random_weights(owners)
    hidden = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    expected = run(weights, owners, hidden, folded=False)
    fold_key_norms(weights, owners)
    torch.testing.assert_close(run(weights, owners, hidden, folded=True), expected, atol=1e-5, rtol=1e-5)
    held = {int(name.split(".")[2]) for name in weights if KEY_GAIN in name}
    assert held == set(layout.owners)


def test_a_model_without_these_norms_is_refused():
    with pytest.raises(ValueError, match="give a Hunyuan checkpoint"):
        fold_key_norms({}, [0])
