"""What a step minimises: the next token's loss, and for a retrofit a distillation and the pressure on gates to compress.

Logits of all positions at once would be gigabytes. So states are taken through the head slice by slice, and each slice's
gradient is computed on the way forward, when its logits are at hand: nothing of a slice outlives it.
Letters: B rows, T tokens, N positions, C model width, V vocabulary, K kv heads, O owners with gates.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvfold.eval.reading import next_token_logits, slices
from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.base import Method
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.gates import CallOptions
from kvfold.train.data import Batch
from kvfold.train.loop import decoder_of, unsharded
from kvfold.train.run_folder import leads
from kvfold.train.settings import RetrofitSettings, entry_bytes
from kvfold.train.student import GATES_OFF, Student, drawn_layout, lora_off, retention_of


def divergence(student_NV: Tensor, teacher_NV: Tensor, kind: Literal["reverse", "forward"]) -> Tensor:
    """How far the student's distribution is from the teacher's at each position, fp32 [N], with a gradient to the student alone:
    `reverse` = KL(student || teacher), `forward` = KL(teacher || student).

    Source: arXiv 2506.05345, section 3.
    Differs: none in `reverse`, the published form; `forward` is an option of ours.
    """
    return _Divergence.apply(student_NV.float(), teacher_NV.detach().float(), kind)


class _Divergence(torch.autograd.Function):
    """The gradient is written down: p (log p - log q - KL) or p - q for a student p and a teacher q. Logits of a whole
    vocabulary are what a step's time goes to beside the layers, and autograd would pass over them twice as often.
    """

    @staticmethod
    def forward(ctx: Any, student_NV: Tensor, teacher_NV: Tensor, kind: str) -> Tensor:
        log_p, log_q = (logits - logits.logsumexp(dim=-1, keepdim=True) for logits in (student_NV, teacher_NV))
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


def fired_shares(decisions: Sequence[Tensor | None]) -> Tensor:
    """Of each sequence, the share of decisions that fired, fp32 [B], over all layers, heads and tokens, the first token's raw
    decision included. `decisions`: [B, K, T] of each owner, hard with a straight-through gradient, None where there are no gates.
    """
    given = [one for one in decisions if one is not None]
    return sum(one.sum(dim=(1, 2)) for one in given) / sum(one[0].numel() for one in given)


def summed_in_slices(
    loss_of: Callable[[slice, Tensor], Tensor], states: Tensor, weights: Sequence[Tensor] = (), *, vocabulary: int
) -> Tensor:  # fmt: skip
    """Sum over slices of `loss_of(slice, states[slice])`, with its gradient to `states` [N, ...] and to `weights`: what `loss_of`
    multiplies by and wants trained, such as the head's; others get no gradient.
    """
    return _InSlices.apply(loss_of, vocabulary, states, *[one for one in weights if one.requires_grad])


_LEARNING_SLICE_BYTES = 2**27
"""Where a head learns, each slice has a gradient as large as the head, which costs more than logits that leave the cache."""


class _InSlices(torch.autograd.Function):
    """Gradients are computed slice by slice in `forward`; `backward` only scales them."""

    @staticmethod
    def forward(ctx, loss_of, vocabulary, states, *weights):
        total, sums = states.new_zeros((), dtype=torch.float32), [torch.zeros_like(one) for one in (states, *weights)]
        size = {"most_bytes": _LEARNING_SLICE_BYTES} if weights else {}
        for part in slices(len(states), vocabulary, **size):
            with torch.enable_grad():
                piece = states[part].detach().requires_grad_()
                loss = loss_of(part, piece)
            total += loss.detach()
            found = torch.autograd.grad(loss, (piece, *weights))
            for whole, one in zip((sums[0][part], *sums[1:]), found, strict=True):
                whole += one
        ctx.save_for_backward(*sums)
        return total

    @staticmethod
    def backward(ctx, scale):
        return None, None, *[one * scale for one in ctx.saved_tensors]


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
        tokens, sizes = next((one.shape[2], self._sizes.to(one.device)) for one in decisions if one is not None)
        shares = [
            sizes.new_tensor(method.max_kept(tokens) / tokens) if one is None
            else (kept_tokens(one, method, from_next=self._from_next) / tokens).mean()
            for one, method in zip(decisions, self._methods, strict=True)
        ]  # fmt: skip
        gated = [share for share, one in zip(shares, decisions, strict=True) if one is not None]
        return {"kept_O": torch.stack(gated), "kept": (torch.stack(shares) * sizes).sum() / sizes.sum()}


def kept_tokens(decisions_BKT: Tensor, spec: Method, *, from_next: bool) -> Tensor:
    """Entries that each head holds after the last token, fp32 [B, K]."""
    tokens = decisions_BKT.shape[2]
    return tokens - (decisions_BKT > 0.5).float()[:, :, spec.governing(tokens, from_next)].sum(dim=2)


def ignored_tokens(model: FoldForCausalLM) -> list[int]:
    """Tokens at which nothing is learned: padding and the end of a text."""
    config = model.config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return sorted({one for one in (config.pad_token_id, *ends) if one is not None})


class NextToken:
    """What is minimised, and what happens beside that: here the next token's loss, over the positions that count. Steps are
    counted from 0, `done` is how many were made.
    """

    def __init__(self, model: FoldForCausalLM, ignored: Sequence[int] = ()):
        """`model` is in its place, see loop.py; nothing is learned at `ignored` tokens."""
        self.model, self._decoder = model, decoder_of(model)
        self._ignored = torch.tensor(ignored, dtype=torch.int64, device=model.device)

    def losses(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """`loss`, and other figures, of a part of a step's batch; the sum over all parts is the step's."""
        states = self._decoder(batch.ids_BT, use_cache=False).last_hidden_state
        return {"loss": self._mean(states, batch, batch.ids_BT[:, 1:], next_token_loss)}

    def _mean(
        self, states_BTC: Tensor, batch: Batch, targets: Tensor, loss_of_logits: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:  # fmt: skip
        """What these rows add to the mean over a step's positions that count of `loss_of_logits(logits [n, V], their part of
        targets [B, T - 1, ...])`, [n].
        """
        counts, targets = self._counted(batch).flatten(), targets.flatten(0, 1)

        def loss_of(part: slice, piece_NC: Tensor) -> Tensor:
            return (loss_of_logits(next_token_logits(self.model, piece_NC), targets[part]) * counts[part]).sum()

        states_NC, weights = states_BTC[:, :-1].flatten(0, 1), list(self.model.lm_head.parameters())
        total = summed_in_slices(loss_of, states_NC, weights, vocabulary=self.model.config.vocab_size)
        return total * (1 / batch.step_positions)

    def _counted(self, batch: Batch) -> Tensor:
        """Which positions count, bool [B, T - 1]."""
        return ~torch.isin(batch.ids_BT[:, :-1], self._ignored)

    def figures(self, done: int, sums: dict[str, Any]) -> dict[str, Any]:
        """What the curve says of a step beyond its loss."""
        return {}

    def end(self, done: int) -> None:
        """Called after a step, when its figures are told."""


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
        self._holds_states, kept = settings.hidden_loss_weight > 0, student.kept
        self._kl, self._compresses = settings.distils, settings.trains_gates
        self._is_hard = settings.compresses and not settings.trains_gates
        self._main = "next_token_loss" if self._kl == "none" else "distillation"
        retention = retention_of(student.model, settings) if settings.trains_gates else None
        self.targets = settings.stages.targets(retention)
        if settings.trains_gates:
            from_next = settings.reads == "next" and "next" in settings.spec.gate_form.reads
            bytes_ = student.model.dtype.itemsize
            self._kept = KeptAtEnd(student.model.config.layout, from_next=from_next, model_bytes=bytes_)
        self._frees = settings.compresses and settings.trains == "full" and settings.spec.gate_form.zero_out
        self._teacher = self._asked
        if kept is not None:
            self._teacher = lambda ids: (kept.of(ids, lambda missing: self._asked(missing)[-1]),)
        if student.teacher is not None:  # each process has a device of its own
            student.teacher.to(student.model.device)

    def losses(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """With the ratio loss where gates decide."""
        target, settings, ids = self.targets[step], self._settings, batch.ids_BT
        if self._is_hard:
            self.model.eval()  # decisions that don't learn are those of inference
        gated = self._compresses and target.channel_factor is None
        if gated and self._frees and not self.model.config.channel_freed:
            # Once, before gates first decide; in a run that goes on the weights of its checkpoint have it.
            self.model.free_channel(write=step == settings.stages.zero_out_steps)
        asked = {"output_decisions": True, "noise_key": batch.noise_key_B} if gated else {}
        teacher = () if self._kl == "none" else self._teacher(ids)
        if target.channel_factor is not None or self._student.widest is not None:
            asked["options"] = self._options(step)
        outputs = self._decoder(ids, use_cache=False, output_hidden_states=self._holds_states, **asked)
        wanted = (teacher[-1][:, :-1], self._from_teacher) if teacher else (ids[:, 1:], next_token_loss)
        main = self._mean(outputs.last_hidden_state, batch, *wanted)
        parts = {"loss": main, self._main: main}
        if self._holds_states:
            ours, theirs = ([one[:, :-1] for one in layers[1:]] for layers in (outputs.hidden_states, teacher))
            parts["state_distance"] = state_distance(ours, theirs, self._counted(batch)) * (1 / batch.step_positions)
            parts["loss"] = main + settings.hidden_loss_weight * parts["state_distance"]
        if gated:
            rows_share, fired_B = len(ids) / batch.step_rows, fired_shares(outputs.decisions)
            ratio = settings.ratio_weight * ratio_loss(fired_B, target.share)
            parts["loss"] = parts["loss"] + ratio * rows_share
            told = {"share": fired_B.mean(), **self._kept.shares(outputs.decisions)}
            parts |= {name: rows_share * mean for name, mean in told.items()}
        return parts

    @torch.no_grad()
    def _asked(self, ids_BT: Tensor) -> tuple[Tensor, ...]:
        """What the teacher has before its head, [B, T, C], or what goes into each layer, too: a model of its own, or the
        student's weights with what is trained switched off.
        """
        decoder = self._decoder if self._student.teacher is None else self._student.teacher.model
        with lora_off(self.model) if self._student.has_lora else nullcontext():
            outputs = decoder(ids_BT, use_cache=False, output_hidden_states=self._holds_states, options=GATES_OFF)
        return outputs.hidden_states if self._holds_states else (outputs.last_hidden_state,)

    def _from_teacher(self, logits_NV: Tensor, theirs_NC: Tensor) -> Tensor:
        with torch.no_grad():
            theirs_NV = next_token_logits(self._student.teacher or self.model, theirs_NC)
        return divergence(logits_NV, theirs_NV, self._kl)

    def _options(self, step: int) -> CallOptions:
        """What a step's call asks for while a channel fades out, or where sharing is drawn."""
        factor, widest = self.targets[step].channel_factor, self._student.widest
        seed, base = self._settings.seed, self.model.config.layout
        sharing = None if widest is None else drawn_layout(base, widest, seed=seed, step=step)
        return CallOptions(channel_factor=factor, sharing=sharing)

    def figures(self, done: int, sums: dict[str, Any]) -> dict[str, Any]:
        """The loss's parts, and the compression that was asked for and came out; it is 1 as long as gates are off."""
        target = self.targets[done - 1]
        told = {name: sums[name] for name in (self._main, "state_distance") if name in sums}
        if self._compresses:
            told |= {
                "target_compression": target.compression, "target_nominal_compression": 1 / (1 - target.share),
                "compression": 1 / sums.get("kept", 1), "nominal_compression": 1 / (1 - min(sums.get("share", 0), 1 - 1e-9)),
            }  # fmt: skip
        if "kept" in sums:
            told |= {"layer_compression": [1 / one for one in sums["kept_O"]], "ratio_share": sums["share"]}
        return told

    def end(self, done: int) -> None:
        """The ramp's whole compressions are told."""
        if (unit := self.targets[done - 1].unit) is not None:
            model = unsharded(self.model)
            if leads():
                self._on_unit(unit, model)
