"""How fast a prompt is read under a method, beside full attention, in turns within one run.

    python studies/prefill.py MODEL OUT.json [--adapter NAME] [--time dms:128] [--rows 8] [--tokens 4096] [--rounds 2]

The prompt is kvfold's sample text, read in one call and in calls of 512 tokens; tokens/s, their ratio to full within the
round, and what was kept.
"""

import argparse
import json
import time
from pathlib import Path

import torch

import kvfold
from kvfold.record import cpu_name, git_commit


def main() -> None:
    """Measures, prints and writes."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model")
    options.add_argument("out", type=Path)
    options.add_argument("--adapter", default="smollm2-135m-dms-4x")
    options.add_argument("--time", default="dms:128")
    options.add_argument("--rows", type=int, default=8)
    options.add_argument("--tokens", type=int, default=4096)
    options.add_argument("--rounds", type=int, default=2)
    given = options.parse_args()
    model = kvfold.load(given.model, adapter=given.adapter)
    text = (Path(kvfold.__file__).parent / "assets" / "sample" / "persuasion.txt").read_text(encoding="ascii")
    ids = torch.tensor(kvfold.load_tokenizer(given.model)(text).input_ids)
    ids = ids.repeat(-(-given.rows * given.tokens // len(ids)))[: given.rows * given.tokens].view(given.rows, -1)
    rows = []
    for chunk in (given.tokens, 512):
        for number in range(given.rounds):
            speeds, kept = {}, {}
            for method in ("full", given.time) if number % 2 == 0 else (given.time, "full"):
                cache, began = model.new_cache(given.rows, time=method), time.perf_counter()
                with torch.inference_mode():
                    for part in ids.split(chunk, dim=1):
                        model(part, past_key_values=cache, logits_to_keep=1)
                speeds[method] = ids.numel() / (time.perf_counter() - began)
                kept[method] = float(cache.kept_tokens.float().mean())
                cache.free()
            rows.append(
                {
                    "rows": given.rows, "tokens": given.tokens, "call_tokens": chunk, "round": number,
                    "method": given.time, "tokens_per_second": speeds[given.time], "full_tokens_per_second": speeds["full"],
                    "ratio": speeds[given.time] / speeds["full"], "kept": kept[given.time],
                }
            )  # fmt: skip
            print(f"{chunk}: full {speeds['full']:.0f}, {given.time} {speeds[given.time]:.0f} tokens/s, "
                  f"{rows[-1]['ratio']:.2f}", flush=True)  # fmt: skip
    about = {
        "commit": git_commit(), "cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "dtype": str(model.dtype), "model": Path(given.model).name, "adapter": given.adapter,
    }  # fmt: skip
    given.out.write_text(json.dumps({"kind": "prefill", **about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
