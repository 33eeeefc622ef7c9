"""Reading rows of text through the cache, the way a method is meant to be fed, and watching what the cache keeps.

Prefix methods are read in calls of many tokens, steps methods one token a call (a call is a step of theirs).
Letters: B rows, T tokens of a row, C model width.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvfold.cache.hf import FoldCache, Usage
from kvfold.eval.folding import calls, folded_cache
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.decoder import FoldForCausalLM

OnStates = Callable[[Tensor, int], None]
"""Takes states [B, t, C] of a call's tokens and the column of the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a cache held while and after rows of one length were read."""

    allocated_bytes: int
    """Held by all rows at the end."""
    full_bytes: int
    """The same tokens with nothing folded along time and bits."""
    usage: Usage
    """What the allocated bytes are used for."""
    kept_share: tuple[float, ...]
    """Of the tokens seen, those kept, weighted by bytes: after each call, mean over rows."""
    seen_tokens: tuple[int, ...]
    """Tokens of a row that had been seen then."""
    seconds: float
    """Spent in the model."""

    @property
    def compression(self) -> float:
        """Tokens seen / tokens kept at the end."""
        return 1 / self.kept_share[-1]

    @property
    def compression_over_time(self) -> float:
        """Mean over the tokens of tokens seen / tokens kept; between two calls the number kept is taken as growing evenly."""
        total, before, kept_before = 0.0, 0, 0.0
        for seen, share in zip(self.seen_tokens, self.kept_share, strict=True):
            kept = share * seen
            for token in range(before + 1, seen + 1):
                total += token / (kept_before + (kept - kept_before) * (token - before) / (seen - before))
            before, kept_before = seen, kept
        return total / before


def read_rows(
    model: FoldForCausalLM, layout: KVLayout, ids_BT: Tensor, on_states: OnStates, *, call_tokens: int | None = None
) -> Reading:
    """Feed the rows through a fresh cache of this layout; every call's states go to `on_states`.

    `call_tokens`: tokens a row of one call; a steps method takes one as soon as something may be dropped.
    """
    shares, seen, seconds = [], [], 0.0
    weights = entry_bytes(layout, model.dtype.itemsize, model.device)
    with folded_cache(model, layout, ids_BT.shape[0]) as cache:
        for start, stop in calls(layout, ids_BT.shape[1], call_tokens):
            call = ids_BT[:, start:stop]
            begun = _now(model.device)
            hidden = model.model(call, past_key_values=cache, use_cache=True).last_hidden_state
            seconds += _now(model.device) - begun
            on_states(hidden, start)
            seen.append(start + call.shape[1])
            shares.append(kept_shares(cache, weights).mean())
        held = {"allocated_bytes": cache.allocated_bytes, "full_bytes": cache.full_bytes, "usage": cache.usage}
    return Reading(**held, kept_share=tuple(torch.stack(shares).tolist()), seen_tokens=tuple(seen), seconds=seconds)


def kept_shares(cache: FoldCache, weights_O: Tensor) -> Tensor:
    """Of the tokens that each row has seen, those kept, weighted by `entry_bytes`; fp64 [B]. A tensor, since reading it off at
    every step would stop a GPU.
    """
    kept_OBK = cache.kept_tokens
    present = (kept_OBK >= 0) * weights_O[:, None, None]
    return (kept_OBK * present).sum(dim=(0, 2)) / (cache.seen_tokens * present.sum(dim=(0, 2)))


def padded(
    rows: Sequence[Sequence[int]], device: torch.device, *, flush: Literal["left", "right"]
) -> tuple[Tensor, Tensor]:
    """Rows of several lengths side by side: ids and a mask, 1 at real tokens, int64 [B, T]. What stands at padding is
    never read. `flush` right: all end in the last column.
    """
    longest = max(map(len, rows))
    ids = torch.zeros((len(rows), longest), dtype=torch.int64, device=device)
    real = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        here = slice(0, len(tokens)) if flush == "left" else slice(longest - len(tokens), longest)
        ids[row, here] = torch.tensor(tokens, dtype=torch.int64, device=device)
        real[row, here] = 1
    return ids, real


def entry_bytes(layout: KVLayout, model_bytes: int, device: torch.device) -> Tensor:
    """Bytes of K and V of one entry of each owner, fp64 [owners]."""
    sizes = [
        sum(layout.bits_of(owner).slot_bytes(layout.layers[owner].head_dim, model_bytes)) for owner in layout.owners
    ]
    return torch.tensor(sizes, dtype=torch.float64, device=device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
