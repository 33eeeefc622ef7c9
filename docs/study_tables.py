"""Tables of pages in docs from what the scripts in studies/ measured: a block's name, and what makes it from the results' folder.

`docs/fill_readme.py` fills them in; figures of kvfold's own commands are its matter alone.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from kvfold.report.page import short_commit
from kvfold.report.results import count, difference, percent, three

TEXTS = ("brown", "wiki_articles", "austen")
NAMES = {
    "full": "Full attention", "dms": "DMS", "dms-on": "DMS, trained on for as many tokens as fold", "fold": "fold", "h2o": "H2O",
    "tova": "TOVA", "window": "Window + sinks", "h2o-eighth": "H2O", "tova-eighth": "TOVA", "window-eighth": "Window + sinks",
    "expected": "expected attention",
}  # fmt: skip
MODELS = {"mqa": "MQA", "mqa-cla2": "MQA with CLA2", "mqa-half-head": "MQA, half the head dim"}


def table(heads: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; so many columns are set to the left."""
    sides = [":--" if place < left else "--:" for place in range(len(heads))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, sides, *lines))


def fold_4x(results: Path) -> str:
    """fold beside both DMS controls at a quarter."""
    data = _object(results / "fold" / "distil-summary-0.6.json")
    rows = {(row["against"], row["text"]): row for row in data["rows"]}
    lines = []
    for text in (*TEXTS, "all"):
        dms, trained = rows["dms", text], rows["dms-on", text]
        lines.append([
            text, three(dms["kl_late_against"]), three(dms["kl_late"]), *map(_change, (dms, trained)),
            *(f"{100 * dms[name]:+.2f} %" for name in ("perplexity_change_against", "perplexity_change")),
        ])  # fmt: skip
    heads = ["text", "KL, DMS", "KL, fold", "fold against DMS", "against DMS trained on"]
    windows = rows["dms", "brown"]["windows"]
    said = (
        f"{windows} windows of 1,024 tokens of each text, at equal mean bytes. KL: behind the first 256 tokens, from the "
        "unfolded model, nats; changes of KL ± one standard error."
    )
    return f"{table([*heads, 'perplexity, DMS', 'perplexity, fold'], lines)}\n\n{said} {_made(data)}"


def eighth(results: Path) -> str:
    """Every method at an eighth, by its KL."""
    rows = _object(results / "long" / "eighth-summary.json")["rows"]
    shown = ("full", "fold", "dms", "dms-on", "h2o", "tova", "window")
    return _by_position(rows, shown, (*TEXTS, "all"), "1,024")


def long(results: Path) -> str:
    """The adapters of a quarter on longer text."""
    rows = [row for row in _object(results / "long" / "austen-summary.json")["rows"] if row["context"] == 4096]
    shown = ("full", "fold", "dms", "h2o-eighth", "tova-eighth", "window-eighth")
    return _by_position(rows, shown, ("austen",), "4,096")


def _by_position(rows: Sequence[Mapping], shown: Sequence[str], texts: Sequence[str], context: str) -> str:
    found = {(row["arm"], row["text"]): row for row in rows}
    order = sorted(
        (arm for arm in shown if (arm, texts[-1]) in found), key=lambda arm: found[arm, texts[-1]]["kl_late"]
    )
    lines = []
    for arm in order:
        mine = [found[arm, text] for text in texts]
        lines.append([
            NAMES[arm], f"`{mine[-1]['time']}`", f"{mine[-1]['kept_tokens']:,.0f}", percent(mine[-1]["bytes_share"]),
            *(three(row["kl_late"]) for row in mine),
            difference(mine[-1]["perplexity_change_percent"], mine[-1]["standard_error"], "%"),
        ])  # fmt: skip
    heads = ["method", "`--time`", "kept", "bytes", *(f"KL, {text}" for text in texts), "perplexity"]
    windows = found[order[0], texts[-1]]["windows"]
    said = (
        f"{windows} windows of {context} tokens in all. Kept, and the share of the full cache's bytes that is allocated: at the "
        "end of a window, where fold, which merges once a grid, holds more than in the mean over a window; DMS has the delay "
        "that gives it as many bytes as fold in that mean. KL: behind the first 256 tokens, from the unfolded model, nats. "
        "Perplexity: its change on all texts named."
    )
    return f"{table(heads, lines, left=2)}\n\n{said} {_made(mine[-1]['made'])}"


def dmc(results: Path) -> str:
    """DMC in its published form, with a protected first token, for longer, and trained alike with gates off."""
    lines, runs = [], results / "runs"
    for name, said in (
        ("dmc-12-65k", "published"), ("dmc-12-first-1-65k", "first token never merged into"), ("dmc-4x", "published"),
    ):  # fmt: skip
        data, curve = _object(runs / f"{name}.json"), _lines(runs / f"{name}.jsonl")
        before, after = (data[when]["perplexity"] for when in ("before", "after"))
        last = [one["distillation"] for one in curve[-8:]]
        change = f"{100 * (after / before - 1):+.0f} %"
        lines.append([said, count(data["tokens"]), f"{data['after']['compression']:.2f}×", _mean(last), change])
    control = _lines(runs / "dmc-control-freed.jsonl")
    last = [one["distillation"] for one in control[-8:]]
    lines.append(["control: gates off", count(control[-1]["tokens"]), "1.00×", _mean(last), "not measured"])
    heads = ["form", "tokens", "compression", "KL in training, last 8 steps", "perplexity, held out"]
    said = "LoRA of rank 64 on q, k, v and o, steps of one sequence of 1,024 tokens, distilled from the original."
    return f"{table(heads, lines)}\n\n{said} Measured by `kvfold retrofit` and `studies/dmc_control.py`, see `results/runs/`."


def recall(results: Path) -> str:
    """Models from scratch that look a symbol up, by their seeds."""
    found: dict[tuple, list[Mapping]] = {}
    for row in _lines(results / "recall" / "recall.jsonl"):
        found.setdefault((row["layers"], row["steps"], row["head_dim"], row["variant"]), []).append(row)
    lines = []
    for (layers, steps, head_dim, variant), rows in sorted(
        found.items(), key=lambda item: (item[0][0], item[0][1], -item[0][2])
    ):
        if len(rows) < 5:
            continue
        scores = [[row["points"][-1]["accuracy"][f"{pairs}x1"] for row in rows] for pairs in (2, 4, 8)]
        until = [_answers_until(row, "8x1", 0.9) for row in rows]
        learned = [one for one in until if one is not None]
        lines.append([
            str(layers), MODELS[variant], str(head_dim), str(rows[0]["kv_bytes_per_token"]), str(steps), *map(_range, scores),
            f"{len(learned)} of {len(rows)}", count(sorted(learned)[len(learned) // 2]) if learned else "–",
        ])  # fmt: skip
    heads = [
        "layers",
        "model",
        "head dim",
        "KV bytes a token",
        "steps",
        "2 pairs",
        "4 pairs",
        "8 pairs",
        "seeds at 90 %",
    ]
    said = (
        "Share of 1,024 answers that are right, lowest and highest of five paired seeds; of the seeds, how many come to 90 % at "
        "8 pairs, and after how many answers, the median. Width 64, four query heads and one KV head, float32."
    )
    return f"{table([*heads, 'answers until'], lines, left=2)}\n\n{said} Measured by `studies/recall.py`."


def kvpress(results: Path) -> str:
    """Both sides on the same windows, by what they keep, and then by their KL."""
    data = _object(results / "kvpress" / "summary.json")
    found = {(row["arm"], row["text"]): row for row in data["rows"]}
    arms = dict.fromkeys(row["arm"] for row in data["rows"])
    mean = {arm: sum(found[arm, text]["kl"] for text in TEXTS) / len(TEXTS) for arm in arms}
    kept = {arm: sum(found[arm, text]["kept"] for text in TEXTS) / len(TEXTS) for arm in arms}
    lines = []
    for arm in sorted(arms, key=lambda one: (kept[one] < 170, mean[one])):
        name, _, budget = arm.partition("@")
        mine = [found[arm, text] for text in TEXTS]
        lines.append([
            f"kvpress, {name.replace('ada:', 'AdaKV over ')}" if budget else f"kvfold, {name}", f"{kept[arm]:.0f}",
            f"{sum(row['held_bytes'] for row in mine) / len(mine) / 1e6:.1f}", *(three(row["kl"]) for row in mine),
            *(difference(row["perplexity_change_percent"], row["standard_error"], "%") for row in mine),
        ])  # fmt: skip
    heads = [
        "method",
        "kept",
        "held, MB",
        *(f"KL, {text}" for text in TEXTS),
        *(f"perplexity, {text}" for text in TEXTS),
    ]
    peer = next(row for row in data["rows"] if row["kvpress"])
    said = (
        f"{peer['windows']} windows of each text: a prompt of {data['prompt']} tokens is compressed, the next {data['after']} "
        "are read. Kept, of the prompt by a head, and held: when the prompt was read. kvfold's methods go on evicting in what "
        "follows, presses keep all of it, so that they hold that many entries more at the end. KL: of what follows, from the "
        f"unfolded model, nats. kvpress {peer['kvpress']} on torch {peer['made']['torch']} and transformers "
        f"{peer['made']['transformers']}."
    )
    return f"{table(heads, lines)}\n\n{said} Measured by `studies/kvpress_peer.py`. {_made(data['rows'][0]['made'])}"


STUDIES: Mapping[str, Callable[[Path], str]] = {
    "fold_4x": fold_4x,
    "eighth": eighth,
    "long": long,
    "dmc": dmc,
    "recall": recall,
    "kvpress": kvpress,
}


def _object(path: Path) -> Mapping:
    return json.loads(path.read_text(encoding="utf-8"))


def _lines(path: Path) -> list[Mapping]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _change(row: Mapping) -> str:
    return difference(100 * row["change"], 100 * row["standard_error"], "%")


def _mean(values: Sequence[float]) -> str:
    return three(sum(values) / len(values))


def _range(values: Sequence[float]) -> str:
    least, most = (percent(one) for one in (min(values), max(values)))
    return least if least == most else f"{least.removesuffix(' %')} to {most}"


def _answers_until(row: Mapping, task: str, share: float) -> int | None:
    return next((point["answers"] for point in row["points"] if point["accuracy"][task] >= share), None)


def _made(made: Mapping) -> str:
    about = f"{made['cpu']}, {made['threads']} threads, {made['dtype']}; kvfold {made['kvfold']}, torch {made['torch']}"
    return f"SmolLM2-135M; {about}, commit {short_commit(made['git_commit'])}."
