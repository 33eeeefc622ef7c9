"""Losses of short trainings in two checkouts of kvfold: does a change leave what is learned as it was?

    python studies/compare_training.py BEFORE AFTER MODEL --data TEXT [--out FILE]

BEFORE and AFTER are checkouts, MODEL a folder or a .gguf file. A DMS adapter is distilled for a few steps, and a small model is
trained from scratch, with the same seeds on both sides.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ADAPTER = {
    "time": "dms:32", "compression": 2.0, "sequence_tokens": 128, "batch_sequences": 2, "sequences_at_once": 1,
    "learning_rate": 1e-3, "ramp_steps": 2, "tail_steps": 2, "save_steps": 100,
}  # fmt: skip
SCRATCH = {
    "num_layers": 4, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
    "vocabulary": 512, "layers": "cla2", "tokens": 8192, "sequence_tokens": 64, "batch_sequences": 8,
    "sequences_at_once": 4, "learning_rate": 3e-3, "init_std": 0.1, "validate_steps": 4, "validation_tokens": 1024,
}  # fmt: skip
ABOUT = {"command": "", "version": "", "git_commit": None, "hardware": ""}


class _Enough(Exception):
    """The last step is done: the result is of no interest."""


def worker(source: str, data: list[str]) -> None:
    """Prints the curves of both trainings, as JSON. Keys of settings have the names that all checkouts read."""
    import torch

    import kvfold
    from kvfold.train.design_space import PretrainSettings
    from kvfold.train.pretrain import Pretrain
    from kvfold.train.retrofit import Retrofit
    from kvfold.train.run_folder import RunFolder
    from kvfold.train.settings import RetrofitSettings

    curves: dict[str, list] = {"a DMS adapter": [], "from scratch": []}

    def adapter_step(point: dict) -> None:
        curves["a DMS adapter"].append(point)
        if point["step"] == ADAPTER["ramp_steps"] + ADAPTER["tail_steps"]:
            raise _Enough

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        place = Path(folder)
        with contextlib.suppress(_Enough):
            Retrofit(
                model=kvfold.load(source, dtype=torch.float32), tokenizer=kvfold.load_tokenizer(source), source=source,
                name="model", settings=RetrofitSettings(**ADAPTER, data=tuple(data)), folder=RunFolder(out=place / "adapter"),
                on_step=adapter_step,
            ).run()  # fmt: skip
        Pretrain(
            recipe="small", settings=PretrainSettings(**SCRATCH, data=tuple(data)), folder=RunFolder(out=place / "scratch"),
            text=place / "scratch" / "training", device=torch.device("cpu"), about=ABOUT,
            on_step=curves["from scratch"].append,
        ).run()  # fmt: skip
    for points in curves.values():
        for point in points:
            del point["seconds"]
    sys.stdout.write(json.dumps(curves))


def curves_of(checkout: Path, args: argparse.Namespace) -> dict[str, list[dict]]:
    """Those of one checkout, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
    command = [sys.executable, __file__, "--worker", str(checkout), str(checkout), args.model, "--data", *args.data]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    """Prints the largest difference of each training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("model", help="a folder or a .gguf file")
    parser.add_argument("--data", nargs="+", required=True, help="text files")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.model, args.data)
        return
    before, after = curves_of(args.before, args), curves_of(args.after, args)
    rows = []
    for name, theirs in before.items():
        losses = [[point["loss"] for point in side] for side in (theirs, after[name])]
        apart = max(abs(one - other) for one, other in zip(*losses, strict=True))
        rows.append(
            {"training": name, "losses_before": losses[0], "losses_after": losses[1], "largest_difference": apart}
        )
        print(
            f"{name}: {len(theirs)} steps, largest difference of a loss {apart:.1e}; all figures equal: {theirs == after[name]}"
        )
    if args.out is not None:
        from kvfold.record import made, write_whole_file

        about = {"model": Path(args.model).name, **made(int(os.environ.get("OMP_NUM_THREADS", "0")) or None, "float32")}
        lines = [json.dumps({**row, **about}) + "\n" for row in rows]
        write_whole_file(args.out, "".join(lines))


if __name__ == "__main__":
    main()
