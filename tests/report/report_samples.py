"""Result files made up by formula, clearly fake, in every shape that the report must read."""

import json
import math
from pathlib import Path

METHODS = [
    ("full", "full attention"),
    ("window:508+4", "window + sinks"),
    ("window:252+4", "window + sinks"),
    ("h2o:256+256", "H2O"),
    ("h2o:128+128", "H2O"),
    ("tova:512", "TOVA"),
    ("tova:256", "TOVA"),
    ("window:25%+4", "window + sinks"),
    ("h2o:12%+13%", "H2O"),
    ("tova:25%", "TOVA"),
]
TEXTS = ("brown", "wiki_articles", "austen")
FULL_BYTES = 24_012_800
HEADER = {
    "created": "2031-02-03T04:05:06+00:00",
    "command": "kvfold eval MADE-UP --time full --windows 8",
    "git_commit": "0123456789abcdef0123456789abcdef01234567",
    "environment": {
        "python": "3.11.2", "torch": "2.13.0", "transformers": "5.17.0", "kvfold": "0.1.0", "cpu": "Made-up CPU @ 2.0 GHz",
        "cores": 2, "device": "cpu", "dtype": "float32", "threads": 2,
    },
    "model": {"name": "Sample-135M", "parameters": 134_515_008, "note": "made-up figures, from a formula"},
}  # fmt: skip


def share_of(method: str) -> float:
    """Kept share at the end of a window of 1,024 tokens."""
    if method == "full":
        return 1.0
    return 0.503 if any(word in method for word in ("508", "256+256", "512")) else 0.254


def quality(texts=TEXTS) -> dict:
    """A quality result over all methods, with passkeys."""
    rows = [_quality_row(method, title, text, at) for at, text in enumerate(texts) for method, title in METHODS]
    passkey = [
        {"method": method, "length_tokens": length, "depth": depth, "found": _found(method, length, depth), "tries": 4}
        for method, _ in METHODS
        for length in (512, 1024, 2048)
        for depth in (0.1, 0.5, 0.9)
    ]
    protocol = {"windows": 32, "context_tokens": 1024, "batch": 32}
    return {"kind": "quality", **HEADER, "protocol": protocol, "rows": rows, "passkey": passkey}


def _quality_row(method: str, title: str, text: str, at: int) -> dict:
    share = share_of(method)
    base = (29.7, 14.9, 30.1)[at % 3]
    worse = {"window": 1.25, "h2o": 1.0, "tova": 0.93}.get(method.split(":")[0], 0.0)
    change = worse * (10.0 if "%" in method else 1.0) * (1 / share - 1) ** 1.6 * 0.33 * (1 + 0.2 * at)
    error = change * 0.18 + (0.05 if change else 0.0)
    return {
        "method": method, "title": title, "trained": False, "text": text, "tokens": 32 * 1023,
        "perplexity": base * (1 + change / 100), "bits_per_byte": 1.0123 + change / 1000,
        "loss_difference": {"mean": math.log1p(change / 100), "standard_error": error / 100},
        "perplexity_change_percent": {"mean": change, "standard_error": error},
        "kl": change / 170, "top1_agreement": 1 - change / 130, "kept_tokens": round(1024 * share),
        "compression": 1024 / round(1024 * share), "compression_mean_over_time": 1 + (1 / share - 1) * 0.55,
        "allocated_bytes": round(FULL_BYTES * share), "full_bytes": FULL_BYTES,
        "bytes_by_use": {"rounding": 54_321 + at, "rings": 9_876},
        "tokens_per_second": 301.7 + 40 * at, "seconds": 108.53,
    }  # fmt: skip


def tasks() -> dict:
    """Scores of two tasks, one of them made to a length."""
    rows = [_task_row(method, title, task, length) for task, length in (("sums", None), ("niah", 1024))
            for method, title in METHODS[:5]]  # fmt: skip
    return {"kind": "tasks", **HEADER, "protocol": {"limit": 100, "batch": 32}, "rows": rows}


def _task_row(method: str, title: str, task: str, length: int | None) -> dict:
    share = share_of(method)
    change = round(share - 1, 2) / 5
    return {
        "method": method, "title": title, "trained": False, "task": task, "metric": "acc", "value": 0.61 + change,
        "standard_error": 0.0487, "higher_is_better": True, "items": 100, "length_tokens": length,
        "difference": {"mean": change, "standard_error": 0.021 if change else 0.0}, "compression": 1 / share,
        "kept_tokens": 200 * share, "seen_tokens": 200.0, "requests": 400, "seconds": 61.25,
    }  # fmt: skip


def _found(method: str, length: int, depth: float) -> int:
    if method == "full":
        return 4 if length < 2000 else 3
    reach = share_of(method) * 1024 / length
    return max(0, min(4, round(4.4 * reach + (2 if depth > 0.8 else 0) - (1 if "window" in method else 0))))


def memory() -> dict:
    """Memory over time for four methods."""
    tokens = list(range(0, 2049, 32))
    rows = [
        {"method": method, "title": title, "tokens": tokens, "allocated_bytes": [_held(method, at) for at in tokens]}
        for method, title in (METHODS[0], METHODS[2], METHODS[4], METHODS[6], METHODS[9])
    ]
    return {"kind": "memory", **HEADER, "rows": rows}


def _held(method: str, at: int) -> int:
    kept = at if method == "full" else max(1, at // 4) if "%" in method else min(at, 256)
    slot = 30 * 3 * (512 + 4 + (4 if "h2o" in method else 0))
    return -(-kept // 16) * 16 * slot + 1000


def kept() -> dict:
    """Maps of 30 layers with 3 heads: two with a score, one with ragged counts."""
    owners = list(range(30))
    even = [[256] * 3 for _ in owners]
    ages = [[300 + 180 * math.sin(layer / 4 + head) for head in range(3)] for layer in owners]
    ragged = [[int(1024 * (0.12 + 0.5 * abs(math.sin(layer / 9 + head)))) for head in range(3)] for layer in owners]
    rows = [
        {"method": "h2o:128+128", "title": "H2O", "seen_tokens": 1024, "kept": even, "owners": owners, "score": ages,
         "value_name": "mean age of the kept tokens"},
        {"method": "tova:256", "title": "TOVA", "seen_tokens": 1024, "kept": even, "owners": owners,
         "score": [[200 + 5.5 * layer] * 3 for layer in owners], "value_name": "mean age of the kept tokens"},
        {"method": "dms:64", "title": "DMS", "seen_tokens": 1024, "kept": ragged, "owners": owners},
    ]  # fmt: skip
    return {"kind": "kept", **HEADER, "rows": rows}


WORDS = ["Sir", " Walter", " Elliot", ",", " of", " Kellynch", " Hall", ",\n", " in", " Somersetshire", ",", " was"]


def document() -> dict:
    """A text of 360 tokens under DMS, DMC and a window, as three heads hold it."""
    seen, owners = 360, list(range(12))
    letters = {
        "dms:64": ["".join("w" if at >= 295 else "kgg"[(at * every) % 3] for at in range(seen)) for every in (1, 2, 3)],
        "dmc:12": [("mmmk" * seen)[:seen], ("mk" * seen)[:seen], "k" * seen],
        "window:60+4": ["kkkk" + "g" * 296 + "k" * 60] * 3,
    }
    rows = []
    for method, states in letters.items():
        kept = [[int(seen / (1 + 2 * abs(math.sin(layer / 5 + head)))) for head in range(3)] for layer in owners]
        tokens = list(range(0, 361, 24))
        share = {"mean": 0.5, "least": 0.2, "lower": 0.4, "median": 0.5, "upper": 0.6, "most": 0.9}
        rows.append({
            "method": method, "title": {"dms": "DMS", "dmc": "DMC"}.get(method[:3], "window + sinks"), "seen_tokens": seen,
            "kept": kept, "owners": owners, "compression": 1.875,
            "over_time": {"tokens": tokens} | {name: [part * at for at in tokens] for name, part in share.items()},
            "heads": [
                {"layer": 4 + at, "head": at, "kept_tokens": len(one) - one.count("g") - one.count("m"), "states": one}
                for at, one in enumerate(states)
            ],
        })  # fmt: skip
    tokens = [WORDS[at % len(WORDS)] for at in range(seen)]
    return {"kind": "document", **HEADER, "text": "persuasion", "tokens": tokens, "rows": rows}


def curve() -> dict:
    """A run of 40 steps, as its curve.jsonl has them."""
    rows = [
        {
            "step": step, "tokens": 4096 * step, "loss": 0.1 + 1 / step, "distillation": 1 / step, "learning_rate": 3e-5,
            "target_compression": min(4.0, 1 + step / 15), "compression": min(4.0, 1 + step / 15) * 0.97,
            "nominal_compression": 5.0, "layer_compression": [1 + layer * step / 240 for layer in range(12)],
            "seconds": 31.5,
        }
        for step in range(1, 41)
    ]  # fmt: skip
    return {"kind": "curve", **HEADER, "name": "made-up-adapter", "command": "kvfold retrofit MADE-UP", "rows": rows}


def step() -> dict:
    """Steps under DMS and DMC."""
    rows = [_step_row("dms:128", "DMS", "reverse", 71.5, 96.25), _step_row("dmc:12", "DMC", "none", 66.4, 118.3)]
    return {"kind": "step", **HEADER, "command": "kvfold bench train MADE-UP", "rows": rows}


def _step_row(method: str, title: str, loss: str, gated: float, plain: float) -> dict:
    def side(speed: float) -> dict:
        spread = {"median": speed, "min": speed * 0.97, "max": speed * 1.02}
        return {
            "tokens_per_second": spread, "step_ms": {name: 1_024_000 / value for name, value in spread.items()},
            "trained_parameters": 134_567_890,
        }  # fmt: skip

    ratio = {"median": plain / gated, "min": plain / gated * 0.98, "max": plain / gated * 1.01}
    return {
        "method": method, "title": title, "trains": "full", "loss": loss, "sequence_tokens": 1024, "batch_sequences": 1,
        "with_gates": side(gated), "gates_off": side(plain), "ratio": ratio,
    }  # fmt: skip


def decode() -> dict:
    """Three points, one of them padded, one method that folds."""
    rows = [
        _decode_row("1 x 64", 1, 64, False, "full", 18.3, 17.1),
        _decode_row("16 x (32 + 64)", 16, 96, True, "full", 96.4, 82.9),
        _decode_row("8 x 1,024", 8, 1024, False, "full", 61.2, 48.8),
        _decode_row("8 x 1,024", 8, 1024, False, "h2o:128+128", 77.7, 48.8),
    ]
    return {"kind": "decode", **HEADER, "command": "kvfold bench decode MADE-UP", "rows": rows}


def _decode_row(point: str, batch: int, context: int, padded: bool, method: str, ours: float, theirs: float) -> dict:
    def side(speed: float) -> dict:
        return {
            "tokens_per_second": {"median": speed, "min": speed * 0.96, "max": speed * 1.03},
            "step_ms": {"median": 1000 * batch / speed, "min": 970 * batch / speed, "max": 1040 * batch / speed},
            "allocated_bytes": batch * context * 46_080, "peak_bytes": 812_345_678 + batch * context * 50_000,
        }  # fmt: skip

    ratio = {"median": ours / theirs, "min": ours / theirs * 0.97, "max": ours / theirs * 1.02}
    return {
        "point": point, "batch": batch, "context_tokens": context, "new_tokens": 64, "padded": padded, "method": method,
        "ours": side(ours), "theirs": side(theirs), "ratio": ratio,
    }  # fmt: skip


def serve() -> dict:
    """Two sides in one budget."""
    spread = {"median": 120.5, "min": 118.0, "max": 124.0}
    row = {
        "method": "full",
        "title": "full attention",
        "budget_bytes": 40e6,
        "tokens_per_second": spread,
        "most_running": 4,
    }
    rows = [row, {**row, "method": "dms:128", "title": "DMS", "over_first": {"median": 2.1, "min": 2.0, "max": 2.2}}]
    return {"kind": "serve", **HEADER, "command": "kvfold bench serve-offline MADE-UP", "rows": rows}


def plan() -> dict:
    """A plan of three lines."""
    rows = [
        {"name": "as it is", "bytes_per_token": 46080, "bytes": 48_123_456, "max_rows": 12},
        {"name": "cla2", "bytes_per_token": 23040, "bytes": 24_061_728, "max_rows": 24},
        {"name": "cla2, h2o:128+128", "bytes_per_token": 23040, "bytes": 6_061_728},
    ]
    return {"kind": "plan", **HEADER, "command": "kvfold plan MADE-UP", "rows": rows}


def pretraining() -> dict:
    """Two runs of a sweep, one of which came to nothing."""
    row = {"recipe": "made-up", "parameters": 4_544_448, "kv_bytes_per_token": 192, "tokens": 999_424, "seed": 0}
    rows = [
        {**row, "learning_rate": 0.003, "loss": 5.01, "validation_perplexity": 151.2, "note": "best"},
        {**row, "learning_rate": 0.0045, "note": "diverged"},
    ]
    return {"kind": "pretraining", **HEADER, "command": "kvfold train MADE-UP", "rows": rows}


def design_space() -> list[dict]:
    """Four small models a file each, the first at two rates and at its better one with two seeds."""
    shared = {"tokens": 999_424, "validation_tokens": 65_408, "num_layers": 8, "parameters": 4_544_448}
    published = {"made-up-mqa": (13.54, 12.39), "made-up-mqa-cla2": (13.60, 12.43), "made-up-small": (13.81, 12.74)}
    runs = (
        ("made-up-mqa", "full", 8, 384, 12, 0.002, 0, 120.0), ("made-up-mqa", "full", 8, 384, 12, 0.002, 1, 122.0),
        ("made-up-mqa", "full", 8, 384, 12, 0.004, 0, 131.0), ("made-up-mqa-cla2", "cla2", 4, 192, 12, 0.002, 0, 123.5),
        ("made-up-small", "full", 8, 192, 6, 0.002, 0, 127.0), ("made-up-mha", "full", 8, 6144, 12, 0.002, 0, 119.0),
    )  # fmt: skip
    curve = {"tokens": [333_824, 667_648, 999_424], "loss": [6.5, 5.6, 5.1]}
    rows = []
    for recipe, layers, owners, bytes_, dim, rate, seed, found in runs:
        paper, tuned = published.get(recipe, (13.15, None))
        rows.append({
            **shared, "recipe": recipe, "layers": layers, "owners": owners, "kv_bytes_per_token": bytes_, "curve": curve,
            "learning_rate": rate, "seed": seed, "validation_perplexity": found, "paper_perplexity": paper,
            "paper_tuned_perplexity": tuned, "head_dim": dim, "num_heads": 192 // dim,
            "num_kv_heads": 16 if recipe == "made-up-mha" else 1,
        })  # fmt: skip
    model = {"name": "made-up", "parameters": 4_544_448}
    return [{"kind": "pretraining", **HEADER, "model": model, "rows": [row]} for row in rows]


LAW = {20_000: 200.0, 80_000: 100.0, 320_000: 50.0, 1_280_000: 25.0}
"""Half as much worse for four times the tokens."""


def trained(**given) -> list[dict]:
    """One layout after so many tokens of training."""
    return [trained_row(f"after-{tokens}", tokens, change, **given) for tokens, change in LAW.items()]


def trained_row(name: str, tokens: int | None, change: float, **given) -> dict:
    """A model of shared layers beside the one it came from."""
    return {
        "method": f"full of {name}", "title": name, "model": name, "trained": True, "trained_tokens": tokens, "text": "brown",
        "layers": "cla2", "perplexity": 30 * (1 + change / 100), "compression": 1.0, "allocated_bytes": 50, "full_bytes": 100,
        "perplexity_change_percent": {"mean": change, "standard_error": 1.5}, **given,
    }  # fmt: skip


def write_samples(folder: Path) -> Path:
    """Every kind, a file each."""
    folder.mkdir(parents=True, exist_ok=True)
    for make in (quality, tasks, memory, kept, document, curve, decode, step, plan, pretraining, serve):
        (folder / f"{make.__name__}.json").write_text(json.dumps(make()), encoding="utf-8")
    return folder
