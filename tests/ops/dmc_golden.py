"""The recipe of dmc_golden.json: DMC's decisions, importances and entries of a small layer, number by number from the formulas
(arXiv 2403.09636, section 3), without tensors and without kvfold. Run as a script, it writes the file anew.
"""

import json
import math
import random
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
TOKENS, KV_HEADS, GROUP, HEAD_DIM = 18, 2, 2, 3
WINDOWS = (3, 12, None)


def inputs() -> dict:
    """q [T][H][D], k and v [T][K][D]; the last channel of k decides, and is drawn around the border."""
    draw = random.Random(12)
    numbers = lambda heads: [  # noqa: E731
        [[round(draw.gauss(0, 1), 2) for _ in range(HEAD_DIM)] for _ in range(heads)] for _ in range(TOKENS)
    ]
    q, k, v = numbers(KV_HEADS * GROUP), numbers(KV_HEADS), numbers(KV_HEADS)
    for token in range(TOKENS):
        for head in range(KV_HEADS * GROUP):
            q[token][head][-1] = round(draw.gauss(-5, 2), 2)
        # The second head merges nearly always, so that a segment outgrows a window of 12.
        for head, mean in enumerate((5.1, 8)):
            k[token][head][-1] = round(draw.gauss(mean, 1), 2)
    k[4][0][-1], k[2][1][-1] = 5.0, 4.0  # on the border a token appends
    return {"q": q, "k": k, "v": v}


def formulas(q: list, k: list, v: list) -> dict:
    """Decision and importance [T][K], and by window the entry's k and v after each token, [T][K][2D]."""
    merges = [[t > 0 and k[t][h][-1] - 5 > 0 for h in range(KV_HEADS)] for t in range(TOKENS)]
    importance = [[0.0] * KV_HEADS for _ in range(TOKENS)]
    for t in range(TOKENS):
        for h in range(KV_HEADS):
            mean = sum(q[t][h * GROUP + g][-1] for g in range(GROUP)) / GROUP
            importance[t][h] = 1 / (1 + math.exp(-(mean + 5))) + 2**-7
    entries = {}
    for window in WINDOWS:
        rows = [[None] * KV_HEADS for _ in range(TOKENS)]
        for h in range(KV_HEADS):
            segment = []
            for t in range(TOKENS):
                segment = [*segment, t] if merges[t][h] else [t]
                newest = segment if window is None else segment[-window:]
                z = sum(importance[i][h] for i in newest)
                rows[t][h] = [
                    sum(importance[i][h] * x[i][h][d] for i in newest) / z for x in (k, v) for d in range(HEAD_DIM)
                ]
        entries[str(window)] = rows
    return {"merges": merges, "importance": importance, "entries": entries}


def rounded(value: object) -> object:
    """Floats to ten digits behind the point."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return round(value, 10) if isinstance(value, float) else value


if __name__ == "__main__":
    given = inputs()
    FILE.write_text(json.dumps({**given, **rounded(formulas(**given))}, separators=(",", ":")) + "\n", encoding="utf-8")
