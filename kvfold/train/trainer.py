"""The training loop of a retrofit: distillation, the pressure on gates, and what happens at the borders of its stages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.eval.scoring import next_token_logits
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.options import CallOptions
from kvfold.train.data import TrainingOrder
from kvfold.train.draws import drawn_layout
from kvfold.train.loop import OnStep, StepTrainer
from kvfold.train.losses import decision_counts, divergence, ratio_loss, state_distance
from kvfold.train.reached import reached
from kvfold.train.settings import RetrofitSettings
from kvfold.train.shards import is_sharded, unsharded
from kvfold.train.student import Student, retention_of


class RetrofitTrainer(StepTrainer):
    """Trains a student."""

    _settings: RetrofitSettings

    def __init__(
        self, student: Student, samples: TrainingOrder, settings: RetrofitSettings, folder: Path, *, use_cpu: bool,
        on_step: OnStep, on_unit: Callable[[int, nn.Module], None],
    ):  # fmt: skip
        """As in `StepTrainer`; `on_unit` is told of each whole compression short of the target that the ramp has come to, and
        given the model as it is then, on the main process alone.
        """
        self._student, self._stages, self._on_unit = student, settings.stages, on_unit
        self._retention = retention_of(student.model, settings) if settings.compresses else None
        super().__init__(student.model, samples, settings, folder, use_cpu=use_cpu, on_step=on_step)
        if student.teacher is not None:  # each process has a device of its own
            student.teacher.to(self.args.device)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """See `StepTrainer`; with the ratio loss where gates decide."""
        ids, step = inputs["input_ids"], self.state.global_step
        factor = self._stages.zero_out_factor(step)
        gated = self._settings.compresses and factor is None
        options = {"output_decisions": True, "noise_key": inputs["noise_key"]} if gated else {}
        with self.accelerator.autocast():
            wrapped = model if self._settings.shard else None
            teacher = self._asked(ids, wrapped)
            sharing = None if self._student.widest is None else self._drawn(step)
            asked = CallOptions(channel_factor=factor, sharing=sharing)
            outputs = self.forward_states(model, ids, options=asked, **options)
            total = self._distilled(outputs, teacher[-1], ids) if teacher else self.summed_loss(outputs, ids)
        main = loss = self.share_of_step(total, inputs)
        told = {}
        if self._settings.state_weight:
            apart = self.share_of_step(self._state_distance(outputs, teacher, ids), inputs)
            loss, told = main + self._settings.state_weight * apart, {"state_distance": apart.detach()}
        if gated:
            loss = loss + self._settings.ratio_weight * ratio_loss(outputs.decisions, self._target_share(step))
            told |= self._decided(outputs.decisions)
        self.add_parts(loss=loss, main=main, **told)
        return (loss, outputs) if return_outputs else loss

    def _asked(self, ids_BT: Tensor, wrapped: nn.Module | None) -> tuple[Tensor, ...]:
        """The teacher's states; none where nothing is distilled."""
        if self._settings.distils == "none":
            return ()
        return self._student.teacher_states(ids_BT, wrapped, of_layers=bool(self._settings.state_weight))

    def _state_distance(self, outputs: Any, teacher: tuple[Tensor, ...], ids_BT: Tensor) -> Tensor:
        """Sum over the positions that count, of what comes out of each layer."""
        ours, theirs = ([one[:, :-1] for one in states[1:]] for states in (outputs.hidden_states, teacher))
        return state_distance(ours, theirs, self.counted(ids_BT))

    def _distilled(self, outputs: Any, teacher_BTC: Tensor, ids_BT: Tensor) -> Tensor:
        """Sum over the positions that count of the divergence from the teacher."""
        theirs_NC = teacher_BTC[:, :-1].flatten(0, 1)

        def loss_of_logits(logits_NV: Tensor, part: slice) -> Tensor:
            with torch.no_grad():
                theirs = next_token_logits(self._student.head_of_teacher, theirs_NC[part])
            return divergence(logits_NV, theirs, self._settings.distils)

        return self.summed_over_positions(outputs, ids_BT, loss_of_logits)

    def _drawn(self, step: int) -> KVLayout:
        """Who reads whom in a step."""
        base = self._student.model.config.layout
        return drawn_layout(base, self._student.widest, seed=self._settings.seed, step=step)

    def _target_share(self, step: int) -> float:
        """alpha* of a step."""
        return self._retention.share_for(self._stages.compression_at(step))

    def _decided(self, decisions: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
        """What fired, and what that would keep."""
        layout, next_ = self._student.model.config.layout, self._settings.reads == "next"
        fired, seen = decision_counts(decisions)
        kept = reached(
            decisions, layout, from_next=next_ and "next" in self._settings.spec.gate_form.reads,
            model_bytes=self._student.model.dtype.itemsize,
        )  # fmt: skip
        return {"share": (fired / seen).mean().detach(), "kept": kept.kept, "kept_O": kept.kept_O}

    def before_step(self, step: int) -> None:
        """A freed channel is written out of the weights before the first step in which gates decide."""
        settings, stages, model = self._settings, self._stages, self._student.model
        frees = settings.compresses and settings.spec.gate_form.zero_out and settings.trains == "full"
        if frees and step >= stages.zero_out_steps and not model.config.channel_freed:
            # In a run that goes on the weights of its checkpoint have it.
            model.free_channel(write=step == stages.zero_out_steps)

    def figures(self, done: int, parts: dict[str, Any]) -> dict[str, Any]:
        """The loss's parts, and the compression that was asked for and came out."""
        settings = self._settings
        found = {"next_token_loss" if settings.distils == "none" else "distillation": parts["main"]}
        if settings.state_weight:
            found["state_distance"] = parts["state_distance"]
        if settings.compresses:
            found |= {"target_compression": self._stages.compression_at(done - 1), **_compression(parts)}
            found["target_nominal_compression"] = 1 / (1 - self._target_share(done - 1))
        return found

    def after_step(self, done: int) -> None:
        """The ramp's whole compressions are told."""
        unit = self._stages.unit_after(done) if self._settings.compresses else None
        if unit is None:
            return
        model = unsharded(self._plain) if is_sharded(self._plain) else self._plain
        if self.is_world_process_zero():
            self._on_unit(unit, model)


def _compression(parts: dict[str, Any]) -> dict[str, Any]:
    """What the step's own, noisy decisions came to; 1 as long as gates are off."""
    if "kept" not in parts:
        return {"compression": 1.0, "nominal_compression": 1.0}
    share = min(parts["share"], 1 - 1e-9)
    return {
        "ratio_share": parts["share"],
        "compression": 1 / parts["kept"],
        "nominal_compression": 1 / (1 - share),
        "layer_compression": [1 / one for one in parts["kept_O"]],
    }
