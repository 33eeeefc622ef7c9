"""The control of a DMC retrofit: the same LoRA, text, order and learning rate with gates off, step by step.

    python studies/dmc_control.py MODEL OUT.jsonl --data TEXT ... [--arm plain|freed|gated] [--rate 1.0] [--steps 48]

A run of `smollm2-dmc-lora-cpu` distils a model from itself, so whatever KL it shows with its gates off is the price of the
optimizer alone. Arms: `gated` is the retrofit itself, `freed` has its gates off and the decision channel faded out just as
there, `plain` has its gates off and nothing faded: it starts at a KL of zero. `--rate` multiplies the learning rate. Each line of
OUT is one step; a run that was stopped resumes from its checkpoint.
"""

import argparse
import contextlib
import json
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

import kvfold
from kvfold.record import made
from kvfold.train.data import TrainingOrder, draw_text
from kvfold.train.design_space import read_recipe
from kvfold.train.loop import Loop
from kvfold.train.objectives import Distillation, ignored_tokens
from kvfold.train.run_folder import newest_whole, step_of
from kvfold.train.settings import RetrofitSettings
from kvfold.train.student import make_student, trained_weights

FREED_CHANNEL = 48
"""What `find_channel` found for SmolLM2-135M (results/runs/dmc-4x.json, `freed`)."""


class _Enough(Exception):
    """The steps that were asked for are done: before the last planned one, so that rates and text are those of the whole run."""


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
    text = draw_text(settings.data, tokenizer, tokens=settings.tokens, seq_len=1024, seed=settings.seed)
    model.train()
    student = make_student(model, settings)
    stages = settings.stages
    samples = TrainingOrder(
        text.train, steps=stages.total, batch=settings.global_batch_size, seed=settings.seed,
        ignored=ignored_tokens(model),
    )  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "arm": args.arm, "rate": args.rate, "model": args.name, **made(torch.get_num_threads(), str(model.dtype)),
        "transformers": version("transformers"), "peft": version("peft"),
        "trained_parameters": sum(one.numel() for one in trained_weights(model).values()),
    }  # fmt: skip
    sys.stdout.write(json.dumps({**about, "settings": settings.model_dump(mode="json")}) + "\n")
    began = time.monotonic()

    def on_step(point: dict) -> None:
        point.pop("layer_compression", None)
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**point, "wall_seconds": time.monotonic() - began, **about}) + "\n")
        if point["step"] == args.steps:
            raise _Enough

    objective = Distillation(student, settings, ignored_tokens(model), on_unit=lambda unit, model: None)
    if args.arm != "gated":  # gates stay shut for the whole run
        factors = [one.channel_factor if args.arm == "freed" else 1.0 for one in objective.targets]
        objective.targets = [
            replace(one, channel_factor=0.0 if factor is None else factor)
            for one, factor in zip(objective.targets, factors, strict=True)
        ]
    checkpoint = newest_whole(args.work)
    done = 0 if checkpoint is None else step_of(checkpoint)
    lines = args.out.read_text(encoding="utf-8").splitlines() if args.out.exists() else []
    if len(lines) >= args.steps:
        return
    # The steps after the checkpoint come again.
    args.out.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= done), encoding="utf-8")
    with contextlib.suppress(_Enough):
        Loop(objective, samples, settings, args.work, on_step=on_step).run()


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
