"""Merging KV heads of a model's weights, where the projection of a merged head is the mean of those of its group; and sharing
keys and values between layers: what the owner of a group gets, and what readers lose.

Everything here works on a state dict in place, one tensor at a time in fp32. Letters: C model width, D head dim, K kv heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold.layout.kvlayout import KVLayout
from kvfold.models.config import FoldConfig

Weights = dict[str, Tensor]
"""A state dict of our decoder."""

_TINY = 1e-6
"""A gain below this share of the largest passes nothing on, so nothing is divided by it."""


def attention_name(layer: int, part: str) -> str:
    """The state dict's name of a part of a layer's attention."""
    return f"model.layers.{layer}.self_attn.{part}"


def gain_of(config: FoldConfig, weight: Tensor) -> Tensor:
    """What a norm multiplies by, fp32."""
    return weight.float() + 1.0 if config.norm_offset else weight.float()


def divided(folded: Tensor, gain: Tensor, fallback: Tensor) -> Tensor:
    """`folded / gain`, and `fallback` where the gain is next to nothing."""
    usable = gain.abs() > _TINY * gain.abs().max()
    return torch.where(usable, folded / torch.where(usable, gain, torch.ones_like(gain)), fallback)


def merge_heads(config: FoldConfig, weights: Weights, num_kv_heads: int, *, pair: bool) -> None:
    """Merge the KV heads of every owner into `num_kv_heads`, in groups of neighbours. `pair`: like heads are made
    neighbours first, which changes nothing by itself. The layout in `config` is that of the unmerged heads.

    Source: arXiv 2305.13245, section 2.1 (Ainslie et al., GQA: mean pooling).
    Differs: like heads may be merged instead of neighbours; a gain over all heads (OLMo2) is folded into what is averaged.
    """
    for owner in config.layout.owners:
        if config.layout.layers[owner].num_kv_heads == num_kv_heads:
            continue
        if pair:
            reorder_heads(config, weights, owner, like_heads_together(config, weights, owner, num_kv_heads))
        _pool(config, weights, owner, num_kv_heads)


def like_heads_together(config: FoldConfig, weights: Weights, owner: int, num_kv_heads: int) -> list[int]:
    """An order of the owner's KV heads in which groups of neighbours are alike: the sum of the cosines of their key
    projections and of their value projections. The order as it stands is kept where it is as good.
    """
    num_heads = config.layout.layers[owner].num_kv_heads
    size = num_heads // num_kv_heads
    alike = torch.zeros(num_heads, num_heads, dtype=torch.float64)
    for rows in (_key_rows(config, weights, owner), weights[attention_name(owner, "v_proj.weight")]):
        flat = F.normalize(rows.double().reshape(num_heads, -1), dim=1).cpu()
        alike += flat @ flat.T
    left, groups = list(range(num_heads)), []
    while left:
        group = [left.pop(0)]
        while len(group) < size:
            best = max(left, key=lambda head: float(alike[head, group].sum()))
            left.remove(best)
            group.append(best)
        groups.append(sorted(group))
    stands = [list(range(start, start + size)) for start in range(0, num_heads, size)]
    found, kept = (sum(float(alike[one][:, one].sum()) for one in order) for order in (groups, stands))
    return [head for group in (groups if found > kept + 1e-9 else stands) for head in group]


def reorder_heads(config: FoldConfig, weights: Weights, owner: int, order: list[int]) -> None:
    """Put the owner's KV heads in this order, and with them the query heads that attend to them, in all layers of its
    group. The model computes what it computed before.
    """
    dim, whole = config.head_dim, config.qk_norm == "full"
    block = config.num_attention_heads // len(order) * dim
    kept = ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias", *(("k_norm.weight",) if whole else ()))
    asking = ("q_proj.weight", "q_proj.bias", *(("q_norm.weight",) if whole else ()))
    _apply_order(weights, owner, kept, order, dim)
    for layer in config.layout.readers_of(owner):
        _apply_order(weights, layer, asking, order, block)
        name = attention_name(layer, "o_proj.weight")
        weights[name] = weights[name].unflatten(1, (len(order), block))[:, order].flatten(1)


def _apply_order(weights: Weights, layer: int, parts: tuple[str, ...], order: list[int], block: int) -> None:
    for part in parts:
        name = attention_name(layer, part)
        if name in weights:
            weights[name] = weights[name].unflatten(0, (-1, block))[order].flatten(0, 1)


def _pool(config: FoldConfig, weights: Weights, owner: int, num_kv_heads: int) -> None:
    def mean(rows: Tensor) -> Tensor:
        """[K * D, ...] -> [fewer K * D, ...]."""
        return rows.unflatten(0, (num_kv_heads, -1, config.head_dim)).mean(dim=1).flatten(0, 1)

    gain = _whole_gain(config, weights, owner)
    for part in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        name = attention_name(owner, part)
        if name not in weights:
            continue
        rows = weights[name].float()
        pooled = mean(rows)
        if gain is not None and part.startswith("k"):
            by_row = gain.view(-1, *[1] * (rows.ndim - 1))
            pooled = divided(mean(rows * by_row), mean(by_row), pooled)
        weights[name] = pooled.to(weights[name].dtype)
    if gain is not None:
        name = attention_name(owner, "k_norm.weight")
        weights[name] = mean(weights[name].float()).to(weights[name].dtype)


def _key_rows(config: FoldConfig, weights: Weights, owner: int) -> Tensor:
    rows, gain = weights[attention_name(owner, "k_proj.weight")].float(), _whole_gain(config, weights, owner)
    return rows if gain is None else rows * gain[:, None]


def _whole_gain(config: FoldConfig, weights: Weights, owner: int) -> Tensor | None:
    """The gain of a key norm that runs over all heads, [K * D]; a gain that all heads share needs no pooling."""
    if config.qk_norm != "full":
        return None
    return gain_of(config, weights[attention_name(owner, "k_norm.weight")])


_KV_PARTS = (
    *("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"),
    *("k_norm.weight", "kv_norm.weight"),
)
"""All that an owner has and a reader has not."""


def drop_readers(weights: Weights, layout: KVLayout) -> None:
    """Readers lose their keys and values; the owner's stay as they are."""
    for layer in range(layout.num_layers):
        if not layout.is_owner(layer):
            for part in _KV_PARTS:
                weights.pop(attention_name(layer, part), None)


def average_groups(config: FoldConfig, weights: Weights, layout: KVLayout) -> None:
    """The owner of each group gets the mean of the group's key and value projections, as they act on the normed input
    before the gain: each layer's gain is folded in, and the owner's own is taken out again.

    Source: the authors' public replies to the reviews of arXiv 2405.12981 (mean pooling of the group's projections).
    Differs: gains are folded before averaging, so that what is averaged is comparable.
    """
    for owner in layout.owners:
        group = [layer for layer in layout.readers_of(owner) if attention_name(layer, "k_proj.weight") in weights]
        if len(group) < 2:
            continue
        for part in ("k_proj.weight", "v_proj.weight"):
            _average_projection(config, weights, group, part)
        for part in ("k_proj.bias", "v_proj.bias", "k_norm.weight"):
            name = attention_name(owner, part)
            if name in weights:
                rows = [weights[attention_name(layer, part)].float() for layer in group]
                weights[name] = torch.stack(rows).mean(dim=0).to(weights[name].dtype)


def _average_projection(config: FoldConfig, weights: Weights, group: list[int], part: str) -> None:
    """`group` opens with the owner."""
    name = attention_name(group[0], part)
    gains = [_input_gain(config, weights, layer) for layer in group]
    rows = [weights[attention_name(layer, part)].float() for layer in group]
    folded = [row if gain is None else row * gain for row, gain in zip(rows, gains, strict=True)]
    mean = torch.stack(folded).mean(dim=0)
    mean = mean if gains[0] is None else divided(mean, gains[0].expand_as(mean), rows[0])
    weights[name] = mean.to(weights[name].dtype)


def _input_gain(config: FoldConfig, weights: Weights, layer: int) -> Tensor | None:
    """The gain [C] of the norm before a layer's keys and values; None where there is none."""
    if config.kv_norm:
        return gain_of(config, weights[attention_name(layer, "kv_norm.weight")])
    if config.norm_placement == "post":
        return None
    return gain_of(config, weights[f"model.layers.{layer}.input_layernorm.weight"])
