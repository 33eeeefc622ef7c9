#!/usr/bin/env python3
"""What sharing layers is worth under an engine with little memory: a model and its folded copy under vLLM, the same requests
and the same bytes for keys and values, in turns.

  studies/vllm-capacity.py PLAIN FOLDED OUT.json [--requests 32 --prompt 128 --new 128 --fits 8 --rounds 3 --threads 2]

PLAIN and FOLDED are folders, as `kvfold convert MODEL PLAIN --for transformers` and `kvfold convert MODEL FOLDED --layers cla2`
write them. KVFOLD_VLLM_PYTHON names the Python in which vLLM is installed. There are two budgets: `scarce`, in which --fits
requests of PLAIN have room, and `ample`, in which all have. All requests come at once; prompts are random tokens, and every
answer has its full length, so what the models say is of no account. A round is each model once, the order turning.
"""

import argparse
import json
import os
import random
import shlex
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path

from kvfold.bench.vllm_peer import VllmPeer, VllmRun
from kvfold.record import cpu_name, git_commit, made, with_record, write_whole_file

DTYPE, DTYPE_BYTES = "float32", 4
BLOCK_TOKENS = 32
"""vLLM's CPU build takes 128 by default; smaller blocks leave less of a small budget unused, on both sides."""
STEP_TOKENS = 2048
"""Tokens that vLLM reads in one step at most."""


def main() -> None:
    """Measure, and write the result."""
    wanted = _arguments()
    config = json.loads((wanted.plain / "config.json").read_text())
    token_bytes = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * DTYPE_BYTES
    draw = random.Random(0)
    prompts = [[draw.randrange(config["vocab_size"]) for _ in range(wanted.prompt)] for _ in range(wanted.requests)]
    rows, versions = [], set()
    for budget, fits in (("scarce", wanted.fits), ("ample", wanted.requests + 1)):
        found, version = _measured(wanted, budget, fits * (wanted.prompt + wanted.new) * token_bytes, prompts)
        rows += found
        versions.add(version)
    result = {
        "kind": "vllm-capacity",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["studies/vllm-capacity.py", *sys.argv[1:]]),
        "git_commit": git_commit(),
        "environment": {
            "vllm": ", ".join(sorted(versions)), "cpu": cpu_name(), "cores": os.cpu_count(), "threads": wanted.threads,
            "dtype": DTYPE, "load_average": os.getloadavg()[0],
        },
        "requests": wanted.requests, "prompt_tokens": wanted.prompt, "new_tokens": wanted.new, "rounds": wanted.rounds,
        "rows": with_record(rows, made(wanted.threads, DTYPE)),
    }  # fmt: skip
    write_whole_file(wanted.out, json.dumps(result, indent=1) + "\n")
    for row in rows:
        sys.stdout.write(
            f"{row['budget']:8}{row['model']:24}{row['kv_tokens']:>9,} KV tokens  {row['in_flight']['median']:6.1f} in flight  "
            f"{row['tokens_per_second']['median']:7.1f} tokens/s  {row['over_plain']['median']:5.2f}x "
            f"({row['over_plain']['min']:.2f} to {row['over_plain']['max']:.2f})\n"
        )


def _measured(wanted: argparse.Namespace, budget: str, kv_bytes: int, prompts: list) -> tuple[list[dict], str]:
    """A row for each model under one budget, and vLLM's version."""
    options = {
        "block_size": BLOCK_TOKENS, "max_num_batched_tokens": STEP_TOKENS, "enforce_eager": wanted.eager,
        "skip_tokenizer_init": True,
    }  # fmt: skip
    settings = {
        "max_rows": len(prompts), "max_tokens": wanted.prompt + wanted.new, "kv_bytes": kv_bytes, "dtype": DTYPE,
        "threads": wanted.threads, "options": options,
    }  # fmt: skip
    with VllmPeer(wanted.plain, **settings) as plain, VllmPeer(wanted.folded, **settings) as folded:
        sides, runs = (plain, folded), ([], [])
        for side in sides:
            side.run(prompts[:2], 4)  # so that nothing is done for the first time when it counts
        for turn in range(wanted.rounds):
            for place in (0, 1) if turn % 2 == 0 else (1, 0):
                runs[place].append(sides[place].run(prompts, wanted.new))
                _tell(budget, turn, (wanted.plain, wanted.folded)[place].name, runs[place][-1])
        return [
            _row(budget, folder.name, kv_bytes, side.about, mine, runs[0])
            for folder, side, mine in zip((wanted.plain, wanted.folded), sides, runs, strict=True)
        ], plain.about["version"]


def _row(budget: str, name: str, kv_bytes: int, about: dict, mine: list[VllmRun], plain: list[VllmRun]) -> dict:
    ratios = [one.tokens_per_second / other.tokens_per_second for one, other in zip(mine, plain, strict=True)]
    return {
        "budget": budget, "model": name, "kv_bytes": kv_bytes, "kv_tokens": about["kv_tokens"], "vllm_log": about["log"],
        "in_flight": _spread([run.rows_in_flight for run in mine]),
        "most_in_flight": max(max(run.step_rows) for run in mine),
        "tokens_per_second": _spread([run.tokens_per_second for run in mine]),
        "seconds": _spread([run.step_ends[-1] for run in mine]),
        "steps": len(mine[-1].step_ends), "preemptions": mine[-1].preemptions, "over_plain": _spread(ratios),
    }  # fmt: skip


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _tell(budget: str, turn: int, name: str, run: VllmRun) -> None:
    sys.stderr.write(
        f"{budget}, round {turn + 1}, {name}: {run.tokens_per_second:.1f} tokens/s, {run.rows_in_flight:.1f} in flight\n"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("plain", "folded", "out"):
        parser.add_argument(name, type=Path)
    for name, value in {"requests": 32, "prompt": 128, "new": 128, "fits": 8, "rounds": 3, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    return parser.parse_args()


if __name__ == "__main__":
    main()
