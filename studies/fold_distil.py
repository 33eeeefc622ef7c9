"""fold trained, beside the controls that it is held against: `kvfold retrofit --start` trains them all.

    python studies/fold_distil.py match MODEL FOLDED DMS --data TEXT ... --out MATCH.json
    python studies/fold_distil.py measure MODEL OUT.jsonl --text TEXT ... --arm NAME=ADAPTER[@@TIME] ...
    python studies/fold_distil.py summary OUT.jsonl SUMMARY.json --arm NAME --against NAME ...

`match` finds the delay with which DMS holds as many bytes as fold, on average over the grid's phases, each with its own state.
`measure` writes a line for each text, window and arm; lines that are there are not measured again. `summary` compares arms window
by window.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

import kvfold
from kvfold.data import read_text_file, text_windows
from kvfold.eval.reading import score
from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import layout_bytes, page_bytes, page_class, page_classes
from kvfold.models.decoder import FoldForCausalLM
from kvfold.ops.native import flush_denormals
from kvfold.record import made
from kvfold.train.data import draw_text

SEQUENCE_TOKENS = 1024
FROM_POSITION = 256
"""`kl_late` is over the positions from here on: before it hardly anything has left."""
LAST_QUERIES = 64
"""What is kept is the mean over so many last queries, so that every grid's phases count alike."""
MODEL_BYTES = 2
"""Bytes are counted for a model in half precision."""
_MATCHED_WITHIN = 0.002


@torch.no_grad()
def read_under(model: FoldForCausalLM, layout: KVLayout, ids_T: Tensor) -> tuple[Tensor, dict[str, float]]:
    """States before the head [T, C] under a layout, and entries and bytes held, means over the last queries."""
    before, model.config.layout = model.config.layout, layout
    try:
        outputs = model.model(ids_T[None], use_cache=False, output_decisions=True)
    finally:
        model.config.layout = before
    kept, size = [], 0.0
    for owner, marked in zip(layout.owners, outputs.decisions, strict=True):
        method = layout.time_of(owner)
        counts = _kept(marked[0] > 0.5, method.eviction_delay, method.grid or 1)[:, -LAST_QUERIES:].float().mean(dim=1)
        one = page_class(layout, owner)
        per_slot = {"model_bytes": MODEL_BYTES, "slot_state_bytes": page_classes(layout)[one]}
        slot = page_bytes(one, 1, **per_slot) - page_bytes(one, 0, **per_slot)
        size += float(counts.sum()) * slot + len(counts) * method.stream_state_bytes(one.head_dim)
        kept.append(counts)
    full = layout_bytes(layout.base(), [len(ids_T)], MODEL_BYTES)
    return outputs.last_hidden_state[0], {"kept": float(torch.cat(kept).mean()), "bytes": size, "full_bytes": full}


def _kept(marked_KT: Tensor, delay: int, grid: int) -> Tensor:
    """Entries that each query sees, [K, T]."""
    query = torch.arange(marked_KT.shape[1])
    gone = torch.nn.functional.pad(marked_KT.long().cumsum(dim=1), (1, 0))
    return query + 1 - gone[:, (query // grid * grid - delay).clamp(min=0)]


def match(args: argparse.Namespace) -> None:
    """The delay of step-wise DMS at fold's mean bytes, on text that is not measured on."""
    tokenizer = kvfold.load_tokenizer(args.model)
    blocks = _text(args, tokenizer, args.tokens).calibration[: args.blocks]
    model = kvfold.load(args.model, adapter=str(args.folded))
    wanted = sum(read_under(model, model.config.layout, ids)[1]["bytes"] for ids in blocks)
    model, tried = kvfold.load(args.model, adapter=str(args.dms)), {}

    def held(delay: int) -> float:
        if delay not in tried:
            layout = model.config.layout.with_time(f"dms:{delay}")
            tried[delay] = sum(read_under(model, layout, ids)[1]["bytes"] for ids in blocks) / wanted
        return tried[delay]

    low, high = 1, SEQUENCE_TOKENS
    guess = model.config.layout.time_of(0).delay
    slope = 1 / 300  # at first: what a token of delay costs is near what a token costs
    while high - low > 1 and abs(held(guess) - 1) > _MATCHED_WITHIN:
        low, high = (guess, high) if held(guess) < 1 else (low, guess)
        if low in tried and high in tried:
            slope = (tried[high] - tried[low]) / (high - low)
        guess = min(max(low + 1, guess + round((1 - held(guess)) / slope)), high - 1)
    best = min(tried, key=lambda one: abs(tried[one] - 1))
    found = {"delay": best, "bytes_beside_fold": tried[best], "tried": tried, "blocks": len(blocks), **_about(args)}
    args.out.write_text(json.dumps(found) + "\n", encoding="utf-8")
    _say(json.dumps(found))


def measure(args: argparse.Namespace) -> None:
    """A line for each text, window and arm."""
    done = {(row["text"], row["window"], row["windows"], row["arm"]) for row in _rows(args.out)}
    tokenizer = kvfold.load_tokenizer(args.model)
    texts = [
        text_windows(read_text_file(one), tokenizer, windows=args.windows, context_tokens=args.context)
        for one in args.text
    ]
    for arm in args.arm:
        name, _, given = arm.partition("=")
        folder, _, time_text = given.partition("@@")
        model = kvfold.load(args.model, adapter=folder).eval()
        layout = model.config.layout if not time_text else model.config.layout.with_time(time_text)
        for text in texts:
            for window, ids in enumerate(text.ids_WT):
                if (text.name, window, args.windows, name) in done:
                    continue
                began = time.process_time()
                with torch.no_grad():
                    options = kvfold.CallOptions(gates="off")
                    full = model.model(ids[None], use_cache=False, options=options).last_hidden_state[0, :-1]
                    states, counts = read_under(model, layout, ids)
                    ours = score(model, states[:-1], ids[1:], (model, full))
                    theirs = score(model, full, ids[1:])
                row = {
                    "text": text.name, "window": window, "windows": args.windows, "context": args.context, "arm": name,
                    "adapter": given, "time": layout.time_text(), "loss": float(ours.loss.mean()),
                    "loss_full": float(theirs.loss.mean()), "kl": float(ours.kl.mean()),
                    "kl_late": float(ours.kl[FROM_POSITION:].mean()), "same_top1": float(ours.agrees.mean()), **counts,
                    "cpu_seconds": time.process_time() - began, **_about(args),
                }  # fmt: skip
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                _say(f"{text.name} {window} {name}: KL {row['kl_late']:.5f}, kept {row['kept']:.1f}")


def summary(args: argparse.Namespace) -> None:
    """Of each text and all texts: an arm beside others, window by window, with standard errors."""
    rows = list(_rows(args.rows))
    found = []
    for against in args.against:
        for text in [*sorted({row["text"] for row in rows}), None]:
            ours, theirs = (
                {(row["text"], row["window"]): row for row in rows if row["arm"] == one and text in (None, row["text"])}
                for one in (args.arm, against)
            )
            both = sorted(ours.keys() & theirs.keys())
            if both:
                found.append(
                    {"arm": args.arm, "against": against, "text": text or "all", **_beside(ours, theirs, both)}
                )
    args.out.write_text(json.dumps({"rows": found, **_about(args)}, indent=1) + "\n", encoding="utf-8")
    for row in found:
        _say(json.dumps(row))


def _beside(ours: dict, theirs: dict, both: list) -> dict[str, float]:
    """Means, and the change of the mean divergence with its standard error over windows."""
    values = {}
    for name, of in (("", ours), ("_against", theirs)):
        for what in ("kl_late", "kept", "bytes"):
            values[what + name] = sum(of[one][what] for one in both) / len(both)
        change = [of[one]["loss"] - of[one]["loss_full"] for one in both]
        values["perplexity_change" + name] = math.exp(sum(change) / len(both)) - 1
    differences = torch.tensor([ours[one]["kl_late"] - theirs[one]["kl_late"] for one in both], dtype=torch.float64)
    error = float(differences.std() / len(both) ** 0.5) if len(both) > 1 else math.nan
    base = values["kl_late_against"]
    return {"windows": len(both), **values, "change": float(differences.mean()) / base, "standard_error": error / base}


def _rows(path: Path) -> Iterator[dict]:
    if path.exists():
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def _text(args: argparse.Namespace, tokenizer, tokens: int):
    return draw_text(args.data, tokenizer, tokens=tokens, seq_len=SEQUENCE_TOKENS, seed=args.seed)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _about(args: argparse.Namespace) -> dict:
    return {
        "model": args.name, **made(torch.get_num_threads(), "float32"), "transformers": version("transformers"),
    }  # fmt: skip


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="SmolLM2-135M-Instruct.Q4_1", help="what the model is called in the lines")
    parser.add_argument("--seed", type=int, default=0)
    commands = parser.add_subparsers(required=True)

    def command(function, *places: str) -> argparse.ArgumentParser:
        one = commands.add_parser(function.__name__, help=function.__doc__.splitlines()[0])
        one.set_defaults(run=function)
        for place in places:
            one.add_argument(place, type=str if place == "model" else Path)
        return one

    one = command(match, "model", "folded", "dms")
    one.add_argument("--data", action="append", required=True)
    one.add_argument("--tokens", type=int, default=262_144, help="of the training run, whose text is not looked at")
    one.add_argument("--blocks", type=int, default=8)
    one.add_argument("--out", type=Path, required=True)
    one = command(measure, "model", "out")
    one.add_argument("--text", type=Path, action="append", required=True)
    one.add_argument("--arm", action="append", required=True, help="NAME=ADAPTER, or NAME=ADAPTER@@TIME")
    one.add_argument("--windows", type=int, default=16)
    one.add_argument("--context", type=int, default=SEQUENCE_TOKENS)
    one = command(summary, "rows", "out")
    one.add_argument("--arm", required=True)
    one.add_argument("--against", action="append", required=True)
    args = parser.parse_args()
    flush_denormals()
    args.run(args)


if __name__ == "__main__":
    main()
