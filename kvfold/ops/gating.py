"""What a learned gate tells a view about the tokens of one call, the shift from a decision to the token it governs, and DMC's
merging as arithmetic: each token's entry as the weighted mean of the newest tokens of its segment, for a whole call.

How the logits come about (a freed channel, an adapter, noise) is the model's business: models/gates.py. A segment begins at a
token that appends (alpha 0) and goes on through those that merge (alpha 1); soft alphas weigh in between.
Letters: B rows, T tokens of this call, H query heads, K kv heads, D head dim (in merging any channels: k and v side by side),
P tokens held from before the call, W window, N chunks of a row, Q tokens of a chunk.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

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

    def at(self, row: Tensor, column: Tensor | None) -> "Gates":
        """Those of some rows of a call, see `picked`."""
        names = ("alpha_BTK", "log_stay_BTK", "weight_BTK", "outputs_BTKF")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self, **{name: picked(one, row, column) for name, one in given.items()})


def picked(x: Tensor, row: Tensor | int, column: Tensor | None) -> Tensor:
    """Of some rows of x [B, T, ...] all tokens, or where columns are given one token of each, [B', 1, ...]."""
    return x[row] if column is None else x[row, column].unsqueeze(1)


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


_LEAST_CHUNK = 32
"""Tokens averaged by one product of matrices; of its 32 + W - 1 columns each row uses W."""


def pooled(
    x_BTKD: Tensor, weight_BTK: Tensor, alpha_BTK: Tensor, window: int | None, past: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The entry as it stands after each token, [B, T, K, D] in x's dtype: S_t / z_t, summed in fp32.

        S_t = sum over j < window of (alpha_{t-j+1} ... alpha_t) weight_{t-j} x_{t-j}     and z_t alike without x.

    `alpha_BTK`: in [0, 1]. The first token's counts only towards `past`. `window` None = all tokens of the segment.
    `past`: what a segment still open holds from before the call (see `open_entries`): weighted sums [B, P, K, D] and weights
    [B, P, K], newest last, 0 where there is nothing.
    A token of weight 0 that has nothing to average gives 0. So padding before the first real token may stay where it is, with
    weight 0. Padding anywhere else takes a place in the window: put it behind the row first (`gating.real_first`).

    Memory for the gradient: some 5 x T x window numbers a head and one or two copies of x; without a window two to three of x.

    Source: arXiv 2403.09636, section 3 (partial sums kept as keys and values in training).
    Differs: summed in fp32 whatever the dtype.
    """
    wide = torch.promote_types(x_BTKD.dtype, torch.float32)
    x, weight, alpha = (one.to(wide) for one in (x_BTKD, weight_BTK, alpha_BTK))
    held = 0 if past is None else past[1].shape[1]
    with torch.autocast(x.device.type, enabled=False):
        if window is None or window >= held + x.shape[1]:
            found = _pooled_all(x, weight, alpha, past)
        else:
            found = _pooled_window(x, weight, alpha, window, past)
    return found.to(x_BTKD.dtype)


def pooled_real(
    x_BTKD: Tensor, weight_BTK: Tensor, alpha_BTK: Tensor, window: int | None, real_BT: Tensor | None,
    past: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """`pooled` over the real tokens of each row; what stands at padding is of no meaning, but finite."""
    if real_BT is None:
        return pooled(x_BTKD, weight_BTK, alpha_BTK, window, past)
    # Padding goes behind, where it takes no place in a window; there it opens entries of its own.
    order, back = real_first(real_BT)
    pad = ~real_BT[..., None]
    weight, alpha = weight_BTK.masked_fill(pad, 1.0), alpha_BTK.masked_fill(pad, 0.0)
    found = pooled(reordered(x_BTKD, order), reordered(weight, order), reordered(alpha, order), window, past)
    return reordered(found, back)


def pooled_reference(
    x_BTKD: Tensor, weight_BTK: Tensor, alpha_BTK: Tensor, window: int | None, past: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The judge of `pooled`: one token after the other, each sum anew."""
    sums, weights, alphas = x_BTKD * weight_BTK[..., None], weight_BTK, alpha_BTK
    if past is not None:
        sums, weights = torch.cat((past[0], sums), dim=1), torch.cat((past[1], weights), dim=1)
        alphas = torch.cat((torch.ones_like(past[1]), alphas), dim=1)
    found, total = [], sums.shape[1]
    for token in range(total - x_BTKD.shape[1], total):
        chain, sum_BKD, sum_BK = torch.ones_like(weights[:, 0]), 0.0, 0.0
        oldest = -1 if window is None else max(-1, token - window)
        for other in range(token, oldest, -1):
            sum_BKD = sum_BKD + chain[..., None] * sums[:, other]
            sum_BK = sum_BK + chain * weights[:, other]
            chain = chain * alphas[:, other]
        found.append(sum_BKD / torch.where(sum_BK > 0, sum_BK, 1.0)[..., None])
    return torch.stack(found, dim=1)


def open_entries(
    x_BTKD: Tensor, weight_BTK: Tensor, alpha_BTK: Tensor, window: int | None, past: tuple[Tensor, Tensor] | None = None,
    length_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the next call needs as `past`, fp32: weighted sums [B, P, K, D] and weights [B, P, K] of the segment open at the
    end of each row, newest last, 0 where there is nothing. P = window, or 1 (the sum of all) without a window.

    Arguments as in `pooled`; alphas 0 or 1. `length_B`: int64, tokens of each row that count, those behind being padding.
    """
    sums, weights = x_BTKD.float() * weight_BTK.float().unsqueeze(-1), weight_BTK.float()
    merges = alpha_BTK > 0.5
    if length_B is not None:
        counts = (torch.arange(sums.shape[1], device=sums.device) < length_B[:, None])[..., None]
        sums, weights, merges = sums * counts.unsqueeze(-1), weights * counts, merges | ~counts
    # A token is in the open segment when every later one merged: no append stands behind it.
    behind = F.pad((~merges).flip(1).cumsum(dim=1).flip(1), (0, 0, 0, 1))
    if past is not None:
        held = past[1].shape[1]
        sums, weights = torch.cat((past[0].float(), sums), dim=1), torch.cat((past[1].float(), weights), dim=1)
        behind = torch.cat((behind[:, :1].expand(-1, held, -1), behind), dim=1)
    is_open = behind[:, 1:] == 0
    sums, weights = torch.where(is_open.unsqueeze(-1), sums, 0.0), torch.where(is_open, weights, 0.0)
    if window is None:
        return sums.sum(dim=1, keepdim=True), weights.sum(dim=1, keepdim=True)
    sums, weights = F.pad(sums, (0, 0, 0, 0, window, 0)), F.pad(weights, (0, 0, window, 0))
    stop = sums.shape[1] - x_BTKD.shape[1] + (x_BTKD.shape[1] if length_B is None else length_B[:, None])
    index = torch.arange(-window, 0, device=sums.device)[None] + stop
    index = index.expand(sums.shape[0], -1)[..., None]
    return (
        sums.gather(1, index[..., None].expand(-1, -1, *sums.shape[2:])),
        weights.gather(1, index.expand(-1, -1, weights.shape[2])),
    )


def _pooled_window(x: Tensor, weight: Tensor, alpha: Tensor, window: int, past: tuple[Tensor, Tensor] | None) -> Tensor:
    """Each token's share of each entry first, small tensors without channels; then the means, as products of matrices."""
    before = window - 1
    values, weights = F.pad(x, (0, 0, 0, 0, before, 0)), F.pad(weight, (0, 0, before, 0))
    factor = weights
    if past is not None and before:
        sums, old = (one[:, -before:].to(x.dtype) for one in past)
        room = before - old.shape[1]
        values = torch.cat((F.pad(sums, (0, 0, 0, 0, room, 0)), x), dim=1)
        weights = torch.cat((F.pad(old, (0, 0, room, 0)), weight), dim=1)
        factor = F.pad(weight, (0, 0, before, 0), value=1.0)  # held sums are weighted already
    alphas = F.pad(alpha, (0, 0, before, 0), value=1.0)
    tokens, chain = x.shape[1], torch.ones_like(alpha)
    chains = [chain]
    for back in range(before):
        chain = chain * alphas[:, before - back : before - back + tokens]
        chains.append(chain)
    chain_BTKW = torch.stack(chains[::-1], dim=-1)
    share_BTKW = mass_BTKW = chain_BTKW * weights.unfold(1, window, 1)
    if factor is not weights:
        share_BTKW = chain_BTKW * factor.unfold(1, window, 1)
    total = mass_BTKW.sum(dim=-1, keepdim=True)
    share_BTKW = share_BTKW / torch.where(total > 0, total, 1.0)
    return _banded_product(share_BTKW, values)


def _banded_product(share_BTKW: Tensor, values: Tensor) -> Tensor:
    """sum over w of share[t, w] values[t + w], [B, T, K, D]; values [B, T + W - 1, K, D]."""
    batch, tokens, heads, window = share_BTKW.shape
    chunk = max(_LEAST_CHUNK, window)
    count, width = -(-tokens // chunk), chunk + window - 1
    # Each row of shares with as many zeros behind it, read on one place shorter, stands one place further right than the last.
    share = F.pad(share_BTKW, (0, 0, 0, 0, 0, count * chunk - tokens)).view(batch, count, chunk, heads, window)
    flat = F.pad(share.transpose(2, 3), (0, chunk)).flatten(3)[..., : chunk * width]
    band = flat.view(batch, count, heads, chunk, width)
    # A chunk's values and the first of the next one's: slices, whose gradient is far cheaper than `unfold`'s.
    values = F.pad(values, (0, 0, 0, 0, 0, (count + 1) * chunk - values.shape[1])).unflatten(1, (count + 1, chunk))
    reached = torch.cat((values[:, :-1], values[:, 1:, : window - 1]), dim=2)
    found = band @ reached.transpose(2, 3)
    return found.transpose(2, 3).flatten(1, 2)[:, :tokens]


def _pooled_all(x: Tensor, weight: Tensor, alpha: Tensor, past: tuple[Tensor, Tensor] | None) -> Tensor:
    """Without a window: one recurrence over the sums, the weights being one more channel."""
    terms = torch.cat((x * weight.unsqueeze(-1), weight.unsqueeze(-1)), dim=-1)
    if past is not None:
        held = torch.cat((past[0].sum(dim=1), past[1].sum(dim=1).unsqueeze(-1)), dim=-1).to(x.dtype).unsqueeze(1)
        terms, alpha = torch.cat((held, terms), dim=1), F.pad(alpha, (0, 0, 1, 0))
    sums = _Recurrence.apply(terms, alpha)[:, -x.shape[1] :]
    mass = sums[..., -1:]
    return sums[..., :-1] / torch.where(mass > 0, mass, 1.0)


class _Recurrence(torch.autograd.Function):
    """S_t = alpha_t S_{t-1} + u_t, S_0 = u_0, for all t at once: passes that double how far back each S_t reaches.

    The gradient is the same recurrence from the end, so only the result is kept for it.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, terms_BTKD: Tensor, alpha_BTK: Tensor) -> Tensor:
        sums = _doubled(terms_BTKD, alpha_BTK)
        ctx.save_for_backward(sums, alpha_BTK)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_BTKD: Tensor) -> tuple[Tensor, Tensor]:
        sums, alpha = ctx.saved_tensors
        later = F.pad(alpha[:, 1:], (0, 0, 0, 1)).flip(1)
        grad_terms = _doubled(grad_BTKD.flip(1), later).flip(1)
        grad_alpha = F.pad((grad_terms[:, 1:] * sums[:, :-1]).sum(dim=-1), (0, 0, 1, 0))
        return grad_terms, grad_alpha


def _doubled(terms_BTKD: Tensor, alpha_BTK: Tensor) -> Tensor:
    """The recurrence in log2(T) passes: sums of the newest m terms, and the alphas' products over them."""
    sums, chain, reach = terms_BTKD, alpha_BTK, 1
    while reach < sums.shape[1]:
        sums = torch.cat((sums[:, :reach], sums[:, reach:] + chain[:, reach:, :, None] * sums[:, :-reach]), dim=1)
        chain = torch.cat((chain[:, :reach], chain[:, reach:] * chain[:, :-reach]), dim=1)
        reach *= 2
    return sums
