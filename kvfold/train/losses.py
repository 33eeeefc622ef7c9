"""What a retrofit minimises: the next token's loss or a distillation, and the pressure on gates to compress.

Logits of all positions at once would be gigabytes. So states are taken through the head slice by slice, and each slice's
gradient is computed on the way forward, when its logits are at hand: nothing of a slice outlives it.
Letters: N positions, C model width, V vocabulary, B rows, K kv heads, T tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.base import Method
from kvfold.train.schedules import entry_bytes

Kind = Literal["reverse", "forward", "none"]

_SLICE_BYTES = 2**25
"""Bytes of one slice of fp32 logits: a processor's cache holds it, and its allocator keeps it for the next slice."""


def distillation(
    student_NV: Tensor, teacher_NV: Tensor, real_N: Tensor, kind: Literal["reverse", "forward"] = "reverse"
) -> Tensor:
    """How far the student's distributions are from the teacher's: summed over the vocabulary, mean over the real positions.

    `reverse` = KL(student || teacher), `forward` = KL(teacher || student). `real_N` is False where a position does not
    count (padding, the end of a text). Slice by slice, so that memory beyond the two inputs is bounded.

    Source: arXiv 2506.05345, section 3.
    Differs: none in `reverse`, the published form; `forward` is an option of ours.
    """
    total = summed_in_slices(
        lambda part, logits: (divergence(logits, teacher_NV[part], kind) * real_N[part]).sum(),
        student_NV,
        slice_rows=slice_rows(student_NV.shape[-1]),
    )
    return total / real_N.sum().clamp(min=1)


def divergence(student_NV: Tensor, teacher_NV: Tensor, kind: Literal["reverse", "forward"]) -> Tensor:
    """KL of each position, fp32 [N], with a gradient to the student alone; see `distillation`."""
    return _Divergence.apply(student_NV.float(), teacher_NV.detach().float(), kind)


class _Divergence(torch.autograd.Function):
    """The gradient is written down: p (log p - log q - KL) or p - q for a student p and a teacher q. Logits of a whole
    vocabulary are what a step's time goes to beside the layers, and autograd would pass over them twice as often.
    """

    @staticmethod
    def forward(ctx: Any, student_NV: Tensor, teacher_NV: Tensor, kind: str) -> Tensor:
        log_p = student_NV - student_NV.logsumexp(dim=-1, keepdim=True)
        log_q = teacher_NV - teacher_NV.logsumexp(dim=-1, keepdim=True)
        p = log_p.exp()
        if kind == "reverse":
            gap = log_p.sub_(log_q)
            found = torch.linalg.vecdot(p, gap)
            slope = gap.sub_(found[:, None]).mul_(p)
        else:
            q = log_q.exp()
            found = torch.linalg.vecdot(q, log_q.sub_(log_p))
            slope = p.sub_(q)
        ctx.save_for_backward(slope)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale_N: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope * scale_N[:, None], None, None


def state_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], counts_BT: Tensor) -> Tensor:
    """How far the states after each layer, [B, T, C] each, are from the teacher's: their squared distance as a share of the
    teacher's square, mean over layers, summed over the positions that count.

    A share of each position's own: a few positions (the first above all) are hundreds of times larger than the others.
    """
    assert len(student) == len(teacher) > 0, "one of each for every layer"
    total = student[0].new_zeros((), dtype=torch.float32)
    for ours, theirs in zip(student, teacher, strict=True):
        theirs = theirs.detach().float()
        apart_BT = (ours.float() - theirs).square().sum(dim=-1) / theirs.square().sum(dim=-1).clamp(min=1e-12)
        total = total + (apart_BT * counts_BT).sum()
    return total / len(student)


def next_token_loss(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Minus the log probability of each position's next token, fp32 [N]."""
    return torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="none")


def ratio_loss(fired_B: Tensor, target_share: float) -> Tensor:
    """Mean over sequences of max(0, target - share of decisions that fired): no pressure once a sequence compresses enough.

    Source: arXiv 2403.09636, section 3.2; arXiv 2506.05345, section 3.
    Differs: per sequence always; the official maximum under tensor parallelism is also per shard of heads.
    """
    return (target_share - fired_B).clamp(min=0).mean()


def fired_shares(decisions: Sequence[Tensor | None], real_BT: Tensor | None = None) -> Tensor:
    """Of each sequence, the share of decisions that fired, fp32 [B], over all layers, heads and real tokens, the first token's
    raw decision included. `decisions`: [B, K, T] of each owner, hard with a straight-through gradient, None where an owner has
    no gates.
    """
    given = [one for one in decisions if one is not None]
    assert given, "no layer has gates"
    real = given[0].new_ones(given[0].shape[0], given[0].shape[2]) if real_BT is None else real_BT.to(given[0].dtype)
    fired = sum((one * real[:, None]).sum(dim=(1, 2)) for one in given)
    return fired / sum(real.sum(dim=1) * one.shape[1] for one in given)


def slice_rows(vocabulary: int) -> int:
    """Positions of one slice."""
    return max(1, _SLICE_BYTES // (4 * vocabulary))


def summed_in_slices(
    loss_of: Callable[[slice, Tensor], Tensor], states: Tensor, weights: Sequence[Tensor] = (), *, slice_rows: int
) -> Tensor:
    """Sum over slices of `loss_of(slice, states[slice])`, with its gradient to `states` [N, ...] and to `weights`.

    `weights` are what `loss_of` multiplies by and wants trained, such as the head's; others get no gradient.
    """
    return _InSlices.apply(loss_of, slice_rows, states, *[one for one in weights if one.requires_grad])


class _InSlices(torch.autograd.Function):
    """Gradients are computed slice by slice in `forward`; `backward` only scales them."""

    @staticmethod
    def forward(ctx, loss_of, slice_rows, states, *weights):
        wanted = ctx.needs_input_grad[2]
        total = states.new_zeros((), dtype=torch.float32)
        state_grad = torch.empty_like(states) if wanted else None
        weight_grads = [torch.zeros_like(weight) for weight in weights]
        for start in range(0, states.shape[0], slice_rows):
            part = slice(start, start + slice_rows)
            with torch.set_grad_enabled(wanted or bool(weights)):
                piece = states[part].detach().requires_grad_(wanted)
                loss = loss_of(part, piece)
            total += loss.detach()
            asked = ([piece] if wanted else []) + list(weights)
            if asked:
                found = list(torch.autograd.grad(loss, asked))
                if wanted:
                    state_grad[part] = found.pop(0)
                for whole, one in zip(weight_grads, found, strict=True):
                    whole += one
        ctx.wanted = wanted
        ctx.save_for_backward(*([state_grad] if wanted else []), *weight_grads)
        return total

    @staticmethod
    def backward(ctx, scale):
        saved = [one * scale for one in ctx.saved_tensors]
        return None, None, saved.pop(0) if ctx.wanted else None, *saved


class KeptAtEnd:
    """The real compression of a training batch: what a cache would keep of each sequence at its end, from its decisions."""

    def __init__(self, layout: KVLayout, *, from_next: bool, model_bytes: int = 2):
        """`model_bytes`: see `Retention.of`."""
        self._methods, self._from_next = [layout.time_of(owner) for owner in layout.owners], from_next
        self._sizes = torch.tensor([float(entry_bytes(layout, owner, model_bytes)) for owner in layout.owners])

    @torch.no_grad()
    def shares(self, decisions: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """From the decisions [B, K, T] of each owner, ascending, None where it has no gates; no row is padded. Shares of tokens,
        mean over rows and heads, fp32: `kept_O` of each owner that has gates, `kept` of all owners, weighted by bytes. An
        owner without gates keeps what its method says.
        """
        tokens, device = next((one.shape[2], one.device) for one in decisions if one is not None)
        shares = [
            torch.tensor(method.max_kept(tokens) / tokens, device=device) if one is None
            else (kept_tokens(one, method, from_next=self._from_next) / tokens).mean()
            for one, method in zip(decisions, self._methods, strict=True)
        ]  # fmt: skip
        gated = [share for share, one in zip(shares, decisions, strict=True) if one is not None]
        sizes = self._sizes.to(device)
        return {"kept_O": torch.stack(gated), "kept": (torch.stack(shares) * sizes).sum() / sizes.sum()}


def kept_tokens(decisions_BKT: Tensor, spec: Method, *, from_next: bool) -> Tensor:
    """Entries that each head holds after the last token, fp32 [B, K]."""
    fired = (decisions_BKT > 0.5).float()
    tokens = fired.shape[2]
    return tokens - fired[:, :, spec.governing(tokens, from_next)].sum(dim=2)
