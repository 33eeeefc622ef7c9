"""k-hop associative recall from scratch: layouts of keys and values by the hops and the pairs that they can do.

    python studies/recall.py OUT.jsonl --variant mqa --variant mqa-cla2 --seed 0 --seed 1 [--set steps=1500 --task pairs=2,4,8]

A line for each variant and seed, with the curve of its test; runs that OUT holds already are not made again, and a run that was
stopped resumes from WORK. Runs of one seed see the same texts in the same order.
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from recall_task import VARIANTS, RecallRun, RecallTask, description, train

from kvfold.record import made

_KINDS = {"optimizer": str, "lr": float, "adam_lr": float, "rope_theta": float}


def run_of(args: argparse.Namespace, variant: str, seed: int) -> RecallRun:
    """The run that the command line describes."""
    task = {}
    for text in args.task:
        name, value = text.split("=")
        numbers = tuple(int(one) for one in value.split(","))
        task[name] = numbers[0] if name == "symbols" else numbers
    values = {}
    for text in args.set:
        name, value = text.split("=")
        numbers = tuple(int(one) for one in value.split(",")) if name == "hop_steps" else None
        values[name] = _KINDS.get(name, int)(value) if numbers is None else numbers
    return RecallRun(task=RecallTask(**task), seed=seed, **values).with_variant(variant)


def make(run: RecallRun, variant: str, args: argparse.Namespace) -> None:
    """Train one model, and write its line."""
    about = json.loads(json.dumps({"study": args.name, "variant": variant, **description(run)}))
    lines = args.out.read_text(encoding="utf-8").splitlines() if args.out.exists() else []
    if any(about.items() <= json.loads(line).items() for line in lines):
        return
    state_path = args.work / f"{args.name}-{variant}-{run.seed}.pt"
    state, points = None, []
    if state_path.exists():
        held = torch.load(state_path, weights_only=False)
        if held["about"] == about:
            state, points = held["state"], held["points"]

    def on_point(point: dict) -> None:
        points.append(point)
        shares = " ".join(f"{name} {value:.2f}" for name, value in point["accuracy"].items())
        sys.stdout.write(
            f"{variant} {run.seed} {point['step']}: {point['loss']:.3f} {shares} ({point['cpu_seconds']:.0f} s)\n"
        )
        sys.stdout.flush()

    def on_state(state: dict) -> None:
        partial = state_path.with_suffix(".partial")
        torch.save({"about": about, "state": state, "points": points}, partial)
        partial.replace(state_path)

    args.work.mkdir(parents=True, exist_ok=True)
    train(run, on_point=on_point, every=args.every, state=state, on_state=on_state)
    row = {
        **about, "points": points, **made(torch.get_num_threads(), str(torch.get_default_dtype())),
        "transformers": version("transformers"),
    }  # fmt: skip
    with args.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    state_path.unlink()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a file of JSON lines, one a run")
    parser.add_argument("--name", default="recall", help="what this set of runs is called")
    parser.add_argument("--variant", action="append", choices=sorted(VARIANTS), required=True)
    parser.add_argument("--seed", type=int, action="append", required=True)
    parser.add_argument("--set", action="append", default=[], help="a field of the run, as in steps=1500")
    parser.add_argument("--task", action="append", default=[], help="a field of the task, as in pairs=2,4,8")
    parser.add_argument("--every", type=int, default=100, help="steps between two tests")
    parser.add_argument("--work", type=Path, required=True, help="a folder for what a run needs to resume")
    args = parser.parse_args()
    for seed in args.seed:
        for variant in args.variant:
            make(run_of(args, variant, seed), variant, args)


if __name__ == "__main__":
    main()
