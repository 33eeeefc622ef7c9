"""What a step of a retrofit costs: its loss, gradients and optimizer, against the same step with gates off.

Both sides run the training loop's own code and take turns, round after round, so that whatever else the machine does hits both;
ratios are taken within a round. The side without gates has the same weights, the same trainable weights but the gates',
and the same loss: it is what `kvfold retrofit --control` trains.
"""

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kvfold.errors import UserError
from kvfold.eval.progress import Report, silent
from kvfold.eval.reading import method_about
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.decoder import FoldForCausalLM
from kvfold.train.calibrate import shift_gates
from kvfold.train.data import TrainingOrder
from kvfold.train.loop import Loop
from kvfold.train.objectives import Distillation, ignored_tokens
from kvfold.train.settings import RetrofitSettings
from kvfold.train.student import Student, check_method, make_student, retention_of, trained_weights

METHODS = ("dms:128", "dmc")
_COMPRESSION = 4.0
"""Asked for where the sequence allows it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPoint:
    """The size of a step, and what is trained in it."""

    sequence_tokens: int = 1024
    """Tokens of a sequence."""
    batch_sequences: int = 1
    """Sequences of the step, computed side by side."""
    trains: Literal["full", "lora", "adapter"] = "full"
    """All weights, a low-rank addition, or the gates alone (DMS)."""

    def __post_init__(self) -> None:
        for name, least in (("sequence_tokens", 2), ("batch_sequences", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} {getattr(self, name)}: a step has {least} or more: ask for more")
        if self.trains not in ("full", "lora", "adapter"):
            raise UserError(f"train '{self.trains}': a step trains 'full', 'lora' or 'adapter': write one of them")


def bench_train(
    model: FoldForCausalLM,
    *,
    name: str,
    methods: Sequence[str] = METHODS,
    point: StepPoint | None = None,
    repeats: int = 3,
    seed: int = 0,
    report: Report = silent,
) -> dict[str, Any]:
    """A result of kind `step`: a row for each method. `methods` are `--time` texts.

    Random tokens. The steps train the model's own weights: what it says afterwards is of no use. Needs `kvfold[train]`.
    Raises `UserError` for a method that is not trained, or a sequence that is too long for the model or too short for
    the method, before anything is timed.
    """
    point = point or StepPoint()
    if repeats < 1:
        raise UserError(f"{repeats} repeats: 1 or more are measured: ask for more")
    if point.sequence_tokens > model.config.max_position_embeddings:
        raise UserError(
            f"sequence {point.sequence_tokens:,}: the model reads {model.config.max_position_embeddings:,} tokens at most: "
            "use shorter sequences"
        )
    plans = [step_settings(model, method, point, seed) for method in dict.fromkeys(methods)]
    rows = [_measure(model, settings, repeats, report) for settings in plans]
    return {
        "model": {"name": name, "parameters": model.num_parameters()},
        "environment": {
            "device": model.device.type,
            "accelerator": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None,
            # On a GPU training computes in bf16 over weights of this dtype.
            "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        },
        "repeats": repeats,
        "rows": rows,
    }


def step_settings(model: FoldForCausalLM, method: str, point: StepPoint, seed: int = 0) -> RetrofitSettings:
    """The settings of a retrofit whose every step is at its target. Raises `UserError` for one that can't be run."""
    given = {
        "time": method, "trains": point.trains, "seq_len": point.sequence_tokens, "ramp_steps": 0, "tail_steps": 1,
        "global_batch_size": point.batch_sequences, "micro_batch_size": point.batch_sequences, "seed": seed,
    }  # fmt: skip
    plain = RetrofitSettings(**given, compression=1.0)
    check_method(model, plain)
    most = retention_of(model, plain).compression_for(1.0)
    if most <= 1:
        raise UserError(
            f"sequence {point.sequence_tokens:,}: {method} drops nothing in so few tokens: use longer sequences, or less delay"
        )
    return RetrofitSettings(**given, compression=min(_COMPRESSION, (1 + most) / 2))


def make_sides(model: FoldForCausalLM, settings: RetrofitSettings) -> tuple[Student, Student]:
    """The student with gates and the one without. Both share the model's weights, and its frozen copy where there is a
    teacher of its own; the gates' and the LoRA's weights are each side's.
    """
    teacher = copy.deepcopy(model) if settings.trains == "full" and settings.distils != "none" else None
    gated = make_student(_sharing(model), settings, teacher=teacher)
    _fire(gated.model, settings)
    plain = _sharing(model)
    plain.config.layout, plain.config.gates = plain.config.layout.base(), None
    if settings.trains != "adapter":
        return gated, make_student(plain, control_of(settings), teacher=teacher)
    plain.requires_grad_(False)
    # Nothing of it learns; its gradients go as far as those of the lowest gate do.
    plain.enable_input_require_grads()
    return gated, Student(model=plain, teacher=None)


def _fire(model: FoldForCausalLM, settings: RetrofitSettings) -> None:
    """New gates shifted so that, by their noise, they fire as often as trained ones: a key that is let go may cost a CPU more
    than one that stays (`flush_denormals`).
    """
    share = retention_of(model, settings).share_for(settings.compression)
    shift_gates(model, model.config.gate_config.offset + math.log(share / (1 - share)))


def control_of(settings: RetrofitSettings) -> RetrofitSettings:
    """The same loss and the same steps without a method."""
    if settings.trains != "adapter":
        return settings.with_values(control=True)
    return settings.with_values(time=None, trains="full", kl=settings.distils)


def _sharing(model: FoldForCausalLM) -> FoldForCausalLM:
    """The same weights in modules, and under a config, of its own."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def _measure(model: FoldForCausalLM, settings: RetrofitSettings, repeats: int, report: Report) -> dict[str, Any]:
    """Rounds of one method: with gates once, without once."""
    students = make_sides(model, settings)
    samples = random_samples(model, settings)
    what, total = f"steps, {settings.time}", 2 * (repeats + 1)
    seconds: tuple[list[float], list[float]] = ([], [])
    with tempfile.TemporaryDirectory() as folder:
        sides = [
            make_loop(student, plan, samples, Path(folder))
            for student, plan in zip(students, (settings, control_of(settings)), strict=True)
        ]
        for number in range(total):
            turn, side = divmod(number, 2)
            report(what, number, total)
            # The first round makes the optimizers' state and warms up.
            taken = _timed_step(sides[side], model.device)
            if turn:
                seconds[side].append(taken)
        report(what, total, total)
    return _row(students[0].model.config.layout, settings, students, *seconds)


def make_loop(student: Student, settings: RetrofitSettings, samples: TrainingOrder, folder: Path) -> Loop:
    """The training loop of one side, whose step 0 is taken again and again; `folder` stays empty."""
    objective = Distillation(student, settings, ignored_tokens(student.model), on_unit=_nobody)
    return Loop(objective, samples, settings, folder, on_step=_nobody)


def _nobody(*told: Any) -> None:
    """Nobody listens."""


def random_samples(model: FoldForCausalLM, settings: RetrofitSettings) -> TrainingOrder:
    """One step's, of random ids."""
    draw = torch.Generator().manual_seed(settings.seed)
    shape = (settings.global_batch_size, settings.seq_len)
    return TrainingOrder(
        torch.randint(0, model.config.vocab_size, shape, generator=draw), steps=1, batch=settings.global_batch_size,
        seed=settings.seed, ignored=ignored_tokens(model),
    )  # fmt: skip


def _timed_step(loop: Loop, device: torch.device) -> float:
    """Seconds of one step, all work of the device included."""
    begun = _now(device)
    loop.step(0)
    return _now(device) - begun


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _row(
    layout: KVLayout, settings: RetrofitSettings, students: tuple[Student, Student], gated: list[float], plain: list[float]
) -> dict[str, Any]:  # fmt: skip
    counts = [sum(weight.numel() for weight in trained_weights(student.model).values()) for student in students]
    pairs = zip(gated, plain, strict=True)
    return {
        **method_about(layout),
        "trains": settings.trains,
        "gates": settings.gate_source,
        "loss": settings.distils,
        "sequence_tokens": settings.seq_len,
        "batch_sequences": settings.global_batch_size,
        "with_gates": _figures(gated, settings.step_tokens) | {"trained_parameters": counts[0]},
        "gates_off": _figures(plain, settings.step_tokens) | {"trained_parameters": counts[1]},
        "ratio": _spread([mine / other for mine, other in pairs]),
    }


def _figures(seconds: list[float], tokens: int) -> dict[str, Any]:
    return {
        "step_ms": _spread([1000 * one for one in seconds]),
        "tokens_per_second": _spread([tokens / one for one in seconds]),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
