"""The real compression of a training batch: what a cache would keep of each sequence at its end, from its decisions.

Letters: B rows, T tokens, K kv heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.base import Method


@dataclass(frozen=True, kw_only=True, slots=True)
class Reached:
    """Of one batch."""

    kept_O: Tensor
    """Share of tokens kept at the end, of each owner that has gates, mean over rows and heads, fp32."""
    weights_O: Tensor
    """KV heads x head dim of these owners: what an entry of each costs."""

    @property
    def kept(self) -> Tensor:
        """Share of tokens kept, weighted by bytes."""
        return (self.kept_O * self.weights_O).sum() / self.weights_O.sum()


@torch.no_grad()
def reached(decisions: Sequence[Tensor | None], layout: KVLayout, *, from_next: bool) -> Reached:
    """From the decisions [B, K, T] of each owner, ascending, None where it has no gates; no row is padded. Owners without
    gates don't count: no training changes what they keep.
    """
    kept, weights = [], []
    for owner, one in zip(layout.owners, decisions, strict=True):
        if one is not None:
            share = kept_tokens(one, layout.time_of(owner), from_next=from_next) / one.shape[2]
            kept.append(share.mean())
            weights.append(one.shape[1] * layout.layers[owner].head_dim)
    return Reached(
        kept_O=torch.stack(kept), weights_O=torch.tensor(weights, dtype=torch.float32, device=kept[0].device)
    )


def kept_tokens(decisions_BKT: Tensor, spec: Method, *, from_next: bool) -> Tensor:
    """Entries that each head holds after the last token, fp32 [B, K]."""
    fired = (decisions_BKT > 0.5).float()
    tokens = fired.shape[2]
    return tokens - fired[:, :, spec.governing(tokens, from_next)].sum(dim=2)
