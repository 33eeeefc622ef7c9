"""What a learned gate tells a view about the tokens of one call, and the shift from a decision to the token it governs.

How the logits come about (a freed channel, an adapter, noise) is the model's business: models/gates.py.
Letters: B rows, T tokens of this call, H query heads, K kv heads, D head dim.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

STAY_NEVER = -1e30
"""log(1 - alpha) of a hard decision to merge or to evict: as good as minus infinity, and its gradient is no NaN."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gates:
    """The decisions of one layer, as computed at each token, and the channel that they freed."""

    alpha_BTK: Tensor | None = None
    """fp32 in [0, 1], 0 or 1 where decisions are hard: how much the token merges (DMC) or is marked (DMS). None in a
    reader, and where gates are off."""
    log_stay_BTK: Tensor | None = None
    """log(1 - alpha), fp32."""
    weight_BTK: Tensor | None = None
    """Importance in a merge, fp32; DMC alone."""
    from_next: bool = False
    """A token is governed by the decision computed at the token after it."""
    q_keep_HD: Tensor | None = None
    """Factor of q's channels before and after rotary positions; None = 1."""
    k_keep_KD: Tensor | None = None
    """The same of k's."""
    outputs_BTKF: Tensor | None = None
    """What an adapter gives beside its decision, fp32; None where it gives nothing more."""
    heads_KP: Tensor | None = None
    """Numbers that an adapter holds for each head, whatever the token, fp32; None where it holds none."""

    def rows(self, index: Tensor) -> "Gates":
        """Those of some rows of the call."""
        return replace(self, **{name: getattr(self, name)[index] for name in self._tokens()})

    def column(self, column_B: Tensor) -> "Gates":
        """Those of one token of each row."""
        row = torch.arange(column_B.shape[0], device=column_B.device)
        return replace(self, **{name: getattr(self, name)[row, column_B].unsqueeze(1) for name in self._tokens()})

    def _tokens(self) -> list[str]:
        names = ("alpha_BTK", "log_stay_BTK", "weight_BTK", "outputs_BTKF")
        return [name for name in names if getattr(self, name) is not None]


def next_real(real_BT: Tensor | None, tokens: int, device: torch.device) -> Tensor:
    """Column of the next real token after each column, int64 [B or 1, T]; T where none follows."""
    column = torch.arange(tokens, device=device)[None]
    if real_BT is None:
        return column + 1
    here = torch.where(real_BT, column, tokens)
    return F.pad(here.flip(1).cummin(dim=1).values.flip(1)[:, 1:], (0, 1), value=tokens)


def from_next(x_BTK: Tensor, real_BT: Tensor | None, last: float) -> Tensor:
    """x as computed at the real token after each token; `last` where none follows."""
    if real_BT is None:
        return F.pad(x_BTK[:, 1:], (0, 0, 0, 1), value=last)
    index = next_real(real_BT, x_BTK.shape[1], x_BTK.device)
    return F.pad(x_BTK, (0, 0, 0, 1), value=last).gather(1, index[..., None].expand(-1, -1, x_BTK.shape[2]))


def first_real(real_BT: Tensor | None, tokens: int, device: torch.device, count: int = 1) -> Tensor:
    """Which columns hold the first `count` real tokens of their row, bool [B or 1, T]."""
    if real_BT is None:
        return torch.arange(tokens, device=device)[None] < count
    return real_BT & (real_BT.long().cumsum(dim=1) <= count)


def real_first(real_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The order that puts each row's real tokens before its padding, and the order back; int64 [B, T]."""
    order = (~real_BT).to(torch.uint8).argsort(dim=1, stable=True)
    return order, order.argsort(dim=1)


def reordered(x: Tensor, order_BT: Tensor) -> Tensor:
    """x [B, T, ...] with its tokens in another order."""
    index = order_BT.view(*order_BT.shape, *[1] * (x.ndim - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))
