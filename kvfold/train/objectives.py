"""What a step minimises: the next token's loss, and for a retrofit a distillation and the pressure on gates.

Letters: B rows, T tokens, N positions, C model width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from kvfold.eval.scoring import next_token_logits
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.gates import CallOptions
from kvfold.train.data import Batch
from kvfold.train.losses import (
    KeptAtEnd,
    divergence,
    fired_shares,
    next_token_loss,
    ratio_loss,
    slice_rows,
    state_distance,
    summed_in_slices,
)
from kvfold.train.processes import decoder_of, place, unsharded
from kvfold.train.settings import RetrofitSettings
from kvfold.train.student import GATES_OFF, Student, drawn_layout, lora_off, retention_of


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
