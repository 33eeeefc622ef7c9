"""What a step of a retrofit costs: its loss, gradients and optimizer, against the same step with gates off.

Both sides run the training loop's own code. The side without gates has the same weights, the same trainable weights but the
gates', and the same loss: it is what `kvfold retrofit --control` trains.
"""

import copy
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kvfold.bench.measuring import check_size, in_turns, measured_on, ratios, seconds, spread
from kvfold.errors import UserError
from kvfold.eval.progress import Report, silent
from kvfold.eval.reading import method_about
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
    """The size of a step, its sequences computed side by side, and what is trained in it: all weights, a low-rank addition, or
    the gates alone (DMS).
    """

    sequence_tokens: int = 1024
    batch_sequences: int = 1
    trains: Literal["full", "lora", "adapter"] = "full"

    def __post_init__(self) -> None:
        for name, least in (("sequence_tokens", 2), ("batch_sequences", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} {getattr(self, name)}: a step has {least} or more: ask for more")
        if self.trains not in ("full", "lora", "adapter"):
            raise UserError(f"train '{self.trains}': a step trains 'full', 'lora' or 'adapter': write one of them")


def bench_train(
    model: FoldForCausalLM, *, name: str, methods: Sequence[str] = METHODS, point: StepPoint | None = None, repeats: int = 3,
    report: Report = silent,
) -> dict[str, Any]:  # fmt: skip
    """A result of kind `step`: a row for each method. `methods` are `--time` texts.

    Random tokens. The steps train the model's own weights: what it says afterwards is of no use. Needs `kvfold[train]`.
    Raises `UserError` for a method that is not trained, or a sequence that is too long for the model or too short for
    the method, before anything is timed. On a GPU training computes in bf16 over weights of the dtype that is told.
    """
    point = point or StepPoint()
    check_size(model, "a sequence", point.sequence_tokens, repeats)
    plans = [step_settings(model, method, point) for method in dict.fromkeys(methods)]
    rows = [_measure(model, settings, repeats, report) for settings in plans]
    accelerator = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None
    return measured_on(model, name, accelerator=accelerator) | {"repeats": repeats, "rows": rows}


def step_settings(model: FoldForCausalLM, method: str, point: StepPoint) -> RetrofitSettings:
    """The settings of a retrofit whose every step is at its target. Raises `UserError` for one that can't be run."""
    given = {
        "time": method, "trains": point.trains, "seq_len": point.sequence_tokens, "ramp_steps": 0, "tail_steps": 1,
        "global_batch_size": point.batch_sequences, "micro_batch_size": point.batch_sequences, "seed": 0,
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
    # New gates shifted so that, by their noise, they fire as often as trained ones: a key that is let go may cost a CPU more than
    # one that stays (`flush_denormals`).
    share = retention_of(gated.model, settings).share_for(settings.compression)
    shift_gates(gated.model, gated.model.config.gate_config.offset + math.log(share / (1 - share)))
    plain = _sharing(model)
    plain.config.layout, plain.config.gates = plain.config.layout.base(), None
    if settings.trains != "adapter":
        return gated, make_student(plain, control_of(settings), teacher=teacher)
    plain.requires_grad_(False)
    # Nothing of it learns; its gradients go as far as those of the lowest gate do.
    plain.enable_input_require_grads()
    return gated, Student(model=plain, teacher=None)


def control_of(settings: RetrofitSettings) -> RetrofitSettings:
    """The same loss and the same steps without a method."""
    if settings.trains != "adapter":
        return settings.with_values(control=True)
    return settings.with_values(time=None, trains="full", kl=settings.distils)


def _sharing(model: FoldForCausalLM) -> FoldForCausalLM:
    """The same weights in modules, and under a config, of its own."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def _measure(model: FoldForCausalLM, settings: RetrofitSettings, repeats: int, report: Report) -> dict[str, Any]:
    """Rounds of one method: with gates once, without once. The first makes the optimizers' state and warms up."""
    students, samples = make_sides(model, settings), random_samples(model, settings)
    with tempfile.TemporaryDirectory() as folder:
        loops = [
            make_loop(student, plan, samples, Path(folder))
            for student, plan in zip(students, (settings, control_of(settings)), strict=True)
        ]
        timed = [lambda _, loop=loop: _timed_step(loop, model.device) for loop in loops]
        gated, plain = in_turns(timed, repeats, f"steps, {settings.time}", report, warm_up=True)
    return {
        **method_about(students[0].model.config.layout), "trains": settings.trains, "gates": settings.gate_source,
        "loss": settings.distils, "sequence_tokens": settings.seq_len, "batch_sequences": settings.global_batch_size,
        "with_gates": _figures(gated, settings, students[0]), "gates_off": _figures(plain, settings, students[1]),
        "ratio": ratios(gated, plain),
    }  # fmt: skip


def make_loop(student: Student, settings: RetrofitSettings, samples: TrainingOrder, folder: Path) -> Loop:
    """The training loop of one side, whose step 0 is taken again and again; `folder` stays empty."""
    objective = Distillation(student, settings, ignored_tokens(student.model), on_unit=lambda *_: None)
    return Loop(objective, samples, settings, folder, on_step=lambda *_: None)


def random_samples(model: FoldForCausalLM, settings: RetrofitSettings) -> TrainingOrder:
    """One step's, of random ids."""
    draw = torch.Generator().manual_seed(settings.seed)
    shape = (settings.global_batch_size, settings.seq_len)
    return TrainingOrder(
        torch.randint(0, model.config.vocab_size, shape, generator=draw), steps=1, batch=settings.global_batch_size,
        seed=settings.seed, ignored=ignored_tokens(model),
    )  # fmt: skip


def _timed_step(loop: Loop, device: torch.device) -> float:
    return seconds(lambda: loop.step(0), device)


def _figures(taken: list[float], settings: RetrofitSettings, student: Student) -> dict[str, Any]:
    return {
        "step_ms": spread([1000 * one for one in taken]),
        "tokens_per_second": spread([settings.step_tokens / one for one in taken]),
        "trained_parameters": sum(weight.numel() for weight in trained_weights(student.model).values()),
    }
