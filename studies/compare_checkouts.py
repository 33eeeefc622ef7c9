"""Decoding speed of two checkouts of kvfold, in turns on one machine: does a change cost anything?

    python studies/compare_checkouts.py BEFORE AFTER MODEL [--rounds 15] [--out FILE]

BEFORE and AFTER are checkouts, MODEL a folder or a .gguf file that the shipped adapter fits. One process a side holds the
model and reads each prompt once; in each round both go on from there, in changing order. Ratios are taken within a round.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

POINTS = {
    "1 x 64": (1, 64, 16, None),
    "16 x (32 + 64)": (16, 32, 16, None),
    "8 x 1,024": (8, 1024, 8, None),
    "8 x 1,024, DMS 4x": (8, 1024, 8, "smollm2-135m-dms-4x"),
}
"""Rows, prompt tokens, decoded tokens, adapter."""


def worker(source: str) -> None:
    """Measures a point for each line that comes in."""
    import torch

    import kvfold

    models, begun = {None: kvfold.load(source)}, {}
    for line in sys.stdin:
        rows, prompt, new, adapter = point = tuple(json.loads(line))
        if adapter not in models:
            models[adapter] = kvfold.load(source, adapter=adapter)
        model = models[adapter]
        with torch.inference_mode():
            if point not in begun:
                ids = torch.randint(5, 40_000, (rows, prompt), generator=torch.Generator().manual_seed(1))
                cache = model.new_cache(rows=rows)
                for part in ids.split(256, dim=1):
                    token = model(part, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
                begun[point] = cache, token
            cache, token = begun[point]
            began = time.perf_counter()
            for _ in range(new):
                token = model(token, past_key_values=cache).logits.argmax(-1)
            seconds = time.perf_counter() - began
            begun[point] = cache, token
        print(json.dumps(rows * new / seconds), flush=True)


def main() -> None:
    """Both sides in turns; a table, and JSON with --out."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("before")
    options.add_argument("after")
    options.add_argument("model")
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    sides = {}
    for name, folder in (("before", given.before), ("after", given.after)):
        environment = os.environ | {"PYTHONPATH": str(Path(folder).resolve())}
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", given.model]
        sides[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
    speeds = {point: {"before": [], "after": []} for point in POINTS}
    for number in range(given.rounds + 1):
        for point, settings in POINTS.items():
            for name in random.Random(number * 97 + len(point)).sample(sorted(sides), 2):
                side = sides[name]
                print(json.dumps(settings), file=side.stdin, flush=True)
                speed = float(side.stdout.readline())
                if number:  # the first round warms up
                    speeds[point][name].append(speed)
        print(f"round {number} of {given.rounds}", file=sys.stderr, flush=True)
    rows = []
    for point, both in speeds.items():
        ratios = sorted(after / before for before, after in zip(both["before"], both["after"], strict=True))
        draws = random.Random(0)
        medians = sorted(statistics.median(draws.choices(ratios, k=len(ratios))) for _ in range(4000))
        rows.append(
            {
                "point": point, "before": statistics.median(both["before"]), "after": statistics.median(both["after"]),
                "ratio": statistics.median(ratios), "ratio_low_90": medians[200], "ratio_high_90": medians[3799],
                "ratios": ratios,
            }
        )  # fmt: skip
        print(f"{point}: {rows[-1]['before']:.1f} -> {rows[-1]['after']:.1f} tokens/s, "
              f"{rows[-1]['ratio']:.3f} ({medians[200]:.3f} to {medians[3799]:.3f})")  # fmt: skip
    if given.out:
        # Not at the top: a worker runs on a checkout whose record may be another.
        import torch

        from kvfold.record import made, with_record

        commits = {}
        for name, folder in (("before", given.before), ("after", given.after)):
            said = subprocess.run(
                ["git", "-C", folder, "describe", "--always", "--dirty"], capture_output=True, text=True
            )
            commits[name] = said.stdout.strip()
        rows = with_record(rows, made(torch.get_num_threads(), "float32"))
        given.out.write_text(json.dumps({"rounds": given.rounds, "commits": commits, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2])
    else:
        main()
