"""The training loop: Hugging Face's Trainer with our loss, our schedules, and checkpoints that are whole or not there.

Letters: B rows, T tokens, N positions, C model width, V vocabulary.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from kvfold.eval.scoring import next_token_logits
from kvfold.train.checkpoints import drop_old, seal
from kvfold.train.data import TrainingOrder
from kvfold.train.losses import decision_counts, divergence, next_token_loss, ratio_loss, slice_rows, summed_in_slices
from kvfold.train.reached import reached
from kvfold.train.schedules import learning_rate_factor, share_for
from kvfold.train.settings import RetrofitSettings
from kvfold.train.student import Student, trained_weights

_WEIGHTS = "trained.safetensors"
_KEPT_CHECKPOINTS = 2

OnStep = Callable[[dict[str, Any]], None]
"""Takes the figures of a step that is done."""


class RetrofitTrainer(Trainer):
    """Trains a student. Samples come in the order of a `TrainingOrder`, whatever the number of processes."""

    def __init__(
        self, student: Student, samples: TrainingOrder, settings: RetrofitSettings, folder: Path, *, use_cpu: bool,
        on_step: OnStep, on_unit: Callable[[int], None],
    ):  # fmt: skip
        """`folder` gets the checkpoints. `on_step` is told of each step, `on_unit` of each whole compression short of the
        target that the ramp has come to; both on the main process alone.
        """
        self._student, self._settings, self._folder = student, settings, folder
        self._stages, self._save_into = settings.stages, folder
        self._ignored = ignored_tokens(student.model)
        self.parts: dict[str, Tensor] = {}
        args = training_arguments(settings, folder, use_cpu=use_cpu)
        if settings.checkpoint_activations:
            student.model.gradient_checkpointing_enable({"use_reentrant": False})
        super().__init__(model=student.model, args=args, train_dataset=samples)
        # Our loss is normalised by us; else Trainer would leave the division by accumulation steps to the model.
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)
        self.add_callback(_Steps(self, on_step=on_step, on_unit=on_unit))

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        """The samples lie in their order already."""
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Ours, of the stages."""
        if self.lr_scheduler is None:
            settings = self._settings
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer,
                lambda step: learning_rate_factor(
                    step, kind=settings.learning_rate_schedule, stages=self._stages,
                    warmup_steps=settings.warmup_steps, final=settings.final_learning_rate,
                ),
            )  # fmt: skip
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of this process's part of a step, such that the mean over processes and accumulation steps is the step's."""
        ids, step = inputs["input_ids"], self.state.global_step
        gated = self._settings.compresses and self._stages.zero_out_factor(step) is None
        keyed = {"noise_key": inputs["noise_key"]} if gated else {}
        with ExitStack() as stack:
            stack.enter_context(self.accelerator.autocast())
            wanted = self._settings.distils != "none"
            teacher = self._student.teacher_states(ids)[:, :-1].flatten(0, 1) if wanted else None
            with ExitStack() as zeroing:
                factor = self._stages.zero_out_factor(step)
                if factor is not None:
                    zeroing.enter_context(self._student.model.zero_out(factor))
                # The head is applied below, in slices; forward itself gives one logit row that nothing needs.
                outputs = model(
                    input_ids=ids,
                    use_cache=False,
                    logits_to_keep=1,
                    output_hidden_states=True,
                    output_decisions=gated,
                    **keyed,
                )
                states = outputs.hidden_states[-1][:, :-1].flatten(0, 1)
            total = self._summed(states, teacher, ids)
        shares = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        main = total * (shares / inputs["step_tokens"][0])
        loss = main + self._pressure(outputs.decisions, step) if gated else main
        self._check(loss)
        self._add_parts(outputs.decisions if gated else None, loss=loss, main=main)
        return (loss, outputs) if return_outputs else loss

    def _summed(self, states_NC: Tensor, teacher_NC: Tensor | None, ids_BT: Tensor) -> Tensor:
        """Sum over the positions that count of what is minimised at each."""
        student, targets = self._student.model, ids_BT[:, 1:].flatten()
        counts = ~torch.isin(ids_BT[:, :-1].flatten(), self._ignored.to(ids_BT.device))
        kind = self._settings.distils

        def loss_of(part: slice, piece_NC: Tensor) -> Tensor:
            logits = next_token_logits(student, piece_NC)
            if teacher_NC is None:
                each = next_token_loss(logits, targets[part])
            else:
                with torch.no_grad():
                    theirs = next_token_logits(self._student.head_of_teacher, teacher_NC[part])
                each = divergence(logits, theirs, kind)
            return (each * counts[part]).sum()

        rows = slice_rows(student.config.vocab_size)
        return summed_in_slices(loss_of, states_NC, list(student.lm_head.parameters()), slice_rows=rows)

    def _pressure(self, decisions: tuple[Tensor | None, ...], step: int) -> Tensor:
        return ratio_loss(decisions, self.target_share(step))

    def target_share(self, step: int) -> float:
        """alpha* of a step."""
        settings = self._settings
        return share_for(self._stages.compression_at(step), settings.sequence_tokens, settings.spec)

    def _check(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise RuntimeError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()}: the last good checkpoint is kept in "
                f"{self._folder}: use a lower learning rate, or look at the data"
            )

    def _add_parts(self, decisions: tuple[Tensor | None, ...] | None, *, loss: Tensor, main: Tensor) -> None:
        """Sums over the accumulation steps of this process."""
        found = {"loss": loss.detach(), "main": main.detach(), "calls": loss.new_ones(())}
        if decisions is not None:
            layout, next_ = self._student.model.config.layout, self._settings.reads == "next"
            fired, seen = decision_counts(decisions)
            kept = reached(decisions, layout, from_next=next_ and self._settings.spec.name == "dms")
            found |= {"share": (fired / seen).mean().detach(), "kept": kept.kept, "kept_O": kept.kept_O}
        self.parts = {name: self.parts.get(name, 0) + value for name, value in found.items()}

    def take_parts(self) -> dict[str, Any]:
        """The means of the step that has just ended, over its accumulation steps and all processes, as plain numbers."""
        parts, self.parts = self.accelerator.reduce(self.parts, reduction="sum"), {}
        calls = parts.pop("calls").item()
        return {name: (value / calls).tolist() for name, value in parts.items()}

    def take_step(self, inputs: dict[str, Tensor]) -> None:
        """One optimizer step on one batch, outside of `train`: for those who measure what a step costs. Nothing is written."""
        if self.optimizer is None:
            self.create_optimizer()
            self.model_wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.current_gradient_accumulation_steps = 1
        self.training_step(self.model_wrapped, inputs)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self._settings.clip)
        self.optimizer.step()
        self.model.zero_grad()
        self.take_parts()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._save_into)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Whole or not at all: see checkpoints.py."""
        for name, weight in trained_weights(self._student.model).items():
            if not torch.isfinite(weight).all():
                raise RuntimeError(
                    f"step {self.state.global_step}: {name} is no longer finite: the last good checkpoint is kept in "
                    f"{self._folder}: use a lower learning rate"
                )
        self._save_into = self._folder / ".partial"
        try:
            super()._save_checkpoint(model, trial)
        finally:
            name, self._save_into = f"checkpoint-{self.state.global_step}", self._folder
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            seal(self._folder / ".partial" / name, self._folder / name)
            drop_old(self._folder, keep=_KEPT_CHECKPOINTS)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """What learns, and nothing else: the rest is the source's."""
        folder = Path(output_dir or self._folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: weight.detach().contiguous() for name, weight in trained_weights(self._student.model).items()}
        save_file(weights, folder / _WEIGHTS)

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self._student.model, Path(resume_from_checkpoint))


@torch.no_grad()
def load_trained(model: nn.Module, checkpoint: Path) -> None:
    """Put a checkpoint's weights in their places."""
    found, weights = load_file(checkpoint / _WEIGHTS), trained_weights(model)
    assert found.keys() == weights.keys(), "the run's settings were compared before"
    for name, weight in weights.items():
        weight.copy_(found[name])


class _Steps(TrainerCallback):
    """What happens between steps: figures, checkpoints, the end of the zero-out stage."""

    def __init__(self, trainer: RetrofitTrainer, *, on_step: OnStep, on_unit: Callable[[int], None]):
        self._trainer, self._on_step, self._on_unit = trainer, on_step, on_unit
        self._rate, self._begun = 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A freed channel is written out of the weights before the first step in which gates decide."""
        trainer = self._trainer
        settings, stages = trainer._settings, trainer._stages
        frees = settings.compresses and settings.spec.name == "dmc" and settings.trains == "full"
        if frees and state.global_step >= stages.zero_out_steps and not trainer._student.model.config.channel_freed:
            if state.global_step == stages.zero_out_steps:
                trainer._student.model.free_channel()
            else:  # a run that goes on: the weights of its checkpoint have it
                trainer._student.model.config.channel_freed = True
        self._rate, self._begun = trainer.optimizer.param_groups[0]["lr"], time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Figures out, and a checkpoint where one is due."""
        trainer, done = self._trainer, state.global_step
        settings, stages = trainer._settings, trainer._stages
        parts = trainer.take_parts()
        point = {
            "step": done, "tokens": done * settings.step_tokens, "loss": parts["loss"],
            "next_token_loss" if settings.distils == "none" else "distillation": parts["main"],
            "learning_rate": self._rate,
        }  # fmt: skip
        if settings.compresses:
            point |= {"target_compression": stages.compression_at(done - 1), **_compression(parts)}
            point["target_nominal_compression"] = 1 / (1 - trainer.target_share(done - 1))
        point["seconds"] = time.monotonic() - self._begun
        if state.is_world_process_zero:
            self._on_step(point)
        unit = stages.unit_after(done) if settings.compresses else None
        if unit is not None and state.is_world_process_zero:
            self._on_unit(unit)
        control.should_save = done >= stages.total or done % settings.save_steps == 0


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


def ignored_tokens(model: nn.Module) -> Tensor:
    """Tokens at which nothing is learned: padding and the end of a text."""
    config = model.config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return torch.tensor(sorted({one for one in (config.pad_token_id, *ends) if one is not None}), dtype=torch.int64)


def training_arguments(settings: RetrofitSettings, folder: Path, *, use_cpu: bool) -> TrainingArguments:
    """Trainer's own settings; what it would do by itself (logs, checkpoints, column selection) is off."""
    bf16 = not use_cpu and torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=use_cpu, max_steps=settings.stages.total, bf16=bf16,
        per_device_train_batch_size=settings.sequences_at_once, learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay, adam_beta1=settings.beta1, adam_beta2=settings.beta2,
        max_grad_norm=settings.clip, seed=settings.seed, save_strategy="no", logging_strategy="no", logging_nan_inf_filter=False,
        report_to="none", disable_tqdm=True, remove_unused_columns=False,
        dataloader_pin_memory=bf16, average_tokens_across_devices=False, log_level="error",
    )  # fmt: skip
    together = args.world_size * settings.sequences_at_once
    if settings.batch_sequences % together:
        raise ValueError(
            f"batch_sequences {settings.batch_sequences}: {args.world_size} processes of {settings.sequences_at_once} sequences "
            "share them equally: use a multiple of their product"
        )
    args.gradient_accumulation_steps = settings.batch_sequences // together
    # A process drives one device: with several in sight, Trainer would split batches over them by itself.
    args._n_gpu = min(args.n_gpu, 1)
    return args
