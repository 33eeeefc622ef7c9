"""Tables of pages in docs from what the scripts in studies/ measured: a block's name, and what makes it from the results' folder.

`docs/fill_readme.py` fills them in; figures of kvfold's own commands are its matter alone.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from kvfold.eval.perplexity import paired_difference
from kvfold.report.page import short_commit
from kvfold.report.results import count, difference, percent, three, times

TEXTS = ("brown", "wiki_articles", "austen")
NAMES = {
    "full": "Full attention", "dms": "DMS, window as long as fold's bytes allow", "dms-eighth": "DMS as it ships",
    "dms-on": "DMS, trained on for as many tokens as fold", "fold": "fold", "h2o": "H2O", "tova": "TOVA",
    "window": "Window + sinks", "h2o-eighth": "H2O", "tova-eighth": "TOVA", "window-eighth": "Window + sinks",
}  # fmt: skip
MODELS = {"mqa": "MQA", "mqa-cla2": "MQA with CLA2", "mqa-half-head": "MQA, half the head dim"}
WORDS = (
    "text",
    "method",
    "trained",
    "point",
    "left padding",
    "recipe",
    "layers shared",
    "beside",
    "model",
    "run",
    "memory",
    "estimate",
    "prompts of",
    "room",
    "form",
    "layers",
    "`--time`",
    "bits",
)
"""Columns set to the left."""
SEEDS = 5
LATE = (
    "KL: from the unfolded model, nats, behind the first 256 tokens; perplexity: its change, over all tokens; "
    "± one standard error."
)


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    sides = [":--" if head in WORDS else "--:" for head in heads]
    cells = [heads, sides, *([cell.replace("|", "\\|") for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def fold_4x(results: Path) -> str:
    """fold beside both DMS controls at a quarter."""
    rows = {(row["against"], row["text"]): row for row in _object(results / "fold" / "distil-summary-0.6.json")["rows"]}
    arms = ("dms", "dms-on", "fold-0.6")
    each = [row for row in _lines(results / "fold" / "distil-held-out.jsonl") if row["arm"] in arms]
    lines = []
    for text in (*TEXTS, "all"):
        dms, trained = rows["dms", text], rows["dms-on", text]
        divergences = [dms["kl_late_against"], trained["kl_late_against"], dms["kl_late"]]
        here = [row for row in each if text in (row["text"], "all")]
        changes = [_apart(here, (arm, "loss"), (arm, "loss_full")) for arm in arms]
        lines.append([text, *map(three, divergences), *map(_change, (dms, trained)), *changes])
    heads = ["text", "KL, DMS", "KL, DMS trained on", "KL, fold", "fold against DMS", "against DMS trained on"]
    heads += ["perplexity, DMS", "DMS trained on", "fold"]
    apart = [_apart(each, ("fold-0.6", "loss"), (other, "loss")) for other in ("dms", "dms-on")]
    said = (
        f"{rows['dms', 'brown']['windows']} windows of {count(each[0]['context'])} tokens of each text, at equal bytes in "
        f"the mean over two grids. {LATE} Fold's perplexity differs from that of DMS by {apart[0]}, and from that of "
        f"DMS trained on by {apart[1]}."
    )
    return f"{table(heads, lines)}\n\n{said} Measured by `studies/fold_distil.py`. {_made(each)}"


def _apart(rows: Sequence[Mapping], one: tuple[str, str], other: tuple[str, str]) -> str:
    """The change of perplexity between two losses, each an arm and a field, on the same windows."""
    losses = [
        {(row["text"], row["window"]): row[field] for row in rows if row["arm"] == arm} for arm, field in (one, other)
    ]
    mean, error = paired_difference(*([found[place] for place in sorted(losses[0])] for found in losses))
    return difference(100 * (math.exp(mean) - 1), 100 * math.exp(mean) * error, "%")


def eighth(results: Path) -> str:
    """Every method near an eighth, by its KL."""
    shown = ("full", "fold", "dms", "dms-on", "dms-eighth", "h2o", "tova", "window")
    rows = _object(results / "long" / "eighth-summary.json")["rows"]
    said = (
        "DMS has a window that gives it as many bytes as fold in the mean over two grids, by the planner's formula, at the "
        "end of training text of this length, and as it ships."
    )
    return _by_position(rows, shown, (*TEXTS, "all"), said, _lines(results / "long" / "eighth.jsonl"))


def long(results: Path) -> str:
    """The adapters of a quarter on longer text."""
    rows = [row for row in _object(results / "long" / "austen-summary.json")["rows"] if row["context"] == 4096]
    each = [row for row in _lines(results / "long" / "austen.jsonl") if row["context"] == 4096]
    shown = ("full", "fold", "dms", "h2o-eighth", "tova-eighth", "window-eighth")
    said = "DMS's window is the one that gave it fold's bytes at 1,024 tokens; fold merges from a likeness of 0.65 on."
    return _by_position(rows, shown, ("austen",), said, each)


def _by_position(
    rows: Sequence[Mapping], shown: Sequence[str], texts: Sequence[str], said: str, each: Sequence[Mapping]
) -> str:
    """`each`: the lines that were summed up."""
    found = {(row["arm"], row["text"]): row for row in rows if row["arm"] in shown}
    last = {arm: found[arm, texts[-1]] for arm in shown}
    order = sorted(shown, key=lambda arm: last[arm]["kl_late"])
    lines = [
        [
            NAMES[arm], f"`{last[arm]['time']}`", f"{last[arm]['kept_tokens']:,.0f}", percent(last[arm]["bytes_share"]),
            *(three(found[arm, text]["kl_late"]) for text in texts),
            difference(last[arm]["perplexity_change_percent"], last[arm]["standard_error"], "%"),
        ]
        for arm in order
    ]  # fmt: skip
    heads = ["method", "`--time`", "kept", "bytes", *(f"KL, {text}" for text in texts), f"perplexity, {texts[-1]}"]
    windows, context = last["full"]["windows"], count(each[0]["context"])
    about = (
        f"{windows} windows of {context} tokens in all. Kept, by a head, and bytes, as a share of the full cache's: "
        f"allocated at the end of a window, where fold, which lets go of tokens once a grid, holds most. {said} {LATE}"
    )
    made = _made([row for row in each if row["arm"] in shown])
    return f"{table(heads, lines)}\n\n{about} Measured by `studies/long_context.py`. {made}"


def bits(results: Path) -> str:
    """Quantised entries, alone and under DMS."""
    found, every = [], []
    for name in ("model", "int8", "int4"):
        data = _object(results / "bits" / f"{name}-brown.json")
        rows, asked = data["rows"], data["protocol"]
        every += rows
        found += [(row, name) for row in rows[len(rows) > 2 :]]
    whole = found[0][0]["allocated_bytes"]
    lines = [
        [
            row["title"].replace("full", "Full"), name.replace("model", "as computed, float32"),
            times(whole / row["allocated_bytes"]),
            difference(row["perplexity_change_percent"]["mean"], row["perplexity_change_percent"]["standard_error"], "%"),
            three(row["kl"]),
        ]
        for row, name in sorted(found, key=lambda one: -one[0]["allocated_bytes"])
    ]  # fmt: skip
    said = (
        f"{asked['windows']} windows of {count(asked['context_tokens'])} tokens of brown. Smaller: than float32; beside a "
        "model in 16 bit int8 and int4 gain half as much. DMS: the adapter smollm2-135m-dms-4x. Measured by "
        "`kvfold eval --bits`, see `results/bits/`."
    )
    return f"{table(['method', 'bits', 'smaller', 'perplexity', 'KL'], lines)}\n\n{said} {_made(every)}"


def dmc(results: Path) -> str:
    """DMC's merge as published, with a protected first token, for longer, and the same training with gates off."""
    runs, lines = results / "runs", []

    def line(form: str, curve: Sequence[Mapping], tokens: int, after: str) -> None:
        last = [point for point in curve if tokens - 8 * 1024 < point["tokens"] <= tokens]
        mean = {name: sum(point[name] for point in last) / len(last) for name in ("distillation", "compression")}
        lines.append([
            form, f"{count(tokens)} of {count(curve[-1]['tokens'])}", times(mean["compression"]), three(mean["distillation"]),
            after,
        ])  # fmt: skip

    published, control = _lines(runs / "dmc-4x.jsonl"), _lines(runs / "dmc-control-freed.jsonl")
    line("gates off (control, ended there)", control, control[-1]["tokens"], "–")
    line("merge as published, at the same step", published, control[-1]["tokens"], "–")
    for name, form in (
        ("dmc-4x", "merge as published"), ("dmc-12-65k", "merge as published"),
        ("dmc-12-first-1-65k", "nothing merged into the first token"),
    ):  # fmt: skip
        data = _object(runs / f"{name}.json")
        before, after = (data[when]["perplexity"] for when in ("before", "after"))
        change = f"{100 * (after / before - 1):+.0f} % at {data['after']['compression']:.2f}×"
        line(form, _lines(runs / f"{name}.jsonl"), data["tokens"], change)
    heads = ["form", "tokens", "compression in training", "KL in training", "perplexity, held out"]
    said = (
        "Compression and KL: means over the last 8 steps up to there. One run each: a LoRA of rank 64 on q, k, v and o, "
        "steps of one sequence of 1,024 tokens, distilled from the original (reverse KL), a gate scale of 50 (published: 1); "
        "compression rises along a ramp."
    )
    return f"{table(heads, lines)}\n\n{said} Measured by `kvfold retrofit` and `studies/dmc_control.py`, see `results/runs/`."


def recall(results: Path) -> str:
    """Models from scratch that look a symbol up, by their seeds."""
    found: dict[tuple, list[Mapping]] = {}
    rows = _lines(results / "recall" / "recall.jsonl")
    for row in rows:
        same = ("layers", "steps", "head_dim", "variant", "study", "lr", "adam_lr")
        found.setdefault((*(row[name] for name in same), json.dumps(row["task"])), []).append(row)
    whole = {key: group for key, group in found.items() if len(group) >= SEEDS}
    lines = []
    for (layers, steps, head_dim, variant, *_), group in sorted(
        whole.items(), key=lambda item: (*item[0][:2], -item[0][2])
    ):
        scores = [[row["points"][-1]["accuracy"][f"{pairs}x1"] for row in group] for pairs in (2, 4, 8)]
        learned = sorted(one for row in group if (one := _answers_until(row, "8x1", 0.9)) is not None)
        lines.append([
            str(layers), MODELS[variant], str(head_dim), str(group[0]["kv_bytes_per_token"]), str(steps), *map(_range, scores),
            f"{len(learned)} of {len(group)}", count(learned[len(learned) // 2]) if learned else "–",
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
        f"Share of 1,024 answers that are right, lowest and highest of {SEEDS} paired seeds; of the seeds, how many come to "
        f"90 % at 8 pairs, and after how many answers, the median of these. {len(found) - len(whole)} trials of fewer seeds "
        "are in the file alone. Width 64, one KV head, KV bytes at 16 bit."
    )
    shown = table([*heads, "answers until"], lines)
    return f"{shown}\n\n{said} Measured by `studies/recall.py`. {_made(rows, 'Random weights')}"


def kvpress(results: Path) -> str:
    """Both sides on the same windows, by what they keep, and then by their KL."""
    data = _object(results / "kvpress" / "summary.json")
    rows = {(row["arm"], row["text"]): row for row in data["rows"]}
    arms = {row["arm"]: row for row in data["rows"]}
    mean = {
        arm: {name: sum(rows[arm, text][name] for text in TEXTS) / len(TEXTS) for name in ("kl", "kept", "held_bytes")}
        for arm in arms
    }
    middle = sum(one["kept"] for one in mean.values()) / len(mean)
    lines = []
    for arm in sorted(arms, key=lambda one: (mean[one]["kept"] < middle, mean[one]["kl"])):
        mine, (name, _, budget) = [rows[arm, text] for text in TEXTS], arm.partition("@")
        time = arms[arm]["asked"].partition("@@")[2] if arms[arm]["asked"] else ""
        lines.append([
            f"kvpress, {name.replace('ada:', 'AdaKV over ')}" if budget else f"kvfold `{time}`", f"{mean[arm]['kept']:.0f}",
            f"{mean[arm]['held_bytes'] / 1e6:.1f}", *(three(row["kl"]) for row in mine),
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
        f"{peer['windows']} windows of each text: a prompt of {data['prompt']} tokens is compressed, the next "
        f"{data['after']} are read, in one call each. Kept, of the prompt by a head, and held: when the prompt was read; "
        "presses that mask instead of evicting (KVzip, AdaKV) hold all of it, and what they keep is what is not masked. "
        "kvfold's methods go on evicting in what follows, presses keep all of it, so that they hold that many entries more "
        f"at the end. KL: of what follows, from the unfolded model, nats. kvpress {peer['kvpress']} on torch "
        f"{peer['made']['torch']} and transformers {peer['made']['transformers']}."
    )
    return f"{table(heads, lines)}\n\n{said} Measured by `studies/kvpress_peer.py`. {_made(data['rows'])}"


STUDIES: Mapping[str, Callable[[Path], str]] = {
    "bits": bits,
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


def _range(values: Sequence[float]) -> str:
    least, most = (percent(one) for one in (min(values), max(values)))
    return least if least == most else f"{least.removesuffix(' %')} to {most}"


def _answers_until(row: Mapping, task: str, share: float) -> int | None:
    return next((point["answers"] for point in row["points"] if point["accuracy"][task] >= share), None)


def _made(rows: Iterable[Mapping], model: str = "SmolLM2-135M") -> str:
    """On what, and from which commits, rows were measured."""
    about = [{**row, **(row.get("made") or {})} for row in rows]
    said = {name: ", ".join(dict.fromkeys(str(one[name]) for one in about)) for name in ("cpu", "kvfold", "torch")}
    threads = " or ".join(sorted({str(one["threads"]) for one in about}))
    commits = list(dict.fromkeys(short_commit(one["git_commit"]) for one in about))
    versions = f"kvfold {said['kvfold']}, torch {said['torch']}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    return f"{model}; {said['cpu']}, {threads} thread{'s' * (threads != '1')}, float32; {versions}."
