"""The control of a DMC retrofit: the same LoRA, text, order and learning rate with gates off, step by step.

    python studies/dmc_control.py MODEL OUT.jsonl --data TEXT ... [--arm plain|freed|gated] [--rate 1.0] [--steps 48]

A run of `smollm2-dmc-lora-cpu` distils a model from itself, so whatever KL it shows with its gates off is the price of the
optimizer alone. Arms: `gated` is the retrofit itself, `freed` has its gates off and the decision channel faded out just as
there, `plain` has its gates off and nothing faded: it starts at a KL of zero. `--rate` multiplies the learning rate. Each line of
OUT is one step; a run that was stopped resumes from its checkpoint.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import TrainerCallback

import kvfold
from kvfold.record import made
from kvfold.train.checkpoints import newest_whole, step_of
from kvfold.train.data import TrainingOrder, draw_text
from kvfold.train.loop import ignored_tokens
from kvfold.train.recipes import read_recipe
from kvfold.train.schedules import Stages
from kvfold.train.settings import RetrofitSettings
from kvfold.train.student import make_student, trained_weights
from kvfold.train.trainer import RetrofitTrainer

FREED_CHANNEL = 48
"""What `find_channel` found for SmolLM2-135M (results/runs/dmc-4x.json, `freed`)."""


class _Closed:
    """Stages in which the gates never open: the zero-out goes on to the end, or does not begin."""

    def __init__(self, stages: Stages, *, frees: bool):
        self._stages, self._frees = stages, frees

    def zero_out_factor(self, step: int) -> float:
        """What the freed channel is multiplied by at `step` (from 0)."""
        if not self._frees:
            return 1.0
        factor = self._stages.zero_out_factor(step)
        return 0.0 if factor is None else factor

    def __getattr__(self, name: str):
        return getattr(self._stages, name)


class _ControlTrainer(RetrofitTrainer):
    """The retrofit's own trainer under other stages."""

    def close_gates(self, *, frees: bool) -> None:
        """Gates stay shut for the whole run."""
        self._stages = _Closed(self._stages, frees=frees)


class _StopAfter(TrainerCallback):
    """Ends a run before its last planned step, so that rates and text are those of the whole run."""

    def __init__(self, steps: int):
        self._steps = steps

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Stop once the steps are done."""
        control.should_training_stop = state.global_step >= self._steps


def settings_of(data: list[str], *, rate: float, teacher_states: str | None) -> RetrofitSettings:
    """The recipe's settings at 4x on 262,144 tokens, as in results/runs/dmc-4x.json."""
    values = read_recipe("smollm2-dmc-lora-cpu", RetrofitSettings)
    values |= {
        "compression": 4.0, "data": tuple(data), "tokens": 262_144, "find_channel": False, "channel": FREED_CHANNEL,
        "learning_rate": values["learning_rate"] * rate, "teacher_states": teacher_states, "save_steps": 8,
    }  # fmt: skip
    return RetrofitSettings(**values)


def run(args: argparse.Namespace) -> None:
    """Train, and write a line for each step."""
    settings = settings_of(args.data, rate=args.rate, teacher_states=args.teacher_states)
    model, tokenizer = kvfold.load(args.model), kvfold.load_tokenizer(args.model)
    text = draw_text(settings.data, tokenizer, tokens=settings.tokens, sequence_tokens=1024, seed=settings.seed)
    model.train()
    student = make_student(model, settings)
    stages = settings.stages
    samples = TrainingOrder(
        text.train, steps=stages.total, batch=settings.batch_sequences, seed=settings.seed,
        ignored=ignored_tokens(model).tolist(),
    )  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "arm": args.arm, "rate": args.rate, "model": args.name, **made(torch.get_num_threads(), str(model.dtype)),
        "transformers": version("transformers"), "peft": version("peft"),
        "trained_parameters": sum(one.numel() for one in trained_weights(model).values()),
    }  # fmt: skip
    sys.stdout.write(json.dumps({**about, "settings": asdict(settings)}) + "\n")
    began = time.monotonic()

    def on_step(point: dict) -> None:
        point.pop("layer_compression", None)
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**point, "wall_seconds": time.monotonic() - began, **about}) + "\n")

    trainer = _ControlTrainer(
        student, samples, settings, args.work, use_cpu=True, on_step=on_step, on_unit=lambda unit, model: None
    )
    if args.arm != "gated":
        trainer.close_gates(frees=args.arm == "freed")
    trainer.add_callback(_StopAfter(args.steps))
    checkpoint = newest_whole(args.work)
    done = 0 if checkpoint is None else step_of(checkpoint)
    if args.out.exists():  # the steps after the checkpoint come again
        lines = [line for line in args.out.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= done]
        args.out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if done < args.steps:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a model's folder")
    parser.add_argument("out", type=Path, help="a file of JSON lines, one a step")
    parser.add_argument("--data", action="append", required=True, help="a text file, as for `kvfold retrofit`")
    parser.add_argument("--arm", choices=("plain", "freed", "gated"), default="freed")
    parser.add_argument("--rate", type=float, default=1.0, help="factor of the learning rate")
    parser.add_argument("--steps", type=int, default=48, help="steps of 1,024 tokens, of the 256 that are planned")
    parser.add_argument("--work", type=Path, required=True, help="a folder for checkpoints")
    parser.add_argument("--teacher-states", help="a folder for what the teacher computed before")
    parser.add_argument("--name", default="SmolLM2-135M-Instruct.Q4_1", help="what the model is called in the lines")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
