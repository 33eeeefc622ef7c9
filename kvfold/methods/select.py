"""Choosing which entries stay by their score: the one piece that several methods share.

Letters: B rows, K kv heads (1 where all heads of a layer decide together), E entries.
"""

import torch
from torch import Tensor

from kvfold.methods.budget import Budget


def budget_tokens(budget: Budget, seen_B: Tensor) -> Tensor:
    """Tokens that each row may keep, int64 [B]: `Budget.tokens` for many rows at once."""
    if budget.percent is None:
        return torch.full_like(seen_B, budget.fixed)
    return ((budget.percent * seen_B + 99) // 100).clamp(min=1)


def evict_lowest(score_BKE: Tensor, position_BKE: Tensor, candidate_BKE: Tensor, room_B: Tensor) -> Tensor:
    """bool [B, K, E]: the candidates that must go so that `room_B` of them are left: those of the lowest score, and of
    equal scores the newer ones.
    """
    surplus_BK = (candidate_BKE.sum(dim=-1) - room_B[:, None]).clamp(min=0)
    most = int(surplus_BK.max()) if surplus_BK.numel() else 0
    if most == 0:
        return torch.zeros_like(candidate_BKE)
    score = score_BKE.masked_fill(~candidate_BKE, torch.inf)
    if most == 1:
        lowest = candidate_BKE & (score == score.amin(dim=-1, keepdim=True))
        newest = position_BKE.masked_fill(~lowest, -1)
        return lowest & (newest == newest.amax(dim=-1, keepdim=True)) & (surplus_BK > 0).unsqueeze(-1)
    by_age = position_BKE.masked_fill(~candidate_BKE, -1).argsort(dim=-1, descending=True, stable=True)
    by_score = score.gather(-1, by_age).argsort(dim=-1, stable=True)
    order = by_age.gather(-1, by_score)
    rank = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.zeros_like(candidate_BKE).scatter(-1, order, rank < surplus_BK.unsqueeze(-1)) & candidate_BKE
