"""From another family's weights to ours, and back. Names are transformers' own; only fused projections are cut apart.

Tensors are handed over, not copied, so that a model never lies in memory twice.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from kvfold.models.config import FoldConfig


def fold_weights(config: FoldConfig, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict out of a state dict of `config.family`, which is emptied as it goes.

    Parts of a fused projection are copies: views of one storage would be saved and trained as one.
    """
    ours = {}
    for name in list(theirs):
        tensor = theirs.pop(name)
        stem, fused, kind = _split_name(name)
        if fused is None:
            ours[name] = tensor
            continue
        sizes = _part_rows(config, fused)
        for (part, _), rows in zip(_FUSED[fused], tensor.split([rows for _, rows in sizes]), strict=True):
            ours[f"{stem}{part}.{kind}"] = rows.clone()
    return ours


def family_weights(ours: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The state dict of a family's own model, whose `names` say what it fuses, out of ours: `fold_weights` undone."""
    theirs = {}
    for name in names:
        stem, fused, kind = _split_name(name)
        if fused is None:
            theirs[name] = ours[name]
        else:
            theirs[name] = torch.cat([ours[f"{stem}{part}.{kind}"] for part, _ in _FUSED[fused]])
    return theirs


_FUSED = {
    "qkv_proj": (
        ("q_proj", "num_attention_heads"),
        ("k_proj", "num_key_value_heads"),
        ("v_proj", "num_key_value_heads"),
    ),
    "gate_up_proj": (("gate_proj", None), ("up_proj", None)),
}
"""A fused projection -> its parts from the top, and the attribute that counts a part's heads (None: the feed-forward)."""


def _split_name(name: str) -> tuple[str, str | None, str]:
    """`...self_attn.qkv_proj.weight` -> its stem, the fused projection's name or None, and weight or bias."""
    stem, _, kind = name.rpartition(".")
    head, _, module = stem.rpartition(".")
    return f"{head}.", module if module in _FUSED else None, kind


def _part_rows(config: FoldConfig, fused: str) -> list[tuple[str, int]]:
    return [
        (part, config.intermediate_size if heads is None else getattr(config, heads) * config.head_dim)
        for part, heads in _FUSED[fused]
    ]
