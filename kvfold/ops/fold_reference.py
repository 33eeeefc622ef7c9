"""fold, slow and obvious: what leaves the window is merged into the most similar kept entry, else dropped. It judges every
fast form. One KV stream (one sequence, one KV head) at a time, its blocks in turn.

Letters: B rows, T tokens, H query heads, K kv heads, G = H // K, D head dim, N leavers of one border.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvfold.errors import UserError
from kvfold.ops.folding import LARGEST_LOG_WEIGHT


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldRule:
    """When tokens leave, and what becomes of them.

    Source: ours, on top of the delayed eviction of arXiv 2506.05345.
    Differs: tokens leave at the borders of a grid instead of one at a time, and are merged instead of dropped where something
    similar stays.
    """

    delay: int
    """Tokens behind a query that it sees whether marked or not."""
    grid: int
    """Tokens between two borders; before query t = grid * m attends, marked tokens at positions below t - delay leave."""
    threshold: float | None
    """Least similarity at which a token is merged; None = every token that leaves is dropped."""
    reach: int = 512
    """A token merges into an entry at most so many positions older."""
    merges_keys: bool = False
    """Average keys as well as values; the bias is then the entropy form."""
    b: float = 0.0
    """Added to the log of every weight."""
    c: float = 0.0
    """Times (similarity - 1), added to the log of every weight."""
    mass: float = 1.0
    """Factor of the bias that an entry's mass gives its logit."""
    as_stored: bool = False
    """Round s, and at each border the bias, to fp16, as a store does."""

    def __post_init__(self) -> None:
        for name, least in (("delay", 0), ("grid", 1), ("reach", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} {getattr(self, name)}: at least {least}: use a larger one")


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldTrace:
    """What happened to the tokens of one call, [B, K, T] each."""

    left_at: Tensor
    """The query before which the token left; T where it stayed. int64."""
    slot: Tensor
    """The position of the entry that it was merged into; -1 where it was dropped or stayed. int64."""
    mass: Tensor
    """z of the token's entry at the end; 1 where nothing was merged into it. In the dtype of the keys."""

    @property
    def kept_BKT(self) -> Tensor:
        """Entries that a query at each position sees, itself included."""
        tokens = self.left_at.shape[-1]
        query = torch.arange(tokens, device=self.left_at.device)
        gone = (self.left_at.unsqueeze(-1) <= query).sum(dim=-2)
        return query + 1 - gone


def fold_attention_reference(
    q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, marked_BTK: Tensor, s_BTK: Tensor, rule: FoldRule, *,
    scale: float, softcap: float | None = None, heads_KP: Tensor | None = None,
) -> tuple[Tensor, FoldTrace]:  # fmt: skip
    """Attention output [B, T, H, D] of a whole text without padding from position 0, and what became of its tokens.

    q and k are rotated. `marked_BTK`: bool, the token leaves once it is out of the delay. `s_BTK`: log of the attention that a
    token is expected to receive after its delay. `heads_KP`: b, c and mass of each KV head, in place of the rule's.

    A merge takes u = exp(s - s of the entry + b + c (similarity - 1)) as the token's mass relative to the token that opened
    the entry: value = (z value + sum of u v) / (z + sum of u), z = z + sum of u, and the entry's logit gets mass * log z after
    any softcap. To first order that is what the tokens would have given together, since attention weights are proportional
    to u. With `merges_keys` keys are averaged alike, and log z becomes the entropy form log z - sum of (u log u) / z.
    """
    rows, tokens, heads = k_BTKD.shape[:3]
    out = torch.empty_like(q_BTHD).unflatten(2, (heads, -1))
    q = q_BTHD.unflatten(2, (heads, -1))
    left_at = torch.full((rows, heads, tokens), tokens)
    slot = torch.full((rows, heads, tokens), -1)
    mass = k_BTKD.new_ones((rows, heads, tokens))
    for row in range(rows):
        for head in range(heads):
            own = rule
            if heads_KP is not None:
                own = replace(rule, **dict(zip(("b", "c", "mass"), heads_KP[head], strict=True)))
            stream = _Stream(
                k_BTKD[row, :, head], v_BTKD[row, :, head], marked_BTK[row, :, head], s_BTK[row, :, head], own
            )
            for start in range(0, tokens, rule.grid):
                stop = min(start + rule.grid, tokens)
                stream.leave(before=start)
                out[row, start:stop, head] = stream.attend(q[row, start:stop, head], start, scale, softcap)
            left_at[row, head], slot[row, head], mass[row, head] = stream.left_at, stream.slot, stream.z
    return out.flatten(2, 3), FoldTrace(left_at=left_at, slot=slot, mass=mass)


class _Stream:
    """The entries of one stream, by the position of the token that opened them. Every token opens one; it goes when it leaves."""

    def __init__(self, k_TD: Tensor, v_TD: Tensor, marked_T: Tensor, s_T: Tensor, rule: FoldRule):
        self._k, self._v, self._marked, self._rule = k_TD.clone(), v_TD.clone(), marked_T, rule
        self._s = s_T.half().to(s_T.dtype) if rule.as_stored else s_T
        tokens = k_TD.shape[0]
        self._position = torch.arange(tokens)
        self.z = k_TD.new_ones(tokens)
        self._u_log_u = k_TD.new_zeros(tokens)
        self.left_at = torch.full((tokens,), tokens)
        self.slot = torch.full((tokens,), -1)

    def leave(self, *, before: int) -> None:
        """All that leaves at one border, looked up in the entries as they stand before it."""
        here = self.left_at > before
        leavers = (self._marked & here & (self._position < before - self._rule.delay)).nonzero()[:, 0]
        if not len(leavers):
            return
        self.left_at[leavers] = before
        if self._rule.threshold is None:
            return
        anchor, similarity = self._most_similar(leavers)
        merged = similarity >= self._rule.threshold
        if merged.any():
            self._merge(leavers[merged], anchor[merged], similarity[merged])

    @torch.no_grad()
    def _most_similar(self, leaver_N: Tensor) -> tuple[Tensor, Tensor]:
        """The position of each leaver's most similar entry, the oldest of equals, and the similarity, the mean of the cosines of
        keys and of values; -inf where it has no candidate. Entries of marked tokens and the first token's take nothing.
        """
        stays = (~self._marked & (self._position > 0)).nonzero()[:, 0]
        cosine = sum(_unit(x[leaver_N]) @ _unit(x[stays]).T for x in (self._k, self._v)) / 2
        behind = leaver_N[:, None] - stays
        cosine = cosine.masked_fill((behind < 1) | (behind > self._rule.reach), -torch.inf)
        if not len(stays):
            return leaver_N, torch.full(leaver_N.shape, -torch.inf)
        best = cosine.amax(dim=1)
        first = torch.where(cosine == best[:, None], stays, len(self._position)).amin(dim=1)
        return first.clamp(max=len(self._position) - 1), best

    def _merge(self, leaver_N: Tensor, anchor_N: Tensor, similarity_N: Tensor) -> None:
        rule = self._rule
        log_u = self._s[leaver_N] - self._s[anchor_N] + rule.b + rule.c * (similarity_N - 1)
        log_u = log_u.clamp(max=LARGEST_LOG_WEIGHT)
        u = log_u.exp().to(self._v.dtype)
        z = self.z.index_add(0, anchor_N, u)
        changed = anchor_N.unique()
        for name in ("_v", "_k") if rule.merges_keys else ("_v",):
            x = getattr(self, name)
            total = (self.z[:, None] * x).index_add(0, anchor_N, u[:, None] * x[leaver_N])
            setattr(self, name, x.index_copy(0, changed, (total / z[:, None])[changed]))
        self._u_log_u = self._u_log_u.index_add(0, anchor_N, u * log_u.to(u.dtype))
        if rule.as_stored:
            z = ((rule.mass * z.log()).half().to(z.dtype) / rule.mass).exp()
        self.z = z
        self.slot[leaver_N] = anchor_N

    def attend(self, q_TGD: Tensor, start: int, scale: float, softcap: float | None) -> Tensor:
        """Output [T, G, D] of the queries at `start` and after, over what has not left and is not ahead of them."""
        stop = start + q_TGD.shape[0]
        seen = (self.left_at[:stop] > start).nonzero()[:, 0]
        logits = torch.einsum("tgd,sd->gts", q_TGD, self._k[seen]) * scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        bias = self.z[seen].log()
        if self._rule.merges_keys:
            bias = bias - self._u_log_u[seen] / self.z[seen]
        logits = logits + self._rule.mass * bias
        ahead = seen > torch.arange(start, stop)[:, None]
        return torch.einsum("gts,sd->tgd", logits.masked_fill(ahead, -torch.inf).softmax(dim=-1), self._v[seen])


def _unit(x_ND: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays."""
    return x_ND / x_ND.norm(dim=-1, keepdim=True).clamp(min=1e-12)
