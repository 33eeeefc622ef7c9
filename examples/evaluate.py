"""Measure the perplexity of a text under two methods that keep 64 tokens, beside full attention.

  python examples/evaluate.py MODEL TEXT

TEXT is a text file. It is read through the cache, so what a method evicts is gone. `kvfold eval` does the same.
"""

import sys
from pathlib import Path

import kvfold
from kvfold.eval.perplexity import measure_quality
from kvfold.eval.reading import Protocol


def main() -> None:
    """Eight windows of 256 tokens, the same ones for each method."""
    source, text = sys.argv[1:]
    model, tokenizer = kvfold.load(source), kvfold.load_tokenizer(source)
    protocol = Protocol(windows=8, context_tokens=256, batch=8)
    methods = ["window:60+4", "h2o:32+32"]
    found = measure_quality(model, tokenizer, [text], methods, name=Path(source).name, protocol=protocol)
    for row in found["rows"]:
        change = row["perplexity_change_percent"]
        error = "" if change["standard_error"] is None else f" ± {change['standard_error']:.1f}"
        print(
            f"{row['method']}: perplexity {row['perplexity']:.2f} ({change['mean']:+.1f}{error} %), "
            f"{row['kept_tokens']:.0f} tokens kept, {row['allocated_bytes']:,} bytes"
        )


if __name__ == "__main__":
    main()
