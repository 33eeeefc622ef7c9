"""What a step minimises: the next token's loss, and for a retrofit a distillation and the pressure on gates.

Letters: B rows, T tokens, N positions, C model width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvfold.eval.reading import next_token_logits
from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.base import Method
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.gates import CallOptions
from kvfold.train.data import Batch
from kvfold.train.loop import decoder_of, place, unsharded
from kvfold.train.settings import RetrofitSettings, entry_bytes
from kvfold.train.student import GATES_OFF, Student, drawn_layout, lora_off, retention_of

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


def ignored_tokens(model: FoldForCausalLM) -> list[int]:
    """Tokens at which nothing is learned: padding and the end of a text."""
    config = model.config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return sorted({one for one in (config.pad_token_id, *ends) if one is not None})


class NextToken:
    """The next token's loss, over the positions that count."""

    def __init__(self, model: FoldForCausalLM, ignored: Sequence[int] = ()):
        """`model` is in its place, see processes.py; nothing is learned at `ignored` tokens."""
        self.model, self._decoder = model, decoder_of(model)
        self._ignored = torch.tensor(ignored, dtype=torch.int64, device=model.device)

    def losses(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """See `Objective`."""
        states = self._decoder(batch.ids_BT, use_cache=False).last_hidden_state
        return {"loss": self._next_token(states, batch)}

    def _next_token(self, states_BTC: Tensor, batch: Batch) -> Tensor:
        targets = batch.ids_BT[:, 1:].flatten()
        return self._mean(states_BTC, batch, lambda logits, part: next_token_loss(logits, targets[part]))

    def _mean(self, states_BTC: Tensor, batch: Batch, loss_of_logits: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """What these rows add to the mean over a step's positions that count of `loss_of_logits(logits [n, V], their slice of all
        positions)`, [n].
        """
        states, counts = states_BTC[:, :-1].flatten(0, 1), self._counted(batch).flatten()

        def loss_of(part: slice, piece_NC: Tensor) -> Tensor:
            return (loss_of_logits(next_token_logits(self.model, piece_NC), part) * counts[part]).sum()

        rows = slice_rows(self.model.config.vocab_size)
        total = summed_in_slices(loss_of, states, list(self.model.lm_head.parameters()), slice_rows=rows)
        return total * (1 / batch.step_positions)

    def _counted(self, batch: Batch) -> Tensor:
        """Which positions count, bool [B, T - 1]."""
        return ~torch.isin(batch.ids_BT[:, :-1], self._ignored)

    def figures(self, done: int, sums: dict[str, Any]) -> dict[str, Any]:
        """Nothing more."""
        return {}

    def end(self, done: int) -> None:
        """Nothing is to be done."""


class Distillation(NextToken):
    """A student held to its teacher, or trained on the text, while its gates are pressed to compress."""

    def __init__(
        self, student: Student, settings: RetrofitSettings, ignored: Sequence[int] = (), *,
        on_unit: Callable[[int, FoldForCausalLM], None],
    ):  # fmt: skip
        """`on_unit` is told of each whole compression short of the target that the ramp has come to, and given the model as it is
        then, on the leading process.
        """
        super().__init__(student.model, ignored)
        self._student, self._settings, self._on_unit = student, settings, on_unit
        self._kl, self._compresses = settings.distils, settings.compresses
        self._holds_states = settings.hidden_loss_weight > 0
        retention = retention_of(student.model, settings) if settings.compresses else None
        self.targets = settings.stages.targets(retention)
        if settings.compresses:
            from_next = settings.reads == "next" and "next" in settings.spec.gate_form.reads
            bytes_ = student.model.dtype.itemsize
            self._kept = KeptAtEnd(student.model.config.layout, from_next=from_next, model_bytes=bytes_)
        self._frees = settings.compresses and settings.trains == "full" and settings.spec.gate_form.zero_out
        if student.teacher is not None:  # each process has a device of its own
            student.teacher.to(student.model.device)

    def losses(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """See `Objective`; with the ratio loss where gates decide."""
        target = self.targets[step]
        gated = self._compresses and target.channel_factor is None
        if gated and self._frees and not self.model.config.channel_freed:
            # Once, before gates first decide; in a run that goes on the weights of its checkpoint have it.
            self.model.free_channel(write=step == self._settings.stages.zero_out_steps)
        asked = {"output_decisions": True, "noise_key": batch.noise_key_B} if gated else {}
        teacher = self._taught(batch.ids_BT)
        if target.channel_factor is not None or self._student.widest is not None:
            asked["options"] = self._options(step)
        outputs = self._decoder(batch.ids_BT, use_cache=False, output_hidden_states=self._holds_states, **asked)
        states = outputs.last_hidden_state
        main = self._distilled(states, teacher[-1], batch) if teacher else self._next_token(states, batch)
        parts = {"loss": main, "main": main}
        if self._holds_states:
            ours, theirs = ([one[:, :-1] for one in layers[1:]] for layers in (outputs.hidden_states, teacher))
            apart = state_distance(ours, theirs, self._counted(batch)) * (1 / batch.step_positions)
            parts |= {"loss": main + self._settings.hidden_loss_weight * apart, "state_distance": apart}
        if gated:
            rows_share, fired_B = len(batch.ids_BT) / batch.step_rows, fired_shares(outputs.decisions)
            ratio = self._settings.ratio_weight * ratio_loss(fired_B, target.share)
            parts["loss"] = parts["loss"] + ratio * rows_share
            told = {"share": fired_B.mean(), **self._kept.shares(outputs.decisions)}
            parts |= {name: rows_share * mean for name, mean in told.items()}
        return parts

    def _taught(self, ids_BT: Tensor) -> tuple[Tensor, ...]:
        """What the teacher has before its head, [B, T, C], or what goes into each layer, too; none where nothing is distilled."""
        if self._kl == "none":
            return ()
        kept = self._student.kept
        return self._asked(ids_BT) if kept is None else (kept.of(ids_BT, lambda missing: self._asked(missing)[-1]),)

    @torch.no_grad()
    def _asked(self, ids_BT: Tensor) -> tuple[Tensor, ...]:
        """The teacher: a model of its own, or the student's weights with what is trained switched off."""
        student, of_layers = self._student, self._holds_states
        decoder = self._decoder if student.teacher is None else student.teacher.model
        with lora_off(self.model) if student.has_lora else nullcontext():
            outputs = decoder(ids_BT, use_cache=False, output_hidden_states=of_layers, options=GATES_OFF)
        return outputs.hidden_states if of_layers else (outputs.last_hidden_state,)

    def _distilled(self, states_BTC: Tensor, teacher_BTC: Tensor, batch: Batch) -> Tensor:
        theirs_NC, head = teacher_BTC[:, :-1].flatten(0, 1), self._student.teacher or self.model

        def loss_of_logits(logits_NV: Tensor, part: slice) -> Tensor:
            with torch.no_grad():
                theirs = next_token_logits(head, theirs_NC[part])
            return divergence(logits_NV, theirs, self._kl)

        return self._mean(states_BTC, batch, loss_of_logits)

    def _options(self, step: int) -> CallOptions:
        """What a step's call asks for while a channel fades out, or where sharing is drawn."""
        factor, widest = self.targets[step].channel_factor, self._student.widest
        seed, base = self._settings.seed, self.model.config.layout
        sharing = None if widest is None else drawn_layout(base, widest, seed=seed, step=step)
        return CallOptions(channel_factor=factor, sharing=sharing)

    def figures(self, done: int, sums: dict[str, Any]) -> dict[str, Any]:
        """The loss's parts, and the compression that was asked for and came out."""
        told = {"next_token_loss" if self._kl == "none" else "distillation": sums["main"]}
        if self._holds_states:
            told["state_distance"] = sums["state_distance"]
        if not self._compresses:
            return told
        target = self.targets[done - 1]
        told |= {"target_compression": target.compression, "target_nominal_compression": 1 / (1 - target.share)}
        if "kept" not in sums:  # gates are still off
            return told | {"compression": 1.0, "nominal_compression": 1.0}
        told |= {"compression": 1 / sums["kept"], "layer_compression": [1 / one for one in sums["kept_O"]]}
        nominal = 1 / (1 - min(sums["share"], 1 - 1e-9))
        return told | {"ratio_share": sums["share"], "nominal_compression": nominal}

    def end(self, done: int) -> None:
        """The ramp's whole compressions are told."""
        unit = self.targets[done - 1].unit
        if unit is not None:
            model = unsharded(self.model)
            if place()[0] == 0:
                self._on_unit(unit, model)
