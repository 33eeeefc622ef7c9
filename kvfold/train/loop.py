"""The training loop that every kind of training shares: optimizer steps on samples in a fixed order, a curve, and checkpoints
that are whole or not there (run_folder.py). What is minimised stands in objectives.py.

One process trains, or several that torchrun started, each of which has the model's weights whole (replicas) or in part (FSDP2):
what they sum, wait for and agree on stands here, too. Such functions are called by all of them, in the same order.
"""

import atexit
import importlib.util
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from kvfold.errors import UserError
from kvfold.eval.progress import OnStep
from kvfold.models.decoder import FoldForCausalLM
from kvfold.record import write_whole_file
from kvfold.train.data import TrainingOrder
from kvfold.train.run_folder import CURVE, PARTIAL, drop_old, newest_whole, read_curve, seal, step_of
from kvfold.train.settings import TrainSettings
from kvfold.train.student import trained_weights

if TYPE_CHECKING:
    from kvfold.train.objectives import NextToken

_PATIENCE = timedelta(hours=12)
"""The leading process may pack text for hours. One that dies is noticed at once, by its closed connections."""


def join(device: torch.device, *, spreads: bool = False) -> torch.device:
    """Meet the other processes, if there are any. Gives the device of this one. Raises `UserError` where weights are to be spread
    over one process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        if spreads:
            raise UserError(
                "fsdp: there is one process, and nothing to spread over: start it with torchrun, or leave it out"
            )
        return device
    on_cuda = device.type == "cuda"
    if on_cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=_PATIENCE)
        atexit.register(dist.destroy_process_group)
    return device


def place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """In place."""
    if dist.is_initialized():
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()


def wait_for_all() -> None:
    """Until every process is here."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


def shard(model: FoldForCausalLM) -> None:
    """Spread the model's parameters, layer by layer, in place; every process has the same weights when it calls this."""
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    for layer in model.model.layers:
        # What is spread together has one dtype, and gates stay in fp32.
        gates = [one for one in (layer.self_attn.fold_norm, layer.self_attn.fold_proj) if one is not None]
        if any(weight.dtype != model.dtype for one in gates for weight in one.parameters()):
            fully_shard(gates, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on it."""
    return isinstance(model, FSDPModule)


def decoder_of(model: FoldForCausalLM) -> Callable[..., Any]:
    """What takes token ids [B, T] to states before the head: the decoder, or a way through the whole model where weights are
    spread, since that is what gathers them; it then makes one row of logits that nothing needs.
    """
    if not is_sharded(model):
        return model.model

    def through(ids_BT: Tensor, **options: Any) -> SimpleNamespace:
        outputs = model(ids_BT, **options | {"logits_to_keep": 1, "output_hidden_states": True})
        return SimpleNamespace(last_hidden_state=outputs.hidden_states[-1], **outputs)

    return through


def whole(weight: Tensor) -> Tensor:
    """A weight in one piece, without its gradient."""
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach()


@torch.no_grad()
def unsharded(model: FoldForCausalLM) -> FoldForCausalLM:
    """A model of its own with the same weights, whole, on the same device; the same model where its weights are."""
    if not is_sharded(model):
        return model
    model.reshard()
    with torch.random.fork_rng(devices=[]):
        plain = FoldForCausalLM(model.config).to(device=model.device, dtype=model.dtype)
    for name, weight in plain.named_parameters():
        weight.copy_(whole(model.get_parameter(name)))
    return plain


_KEPT_CHECKPOINTS = 2


class DivergedError(RuntimeError):
    """A loss or a weight that is no number."""


class Loop:
    """Trains the model of an objective, in `folder`. All processes make the same calls."""

    def __init__(
        self, objective: "NextToken", samples: TrainingOrder, settings: TrainSettings, folder: Path, *, on_step: OnStep
    ):
        """The model is where it is to be trained, see `join`, `shard`. `on_step` is told of each step, on the leading process."""
        self._objective, self._samples, self._settings, self._folder = objective, samples, settings, folder
        self._model, self._on_step, (rank, number) = objective.model, on_step, place()
        self._leads, self._shared, self._sharded = rank == 0, number > 1, is_sharded(objective.model)
        rows = settings.micro_batch_size
        if settings.global_batch_size % (number * rows):
            raise UserError(
                f"global_batch_size {settings.global_batch_size}: {number} processes of {rows} sequences "
                "share them equally: use a multiple of their product"
            )
        starts = range(rank * rows, settings.global_batch_size, number * rows)
        self._parts = [range(start, start + rows) for start in starts]
        if settings.gradient_checkpointing:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        self._weights, self._optimizer = list(trained_weights(self._model).values()), _adamw(self._model, settings)
        self._average = averages(self._model) if settings.weight_average else {}
        self._device, precision = self._model.device, settings.mixed_precision
        self._bf16 = self._device.type == "cuda" if precision == "auto" else precision == "bfloat16"
        self._factors = [settings.rate_factor(step) for step in range(settings.total_steps)]
        # FSDP2 averages over processes what is summed here.
        self._factor = number if self._sharded else 1

    def run(self) -> None:
        """Train from the newest checkpoint on, or from the beginning."""
        settings, checkpoint = self._settings, newest_whole(self._folder)
        if checkpoint is not None:
            load_checkpoint(checkpoint, self._model, self._optimizer, average=self._average)
        first = 0 if checkpoint is None else step_of(checkpoint)
        tokens, total, save_steps = settings.step_tokens, settings.total_steps, settings.save_steps
        with Curve(self._folder, done_steps=first) if self._leads else nullcontext() as curve:
            for done in range(first + 1, total + 1):
                begun, rate = time.monotonic(), settings.learning_rate * self._factors[done - 1]
                sums = self.step(done - 1)
                point = {
                    "step": done, "tokens": done * tokens, "loss": sums["loss"], "learning_rate": rate,
                    "seconds": time.monotonic() - begun, **self._objective.figures(done, sums),
                }  # fmt: skip
                if self._leads:
                    curve.add(point)
                    self._on_step(point)
                self._objective.end(done)
                if done % save_steps == 0 or done == total:
                    self._save(done)
        put_averages(self._model, self._average)

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step. Gives its loss and the objective's other sums, as plain numbers. Raises `DivergedError`, in all
        processes, where the loss is none.
        """
        sums: dict[str, Tensor] = {}
        self._model.train()
        for rows in self._parts:
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
                parts = self._objective.losses(step, self._samples.batch(step, rows, self._device))
            (parts["loss"] * self._factor).backward()
            sums = {name: part.detach() + sums.get(name, 0) for name, part in parts.items()}
        if self._shared:
            sum_over_processes(sums.values())
        figures = {name: total.tolist() for name, total in sums.items()}
        if not math.isfinite(figures["loss"]):
            self._stop(step + 1, f"the loss is {figures['loss']}")
        if self._shared and not self._sharded:
            sum_over_processes(weight.grad for weight in self._weights if weight.grad is not None)
        nn.utils.clip_grad_norm_(self._weights, self._settings.max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * self._factors[step]
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._average:
            # The first steps, of a large rate, are soon forgotten.
            share = max(1 - self._settings.weight_average, 1 / (step + 2))
            for mean, weight in zip(self._average.values(), self._weights, strict=True):
                mean.lerp_(weight.detach(), share)
        return figures

    def _stop(self, step: int, what: str) -> NoReturn:
        raise DivergedError(
            f"step {step}: {what}: the last good checkpoint is kept in {self._folder}: begin in another folder with a lower "
            "learning rate, or look at the data"
        )

    def _save(self, done: int) -> None:
        """A checkpoint: whole or not at all, see run_folder.py."""
        if self._sharded:
            self._model.reshard()
        for name, weight in trained_weights(self._model).items():
            if not torch.isfinite(whole(weight)).all():
                self._stop(done, f"{name} is no longer finite")
        names = [f"{PARTIAL}{os.getpid()}"]
        if self._shared:  # the leading process's holds for all
            dist.broadcast_object_list(names, src=0, device=torch.device("cpu"))
        partial = self._folder / names[0]
        try:
            save_checkpoint(partial, self._model, self._optimizer, self._average)
            if self._leads:
                seal(partial, self._folder / f"checkpoint-{done}")
                drop_old(self._folder, keep=_KEPT_CHECKPOINTS)
        finally:
            if self._leads:
                shutil.rmtree(partial, ignore_errors=True)
        wait_for_all()


class Curve:
    """The record of a run, a line of JSON for each step, and the same for TensorBoard where that is installed."""

    def __init__(self, folder: Path, *, done_steps: int):
        """`done_steps`: steps of the checkpoint that the run goes on from; later lines are dropped."""
        self._path = folder / CURVE
        kept = [point for point in read_curve(self._path) if point["step"] <= done_steps]
        write_whole_file(self._path, "".join(json.dumps(point) + "\n" for point in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._board = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done_steps + 1)

    def add(self, point: Mapping[str, Any]) -> None:
        """One step: `step`, and numbers or lists of numbers under any names. On the disk before a checkpoint of the step is."""
        self._file.write(json.dumps(point) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        for name, value in point.items() if self._board is not None else ():
            several = isinstance(value, list)
            for index, one in enumerate(value if several else [value] if name != "step" else []):
                self._board.add_scalar(f"{name}/{index}" if several else name, one, point["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def averages(model: nn.Module) -> dict[str, Tensor]:
    """Room for a moving average of what learns, by name; at first what it is now."""
    return {name: weight.detach().clone() for name, weight in trained_weights(model).items()}


@torch.no_grad()
def put_averages(model: nn.Module, average: Mapping[str, Tensor]) -> None:
    """Put a moving average in the place of what learns; an empty one changes nothing."""
    weights = trained_weights(model)
    for name, value in average.items():
        weights[name].copy_(value)


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor]
) -> None:
    """What learns, its moving average (empty = none), and the optimizer's state: each process writes its part."""
    state = {"weights": trained_weights(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    _move(dcp.save, state | ({"average": average} if average else {}), folder)


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    average: Mapping[str, Tensor] | None = None,
) -> None:
    """Put a checkpoint's weights in their places, and the optimizer's state and the moving average where one is given."""
    state: dict[str, Any] = {"weights": trained_weights(model)}
    if average:
        state["average"] = average
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    _move(dcp.load, state, folder)
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])


def load_result(folder: Path, model: nn.Module, settings: TrainSettings) -> None:
    """Put what a run gives into the model: a checkpoint's weights, or their moving average where the settings ask for one."""
    average = averages(model) if settings.weight_average else {}
    load_checkpoint(folder, model, average=average)
    put_averages(model, average)


def _move(save_or_load: Callable[..., Any], state: dict[str, Any], folder: Path) -> None:
    """Without torch's warning that there is one process alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save_or_load(state, checkpoint_id=folder, no_dist=place()[1] == 1)


def _adamw(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW for what learns; weight decay is for matrices alone."""
    groups: dict[tuple[bool, float], list[Tensor]] = {
        (True, settings.learning_rate): [],
        (False, settings.learning_rate): [],
    }
    for name, weight in trained_weights(model).items():
        groups.setdefault((weight.ndim > 1, settings.rate_of(name)), []).append(weight)
    return torch.optim.AdamW(
        [
            {"params": weights, "weight_decay": settings.weight_decay * is_matrix, "peak": peak}
            for (is_matrix, peak), weights in groups.items()
        ],
        lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=True,
    )  # fmt: skip
