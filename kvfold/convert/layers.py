"""Sharing keys and values between layers of a model's weights: what the owner of a group gets, and what readers lose.

Everything here works on a state dict in place, one tensor at a time in fp32. Letters: C model width.
"""

import torch
from torch import Tensor

from kvfold.convert.heads import Weights, attention_name, divided, gain_of
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.config import FoldConfig

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
