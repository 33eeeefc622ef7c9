"""Attention of a long call, a block of queries at a time: each block looks only at the entries that it sees.

An entry lives from its own position to that of the last query that sees it. Where lives end (a window, an eviction, a merge)
the entries that a block sees are few: they are gathered side by side, and no mask of queries by all entries is ever made.
Letters: B sequences, T queries, E entries, M entries that a block sees, H query heads, K kv heads, D head dim.
"""

import torch
from torch import Tensor

from kvfold.ops.attention import dense_attention, lifespans, serving

FOREVER = 2**40
"""The last query of an entry that stays."""
BLOCK = 128
"""Queries that look together: fewer, and gathering shows; more, and a block sees what half of its queries don't."""


def lifespan_attention(
    q_BTHD: Tensor, k_BEKD: Tensor, v_BEKD: Tensor, *, query_BT: Tensor, position_BKE: Tensor, last_BKE: Tensor,
    scale: float, softcap: float | None = None, bias_BKE: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention output [B, T, H, D]; a query at position t sees the entries with position <= t <= last. 0 where it sees none.

    `query_BT`: -1 at padding, otherwise growing. `position_BKE`: -1 where there is no entry. `bias_BKE`: added to the logits of
    an entry after scale and softcap.
    """
    library = serving(q_BTHD, k_BEKD, v_BEKD, bias_BKE)
    if library is not None:
        return lifespans(
            library, q_BTHD, k_BEKD, v_BEKD, query_BT=query_BT, position_BKE=position_BKE, last_BKE=last_BKE, scale=scale,
            softcap=softcap, bias_BKE=bias_BKE,
        )  # fmt: skip
    outs = []
    for start in range(0, q_BTHD.shape[1], BLOCK):
        query = query_BT[:, start : start + BLOCK]
        real = query >= 0
        first = query.masked_fill(~real, FOREVER).amin(dim=1)[:, None, None]
        newest = query.amax(dim=1)[:, None, None]
        wanted_BKE = (position_BKE >= 0) & (position_BKE <= newest) & (last_BKE >= first)
        index_BKM, there_BKM = chosen_entries(wanted_BKE)
        position, last = position_BKE.gather(2, index_BKM), last_BKE.gather(2, index_BKM)
        at = query[:, None, :, None]
        mask = there_BKM.unsqueeze(2) & (position.unsqueeze(2) <= at) & (last.unsqueeze(2) >= at)
        if not bool(real.all()):
            # A softmax over nothing has no gradient that is a number, whatever becomes of its output.
            mask = mask | ~real[:, None, :, None]
        k, v = (_gathered(x, index_BKM) for x in (k_BEKD, v_BEKD))
        bias = None if bias_BKE is None else bias_BKE.gather(2, index_BKM)
        block = q_BTHD[:, start : start + BLOCK]
        out = dense_attention(block, k, v, scale=scale, softcap=softcap, mask=mask, bias_BKE=bias)
        outs.append(out.masked_fill(~real[:, :, None, None], 0))
    return torch.cat(outs, dim=1)


def lifespan_reference(
    q_BTHD: Tensor, k_BEKD: Tensor, v_BEKD: Tensor, *, query_BT: Tensor, position_BKE: Tensor, last_BKE: Tensor,
    scale: float, softcap: float | None = None, bias_BKE: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The judge: one query of one head at a time."""
    out = torch.zeros_like(q_BTHD)
    group = q_BTHD.shape[2] // k_BEKD.shape[2]
    for row, column in (query_BT >= 0).nonzero().tolist():
        at = int(query_BT[row, column])
        for head in range(q_BTHD.shape[2]):
            kv_head = head // group
            position, last = position_BKE[row, kv_head], last_BKE[row, kv_head]
            seen = (position >= 0) & (position <= at) & (last >= at)
            if not bool(seen.any()):
                continue
            logits = k_BEKD[row, seen, kv_head] @ q_BTHD[row, column, head] * scale
            if softcap is not None:
                logits = torch.tanh(logits / softcap) * softcap
            if bias_BKE is not None:
                logits = logits + bias_BKE[row, kv_head, seen]
            out[row, column, head] = logits.softmax(dim=0) @ v_BEKD[row, seen, kv_head]
    return out


def chosen_entries(wanted_BKE: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [B, K, M] of the wanted entries of each head in their order, and which of them are there: heads differ."""
    place = wanted_BKE.cumsum(dim=2) - 1
    count = wanted_BKE.sum(dim=2)
    most = max(1, int(count.max()))
    # What is not wanted goes to a place behind all others.
    place = place.masked_fill(~wanted_BKE, most)
    entry = torch.arange(wanted_BKE.shape[2], device=place.device).expand_as(place)
    index = entry.new_zeros((*place.shape[:2], most + 1)).scatter_(2, place, entry)[..., :most]
    return index, torch.arange(most, device=place.device) < count.unsqueeze(-1)


def _gathered(x_BEKD: Tensor, index_BKM: Tensor) -> Tensor:
    """The entries of each head, [B, M, K, D] as `dense_attention` takes them."""
    batch, entries, heads, dim = x_BEKD.shape
    row = torch.arange(batch, device=x_BEKD.device)[:, None, None]
    head = torch.arange(heads, device=x_BEKD.device)[:, None]
    flat = (row * entries + index_BKM) * heads + head
    return x_BEKD.reshape(-1, dim)[flat].transpose(1, 2)
