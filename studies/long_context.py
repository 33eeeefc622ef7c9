"""How well a model with a compressed cache reads long text: perplexity and divergence by position, at equal kept tokens.

    python studies/long_context.py measure MODEL OUT.jsonl --text TEXT ... --context 4096 --windows 8 --arm NAME=[ADAPTER@@]TIME
    python studies/long_context.py summary OUT.jsonl SUMMARY.json --against NAME ...

Text is read through the cache as it is served: methods whose state does not depend on where calls are cut in calls of many
tokens, the others token by token. `full` is read first and is what the others are held against. TIME may name a share of the
context for budgets, as `--time` does. `measure` writes a line for each text, window and arm, with means over blocks of positions;
lines that are there already are not measured again. `summary` compares arms with `full` and with one another, window by window.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kvfold
from kvfold.data import TextWindows, read_text_file, text_windows
from kvfold.eval.perplexity import paired_difference
from kvfold.eval.reading import read_rows, score
from kvfold.models.decoder import FoldForCausalLM
from kvfold.ops.native import flush_denormals
from kvfold.record import made, with_record

BLOCK = 256
"""Positions whose mean is one figure."""
ALL = "all"
"""Stands for the windows of all texts together."""
FROM_POSITION = 256
"""`kl_late` is over the positions from here on: before it hardly anything has left."""


def states_under(
    model: FoldForCausalLM, time_text: str, ids_BT: Tensor, call_tokens: int
) -> tuple[Tensor, dict[str, Any]]:
    """States before the head, [B, T, C], read through a cache that keeps by this text form; and what it held at the end."""
    layout = model.config.layout.with_time(time_text)
    states_BTC = torch.empty(*ids_BT.shape, model.config.hidden_size)

    def keep(hidden_BtC: Tensor, start: int) -> None:
        states_BTC[:, start : start + hidden_BtC.shape[1]] = hidden_BtC

    reading = read_rows(model, layout, ids_BT, keep, call_tokens=call_tokens)
    held = {
        "kept_tokens": ids_BT.shape[1] * reading.kept_share[-1],
        "allocated_bytes": reading.allocated_bytes / len(ids_BT), "full_bytes": reading.full_bytes / len(ids_BT),
        "seconds": reading.seconds,
    }  # fmt: skip
    return states_BTC, held


@torch.no_grad()
def row_of(
    model: FoldForCausalLM, states_TC: Tensor, full: tuple[FoldForCausalLM, Tensor], ids_T: Tensor
) -> dict[str, Any]:
    """Figures of one window: means over blocks of positions, and over all that count as late."""
    scores = score(model, states_TC[:-1], ids_T[1:], (full[0], full[1][:-1]))

    def blocks(values_N: Tensor) -> list[float]:
        return [float(part.mean()) for part in values_N.split(BLOCK)]

    late = slice(FROM_POSITION, None)
    return {
        "loss": float(scores.loss.mean()), "loss_late": float(scores.loss[late].mean()),
        "kl_late": float(scores.kl[late].mean()), "top1_agreement": float(scores.agrees.mean()),
        "loss_by_block": blocks(scores.loss), "kl_by_block": blocks(scores.kl),
    }  # fmt: skip


def measure(args: argparse.Namespace) -> None:
    """A line for each text, window and arm; windows side by side."""
    done = {(row["text"], row["context"], row["windows"], row["window"], row["arm"]) for row in _rows(args.out)}
    tokenizer, plain = kvfold.load_tokenizer(args.model), kvfold.load(args.model).eval()
    arms = [one.partition("=")[::2] for one in args.arm]
    for path in args.text:
        text = text_windows(read_text_file(path), tokenizer, windows=args.windows, context_tokens=args.context)
        last = text.num_windows - 1
        missing = [
            one
            for one in [("full", "full"), *arms]
            if (text.name, args.context, args.windows, last, one[0]) not in done
        ]
        if not missing:
            continue
        full, held = states_under(plain, "full", text.ids_WT, args.call)
        for name, asked in missing:
            adapter, _, time_text = asked.rpartition("@@")
            model = kvfold.load(args.model, adapter=adapter).eval() if adapter else plain
            states, held = (full, held) if name == "full" else states_under(model, time_text, text.ids_WT, args.call)
            _write(args, text, name, time_text, [
                {**row_of(model, states[one], (plain, full[one]), text.ids_WT[one]), **held} for one in range(text.num_windows)
            ])  # fmt: skip


def _write(args: argparse.Namespace, text: TextWindows, name: str, time_text: str, rows: list[dict[str, Any]]) -> None:
    about = {"text": text.name, "context": args.context, "windows": args.windows, "arm": name, "time": time_text}
    record = {"model": args.name, **made(torch.get_num_threads(), "float32")}
    with args.out.open("a", encoding="utf-8") as file:
        for window, row in enumerate(rows):
            file.write(json.dumps({**about, "window": window, **row, **record}) + "\n")
    late = sum(row["kl_late"] for row in rows) / len(rows)
    sys.stdout.write(f"{text.name} {args.context} {name}: KL {late:.5f}, kept {rows[0]['kept_tokens']:.0f}\n")
    sys.stdout.flush()


def summary(args: argparse.Namespace) -> None:
    """Of each text and of all, each context and arm: perplexity against `full`, divergence, and its change against other arms,
    each under its name; that against the first stands without.
    """
    rows, found = list(_rows(args.rows)), []
    places = sorted({(row["text"], row["context"]) for row in rows})
    for text, context in [*places, *((ALL, context) for context in sorted({context for _, context in places}))]:
        here = [row for row in rows if row["context"] == context and text in (row["text"], ALL)]
        arms: dict[str, dict[tuple[str, int], dict]] = {}
        for row in here:
            arms.setdefault(row["arm"], {})[row["text"], row["window"]] = row
        for name, ours in arms.items():
            one = {"text": text, "context": context, "arm": name, **_figures(ours, arms["full"])}
            for other in args.against:
                if other in arms and name not in ("full", other):
                    behind = "" if other == args.against[0] else f"_from_{other}"
                    one |= {key + behind: value for key, value in _change(ours, arms[other]).items()}
            found.append(one)
    seconds = {one["arm"]: one["seconds"] for one in rows}
    found = with_record(found, made(torch.get_num_threads(), "float32"))
    told = {"against": " ".join(args.against), "rows": [{**one, "seconds": seconds[one["arm"]]} for one in found]}
    args.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    for one in found:
        sys.stdout.write(json.dumps({name: value for name, value in one.items() if "by_block" not in name}) + "\n")


def _figures(ours: dict[tuple[str, int], dict], full: dict[tuple[str, int], dict]) -> dict[str, Any]:
    """Means over windows; the change of perplexity in per cent with its standard error."""
    rows = list(ours.values())
    mean, error = paired_difference(*([of[one]["loss"] for one in ours] for of in (ours, full)))
    by_block = [sum(column) / len(rows) for column in zip(*(row["kl_by_block"] for row in rows), strict=True)]
    return {
        "windows": len(rows), "time": rows[0]["time"], "perplexity": math.exp(sum(row["loss"] for row in rows) / len(rows)),
        "perplexity_change_percent": 100 * (math.exp(mean) - 1), "standard_error": error and 100 * math.exp(mean) * error,
        **{name: sum(row[name] for row in rows) / len(rows) for name in ("kl_late", "top1_agreement", "kept_tokens")},
        "bytes_share": sum(row["allocated_bytes"] for row in rows) / sum(row["full_bytes"] for row in rows),
        "kl_by_block": by_block,
    }  # fmt: skip


def _change(ours: dict[tuple[str, int], dict], theirs: dict[tuple[str, int], dict]) -> dict[str, float]:
    """Change of the mean divergence against another arm, as a share of that arm's, with its standard error."""
    both = sorted(ours.keys() & theirs.keys())
    base = sum(theirs[one]["kl_late"] for one in both) / len(both)
    mean, error = paired_difference(*([of[one]["kl_late"] for one in both] for of in (ours, theirs)))
    return {"kl_change": mean / base, "kl_change_error": error and error / base}


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="SmolLM2-135M-Instruct.Q4_1", help="what the model is called in the lines")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("measure", help=measure.__doc__)
    one.set_defaults(run=measure)
    one.add_argument("model")
    one.add_argument("out", type=Path)
    one.add_argument("--text", type=Path, action="append", required=True)
    one.add_argument("--arm", action="append", required=True, help="NAME=TIME, or NAME=ADAPTER@@TIME")
    one.add_argument("--context", type=int, default=4096)
    one.add_argument("--windows", type=int, default=8)
    one.add_argument("--call", type=int, default=64, help="tokens of a call, where that changes nothing")
    one = commands.add_parser("summary", help=summary.__doc__)
    one.set_defaults(run=summary)
    one.add_argument("rows", type=Path)
    one.add_argument("out", type=Path)
    one.add_argument("--against", nargs="+", default=["dms"], help="the arms that others are held against")
    args = parser.parse_args()
    flush_denormals()
    args.run(args)


if __name__ == "__main__":
    main()
