"""The training loop that every kind of training shares: optimizer steps on samples in a fixed order, a curve, and checkpoints
that are whole or not there. What is minimised stands in objectives.py.
"""

import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from kvfold.errors import UserError
from kvfold.train.checkpoints import PARTIAL, drop_old, newest_whole, seal, step_of
from kvfold.train.data import Batch, TrainingOrder
from kvfold.train.processes import is_sharded, leaders, place, sum_over_processes, wait_for_all, whole
from kvfold.train.student import trained_weights

_KEPT_CHECKPOINTS = 2

OnStep = Callable[[dict[str, Any]], None]
"""Takes the figures of a step that is done."""


class DivergedError(RuntimeError):
    """A loss or a weight that is no number."""


class LoopSettings(Protocol):
    """What the loop asks of the settings of a run."""

    batch_sequences: int
    sequences_at_once: int
    learning_rate: float
    weight_decay: float
    beta1: float
    beta2: float
    clip: float
    save_steps: int
    checkpoint_activations: bool
    mixed_precision: str
    total_steps: int
    step_tokens: int

    def rate_factor(self, step: int) -> float:
        """What the learning rate is multiplied by at `step` (from 0)."""


class Objective(Protocol):
    """What is minimised, and what happens beside that. Steps are counted from 0, `done` is how many were made."""

    model: nn.Module

    def begin(self, step: int) -> None:
        """Called before a step."""

    def losses(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """`loss`, and other figures, of a part of a step's batch; the sum over all parts is the step's."""

    def figures(self, done: int, sums: dict[str, Any]) -> dict[str, Any]:
        """What the curve says of a step beyond its loss."""

    def end(self, done: int) -> None:
        """Called after a step, when its figures are told."""


class Loop:
    """Trains the model of an objective, in `folder`. All processes make the same calls."""

    def __init__(
        self, objective: Objective, samples: TrainingOrder, settings: LoopSettings, folder: Path, *, on_step: OnStep
    ):
        """The model is where it is to be trained, see processes.py. `on_step` is told of each step, on the leading process."""
        self._objective, self._samples, self._settings, self._folder = objective, samples, settings, folder
        self._model, self._on_step, (rank, number) = objective.model, on_step, place()
        rows = settings.sequences_at_once
        if settings.batch_sequences % (number * rows):
            raise UserError(
                f"batch_sequences {settings.batch_sequences}: {number} processes of {rows} sequences "
                "share them equally: use a multiple of their product"
            )
        starts = range(rank * rows, settings.batch_sequences, number * rows)
        self._parts = [range(start, start + rows) for start in starts]
        if settings.checkpoint_activations:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        self._weights, self._optimizer = list(trained_weights(self._model).values()), _adamw(self._model, settings)
        device, precision = self._model.device.type, settings.mixed_precision
        self._bf16 = device == "cuda" if precision == "auto" else precision == "bfloat16"
        self._rates = [settings.learning_rate * settings.rate_factor(step) for step in range(settings.total_steps)]
        # FSDP2 averages over processes what is summed here.
        self._factor = number if is_sharded(self._model) else 1

    def run(self) -> None:
        """Train from the newest checkpoint on, or from the beginning."""
        settings, checkpoint = self._settings, newest_whole(self._folder)
        if checkpoint is not None:
            load_checkpoint(checkpoint, self._model, self._optimizer)
        for step in range(0 if checkpoint is None else step_of(checkpoint), settings.total_steps):
            begun, done = time.monotonic(), step + 1
            sums = self.step(step)
            point = {
                "step": done, "tokens": done * settings.step_tokens, "loss": sums["loss"], "learning_rate": self._rates[step],
                "seconds": time.monotonic() - begun,
            }  # fmt: skip
            point |= self._objective.figures(done, sums)
            if place()[0] == 0:
                self._on_step(point)
            self._objective.end(done)
            if done % settings.save_steps == 0 or done == settings.total_steps:
                self._save(done)

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step. Gives its loss and the objective's other sums, as plain numbers. Raises `DivergedError`, in all
        processes, where the loss is none.
        """
        sums: dict[str, Tensor] = {}
        self._model.train()
        self._objective.begin(step)
        for rows in self._parts:
            with torch.autocast(self._model.device.type, torch.bfloat16, enabled=self._bf16):
                parts = self._objective.losses(step, self._samples.batch(step, rows).to(self._model.device))
            (parts["loss"] * self._factor).backward()
            sums = {name: part.detach() + sums.get(name, 0) for name, part in parts.items()}
        sum_over_processes(sums.values())
        figures = {name: total.tolist() for name, total in sums.items()}
        self._check(math.isfinite(figures["loss"]), step + 1, f"the loss is {figures['loss']}")
        if not is_sharded(self._model):
            sum_over_processes(weight.grad for weight in self._weights if weight.grad is not None)
        nn.utils.clip_grad_norm_(self._weights, self._settings.clip)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rates[step]
        self._optimizer.step()
        self._optimizer.zero_grad()
        return figures

    def _check(self, is_good: bool, step: int, what: str) -> None:
        if not is_good:
            raise DivergedError(
                f"step {step}: {what}: the last good checkpoint is kept in {self._folder}: begin in another folder with a lower "
                "learning rate, or look at the data"
            )

    def _save(self, done: int) -> None:
        """A checkpoint: whole or not at all, see checkpoints.py."""
        if is_sharded(self._model):
            self._model.reshard()
        for name, weight in trained_weights(self._model).items():
            self._check(bool(torch.isfinite(whole(weight)).all()), done, f"{name} is no longer finite")
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = Path(leaders(lambda: tempfile.mkdtemp(prefix=PARTIAL, dir=self._folder)))
        try:
            save_checkpoint(partial, self._model, self._optimizer)
            if place()[0] == 0:
                seal(partial, self._folder / f"checkpoint-{done}")
                drop_old(self._folder, keep=_KEPT_CHECKPOINTS)
        finally:
            if place()[0] == 0:
                shutil.rmtree(partial, ignore_errors=True)
        wait_for_all()


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What learns, and the optimizer's state: each process writes its part."""
    state = {"weights": trained_weights(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    with _one_process_is_enough():
        dcp.save(state, checkpoint_id=folder, no_dist=place()[1] == 1)


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put a checkpoint's weights in their places, and the optimizer's state where one is given."""
    state: dict[str, Any] = {"weights": trained_weights(model)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    with _one_process_is_enough():
        dcp.load(state, checkpoint_id=folder, no_dist=place()[1] == 1)
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])


@contextmanager
def _one_process_is_enough() -> Iterator[None]:
    """Without torch's warning that there is no other."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _adamw(model: nn.Module, settings: LoopSettings) -> torch.optim.Optimizer:
    """AdamW for what learns; weight decay is for matrices alone."""
    weights = list(trained_weights(model).values())
    matrices, others = [one for one in weights if one.ndim > 1], [one for one in weights if one.ndim < 2]
    groups = [(matrices, settings.weight_decay), (others, 0.0)]
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": decay} for params, decay in groups],
        lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=True,
    )  # fmt: skip
