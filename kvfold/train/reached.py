"""The real compression of a training batch: what a cache would keep of each sequence at its end, from its decisions.

Letters: B rows, T tokens, K kv heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.base import Method
from kvfold.train.schedules import entry_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Reached:
    """Of one batch."""

    kept_O: Tensor
    """Share of tokens kept at the end, of each owner that has gates, mean over rows and heads, fp32."""
    kept: Tensor
    """Share of tokens kept, of all owners, weighted by bytes."""


@torch.no_grad()
def reached(decisions: Sequence[Tensor | None], layout: KVLayout, *, from_next: bool, model_bytes: int = 2) -> Reached:
    """From the decisions [B, K, T] of each owner, ascending, None where it has no gates; no row is padded. An owner without
    gates keeps what its method says. `model_bytes`: see `Retention.of`.
    """
    tokens = next(one.shape[2] for one in decisions if one is not None)
    gated, shares, sizes = [], [], []
    for owner, one in zip(layout.owners, decisions, strict=True):
        method = layout.time_of(owner)
        if one is not None:
            shares.append((kept_tokens(one, method, from_next=from_next) / tokens).mean())
            gated.append(shares[-1])
        else:
            shares.append(torch.tensor(method.max_kept(tokens) / tokens))
        sizes.append(entry_bytes(layout, owner, model_bytes))
    kept_O = torch.stack(gated)
    weights = torch.tensor(sizes, dtype=torch.float32, device=kept_O.device)
    all_kept = torch.stack([one.to(kept_O.device) for one in shares])
    return Reached(kept_O=kept_O, kept=(all_kept * weights).sum() / weights.sum())


def kept_tokens(decisions_BKT: Tensor, spec: Method, *, from_next: bool) -> Tensor:
    """Entries that each head holds after the last token, fp32 [B, K]."""
    fired = (decisions_BKT > 0.5).float()
    tokens = fired.shape[2]
    return tokens - fired[:, :, spec.governing(tokens, from_next)].sum(dim=2)
