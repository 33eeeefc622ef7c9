"""The training loop that every kind of training shares: Hugging Face's Trainer with the next token's loss, samples in a
fixed order, a curve, and checkpoints that are whole or not there. What a retrofit adds stands in trainer.py.

Letters: B rows, T tokens, N positions, C model width, V vocabulary.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from kvfold.errors import UserError
from kvfold.eval.scoring import next_token_logits
from kvfold.train.checkpoints import drop_old, seal
from kvfold.train.data import TrainingOrder
from kvfold.train.losses import next_token_loss, slice_rows, summed_in_slices
from kvfold.train.shards import gathered, is_sharded, load_optimizer, put, save_optimizer, shard
from kvfold.train.student import trained_weights

_WEIGHTS = "trained.safetensors"
_KEPT_CHECKPOINTS = 2

OnStep = Callable[[dict[str, Any]], None]
"""Takes the figures of a step that is done."""


class DivergedError(RuntimeError):
    """A loss or a weight that is no number."""


class LoopSettings(Protocol):
    """What the loop asks of the settings of a run."""

    batch_sequences: int
    sequences_at_once: int
    sequence_tokens: int
    learning_rate: float
    weight_decay: float
    beta1: float
    beta2: float
    clip: float
    seed: int
    save_steps: int
    checkpoint_activations: bool
    shard: bool
    mixed_precision: str

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""

    @property
    def step_tokens(self) -> int:
        """Tokens of one of them."""

    def rate_factor(self, step: int) -> float:
        """What the learning rate is multiplied by at `step` (from 0)."""


class StepTrainer(Trainer):
    """Trains a model. Samples come in the order of a `TrainingOrder`, whatever the number of processes."""

    def __init__(
        self, model: nn.Module, samples: TrainingOrder, settings: LoopSettings, folder: Path, *, use_cpu: bool,
        on_step: OnStep,
    ):  # fmt: skip
        """`folder` gets the checkpoints. `on_step` is told of each step, on the main process alone."""
        # Trainer calls what trains `model`, and may wrap it; this is the thing itself.
        self._plain, self._settings, self._folder, self._save_into = model, settings, folder, folder
        self._on_step, self._ignored = on_step, samples.ignored
        self.parts, self._whole = dict[str, Tensor](), dict[str, Tensor]()
        args = training_arguments(settings, folder, use_cpu=use_cpu)
        if settings.checkpoint_activations:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if settings.shard:
            shard(model.to(args.device))
        super().__init__(model=model, args=args, train_dataset=samples)
        if settings.shard:  # it is prepared: else Accelerate would replicate it
            self.accelerator.prepare_model = lambda given, **options: given
        # Our loss is normalised by us; else Trainer would leave the division by accumulation steps to the model.
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)
        self.add_callback(_Steps(self))

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        """The samples lie in their order already."""
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """That of the settings."""
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self._settings.rate_factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of this process's part of a step, such that the mean over processes and accumulation steps is the step's."""
        ids = inputs["input_ids"]
        with self.accelerator.autocast():
            outputs = self.forward_states(model, ids)
            total = self.summed_loss(outputs, ids)
        loss = self.share_of_step(total, inputs)
        self.add_parts(loss=loss, main=loss)
        return (loss, outputs) if return_outputs else loss

    def forward_states(self, model: nn.Module, ids_BT: Tensor, **options: Any) -> Any:
        """The model's output with its hidden states. The head is applied in slices, elsewhere; forward itself gives one
        logit row that nothing needs.
        """
        return model(input_ids=ids_BT, use_cache=False, logits_to_keep=1, output_hidden_states=True, **options)

    def summed_loss(self, outputs: Any, ids_BT: Tensor) -> Tensor:
        """Sum over the positions that count of the next token's loss."""
        targets = ids_BT[:, 1:].flatten()
        return self.summed_over_positions(outputs, ids_BT, lambda logits, part: next_token_loss(logits, targets[part]))

    def summed_over_positions(
        self, outputs: Any, ids_BT: Tensor, loss_of_logits: Callable[[Tensor, slice], Tensor]
    ) -> Tensor:
        """Sum over the positions that count of `loss_of_logits(logits [n, V], their slice of all positions)`, [n]."""
        states, counts = outputs.hidden_states[-1][:, :-1].flatten(0, 1), self.counted(ids_BT).flatten()

        def loss_of(part: slice, piece_NC: Tensor) -> Tensor:
            return (loss_of_logits(next_token_logits(self._plain, piece_NC), part) * counts[part]).sum()

        rows = slice_rows(self._plain.config.vocab_size)
        return summed_in_slices(loss_of, states, list(self._plain.lm_head.parameters()), slice_rows=rows)

    def counted(self, ids_BT: Tensor) -> Tensor:
        """Which positions count, bool [B, T - 1]."""
        return ~torch.isin(ids_BT[:, :-1], self._ignored.to(ids_BT.device))

    def share_of_step(self, total: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """A sum over positions as a share of the step's mean, times what Trainer will divide it by."""
        shares = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        return total * (shares / inputs["step_tokens"][0])

    def add_parts(self, *, loss: Tensor, main: Tensor, **more: Tensor) -> None:
        """Figures of this call: sums over the accumulation steps of this process."""
        found = {"loss": loss.detach(), "main": main.detach(), "calls": loss.new_ones(()), **more}
        self.parts = {name: self.parts.get(name, 0) + value for name, value in found.items()}

    def take_parts(self) -> dict[str, Any]:
        """The means of the step that has just ended, over its accumulation steps and all processes, as plain numbers.
        Raises `DivergedError`, in all processes, where the loss is none.
        """
        parts, self.parts = self.accelerator.reduce(self.parts, reduction="sum"), {}
        calls = parts.pop("calls").item()
        means = {name: (value / calls).tolist() for name, value in parts.items()}
        if not math.isfinite(means["loss"]):
            raise DivergedError(
                f"step {self.state.global_step}: the loss is {means['loss']}: the last good checkpoint is kept in "
                f"{self._folder}: begin in another folder with a lower learning rate, or look at the data"
            )
        return means

    def take_step(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """One optimizer step on one batch, outside of `train`: for those who measure what a step costs. Nothing is written.
        Gives the parts of its loss.
        """
        if self.optimizer is None:
            self.create_optimizer()
            self.model_wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.current_gradient_accumulation_steps = 1
        self.training_step(self.model_wrapped, inputs)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self._settings.clip)
        self.optimizer.step()
        self.model.zero_grad()
        return self.take_parts()

    def before_step(self, step: int) -> None:
        """Called before optimizer step `step` (from 0)."""

    def figures(self, done: int, parts: dict[str, Any]) -> dict[str, Any]:
        """What the curve says of a step beyond its loss; `done` steps are done."""
        return {}

    def after_step(self, done: int) -> None:
        """Called on every process when the step's figures are told."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._save_into)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Whole or not at all: see checkpoints.py."""
        if is_sharded(self._plain):
            self._plain.reshard()
        self._whole = gathered(trained_weights(self._plain))
        for name, weight in self._whole.items():
            if not torch.isfinite(weight).all():
                raise DivergedError(
                    f"step {self.state.global_step}: {name} is no longer finite: the last good checkpoint is kept in "
                    f"{self._folder}: begin in another folder with a lower learning rate"
                )
        self._save_into = self._folder / ".partial"
        try:
            super()._save_checkpoint(model, trial)
        finally:
            name, self._save_into = f"checkpoint-{self.state.global_step}", self._folder
            self._whole = {}
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            seal(self._folder / ".partial" / name, self._folder / name)
            drop_old(self._folder, keep=_KEPT_CHECKPOINTS)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """What learns, and nothing else: the rest is the source's."""
        folder = Path(output_dir or self._folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: weight.contiguous() for name, weight in self._whole.items()}, folder / _WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if is_sharded(self._plain):  # in the place of this process's shard
            save_optimizer(self._plain, self.optimizer.optimizer, Path(output_dir), leads=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self._plain):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer(self._plain, self.optimizer.optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self._plain, Path(resume_from_checkpoint))


def load_trained(model: nn.Module, checkpoint: Path) -> None:
    """Put a checkpoint's weights in their places."""
    found, weights = load_file(checkpoint / _WEIGHTS), trained_weights(model)
    assert found.keys() == weights.keys(), "the run's settings were compared before"
    for name, weight in weights.items():
        put(weight, found[name])


class _Steps(TrainerCallback):
    """What happens between steps: figures, and checkpoints."""

    def __init__(self, trainer: StepTrainer):
        self._trainer = trainer
        self._rate = self._begun = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The rate is noted, since it changes with the step."""
        self._trainer.before_step(state.global_step)
        self._rate, self._begun = self._trainer.optimizer.param_groups[0]["lr"], time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Figures out, and a checkpoint where one is due."""
        trainer, done = self._trainer, state.global_step
        settings, parts = trainer._settings, trainer.take_parts()
        point = {
            "step": done, "tokens": done * settings.step_tokens, "loss": parts["loss"], "learning_rate": self._rate,
            "seconds": time.monotonic() - self._begun,
        }  # fmt: skip
        point |= trainer.figures(done, parts)
        if state.is_world_process_zero:
            trainer._on_step(point)
        trainer.after_step(done)
        control.should_save = done >= settings.total_steps or done % settings.save_steps == 0


def ignored_tokens(model: nn.Module) -> Tensor:
    """Tokens at which nothing is learned: padding and the end of a text."""
    config = model.config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return torch.tensor(sorted({one for one in (config.pad_token_id, *ends) if one is not None}), dtype=torch.int64)


def training_arguments(settings: LoopSettings, folder: Path, *, use_cpu: bool) -> TrainingArguments:
    """Trainer's own settings; what it would do by itself (logs, checkpoints, column selection) is off."""
    on_cuda = not use_cpu and torch.cuda.is_available()
    bf16 = on_cuda if settings.mixed_precision == "auto" else settings.mixed_precision == "bfloat16"
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=use_cpu, max_steps=settings.total_steps, bf16=bf16,
        per_device_train_batch_size=settings.sequences_at_once, learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay, adam_beta1=settings.beta1, adam_beta2=settings.beta2,
        max_grad_norm=settings.clip, seed=settings.seed, save_strategy="no", logging_strategy="no", logging_nan_inf_filter=False,
        report_to="none", disable_tqdm=True, remove_unused_columns=False,
        dataloader_pin_memory=on_cuda, average_tokens_across_devices=False, log_level="error",
    )  # fmt: skip
    together = args.world_size * settings.sequences_at_once
    if settings.batch_sequences % together:
        raise UserError(
            f"batch_sequences {settings.batch_sequences}: {args.world_size} processes of {settings.sequences_at_once} sequences "
            "share them equally: use a multiple of their product"
        )
    args.gradient_accumulation_steps = settings.batch_sequences // together
    # A process drives one device: with several in sight, Trainer would split batches over them by itself.
    args._n_gpu = min(args.n_gpu, 1)
    return args
