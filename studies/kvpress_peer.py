"""kvfold beside kvpress: a prompt compressed once, what follows read, at equal kept tokens.

    python studies/kvpress_peer.py ours MODEL OUT.jsonl --text TEXT ... --arm NAME=ADAPTER@@TIME ... [--prompt 768] [--after 256]
    python studies/kvpress_peer.py theirs MODEL OUT.jsonl --press NAME ... --kept TOKENS ...
    python studies/kvpress_peer.py summary OUT.jsonl SUMMARY.json

`ours` runs in kvfold's environment and leaves the windows' ids beside OUT; `theirs` runs in one that has kvpress (0.5.5 wants
transformers below 5.3) and no kvfold, on the same weights as a Hugging Face checkpoint. Both read the prompt, then what follows,
in one call each, and score what follows: the loss, and the divergence from the same model with its whole cache. What is held is
counted when the prompt was read. Ours goes on evicting in what follows, presses keep all of it.
"""

import argparse
import json
import math
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def scored(logits_NV: Tensor, full_NV: Tensor, targets_N: Tensor) -> dict[str, float]:
    """Means over the tokens that follow: the loss, and KL(full || ours), nats a token."""
    log_p, log_r = logits_NV.float().log_softmax(dim=-1), full_NV.float().log_softmax(dim=-1)
    return {
        "loss": float(-log_p.gather(1, targets_N[:, None]).mean()),
        "loss_full": float(-log_r.gather(1, targets_N[:, None]).mean()),
        "kl": float((log_r.exp() * (log_r - log_p)).sum(dim=-1).mean()),
    }


def _ids_path(out: Path) -> Path:
    return out.with_suffix(".ids.json")


def _add(out: Path, row: dict[str, Any]) -> None:
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    about = {**versions, "threads": torch.get_num_threads(), "when": datetime.now(UTC).isoformat(timespec="seconds")}
    row["made"] = {**row["made"], **about}
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    sys.stdout.write(f"{row['text']} {row['window']} {row['arm']}: KL {row['kl']:.5f}, kept {row['kept']:.1f}\n")
    sys.stdout.flush()


def _rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []


@torch.inference_mode()
def ours(args: argparse.Namespace) -> None:
    """Each arm on each window."""
    import kvfold
    from kvfold.data import read_text_file, text_windows
    from kvfold.eval.reading import entry_bytes, kept_shares
    from kvfold.ops.native import flush_denormals
    from kvfold.record import made

    flush_denormals()
    tokenizer, plain = kvfold.load_tokenizer(args.model), kvfold.load(args.model).eval()
    size = args.prompt + args.after
    texts = [
        text_windows(read_text_file(path), tokenizer, windows=args.windows, context_tokens=size) for path in args.text
    ]
    about = {"prompt": args.prompt, "after": args.after, "texts": {one.name: one.ids_WT.tolist() for one in texts}}
    _ids_path(args.out).write_text(json.dumps(about), encoding="utf-8")
    done = {(row["text"], row["window"], row["arm"]) for row in _rows(args.out)}
    for arm in args.arm:
        name, _, asked = arm.partition("=")
        adapter, _, time_text = asked.rpartition("@@")
        model = kvfold.load(args.model, adapter=adapter).eval() if adapter else plain
        for text in texts:
            for window, ids_T in enumerate(text.ids_WT):
                if (text.name, window, name) in done:
                    continue
                part = slice(args.prompt, size - 1)
                full = plain(ids_T[None], use_cache=False).logits[0, part]
                began, cache = time.perf_counter(), model.new_cache(rows=1, time=time_text)
                weights = entry_bytes(model.config.layout.with_time(time_text), 4, torch.device("cpu"))
                model(ids_T[None, : args.prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
                held = {"kept": args.prompt * float(kept_shares(cache, weights)), "held_bytes": cache.allocated_bytes}
                logits = model(ids_T[None, args.prompt : -1], past_key_values=cache, use_cache=True).logits[0]
                seconds = time.perf_counter() - began
                cache.free()
                row = {"text": text.name, "window": window, "arm": name, "asked": asked, **held, "seconds": seconds}
                row |= {"prompt": args.prompt, "after": args.after}
                record = {"made": made(torch.get_num_threads(), "float32")}
                _add(args.out, row | scored(logits, full, ids_T[args.prompt + 1 :]) | record)


@torch.inference_mode()
def theirs(args: argparse.Namespace) -> None:
    """Each press at each number of kept tokens, on the windows that `ours` left."""
    import kvpress
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_flush_denormal(True)
    about = json.loads(_ids_path(args.out).read_text(encoding="utf-8"))
    prompt = about["prompt"]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    rows = _rows(args.out)
    done = {(row["text"], row["window"], row["arm"]) for row in rows}
    # What this environment can't say of itself: the same checkout measures both sides on the same machine.
    known = {name: value for name, value in rows[0]["made"].items() if name in ("git_commit", "kvfold", "cpu", "dtype")}
    for text, windows in about["texts"].items():
        for window, ids in enumerate(windows):
            ids_T = torch.tensor(ids)
            full = None
            for kept in args.kept:
                for name in args.press:
                    arm = f"{name}@{kept}"
                    if (text, window, arm) in done:
                        continue
                    if full is None:
                        full = model(ids_T[None], use_cache=False).logits[0, prompt:-1]
                    press, cache, began = _press(kvpress, name, 1 - kept / prompt), DynamicCache(), time.perf_counter()
                    with press(model):
                        model.model(input_ids=ids_T[None, :prompt], past_key_values=cache)
                    held = sum(
                        one.numel() * one.element_size() for layer in cache.layers for one in (layer.keys, layer.values)
                    )
                    after = torch.arange(prompt, len(ids) - 1)
                    logits = model(ids_T[None, prompt:-1], past_key_values=cache, position_ids=after[None]).logits[0]
                    row = {"text": text, "window": window, "arm": arm, "kept": float(kept), "held_bytes": held,
                           "seconds": time.perf_counter() - began, **scored(logits, full, ids_T[prompt + 1 :]),
                           "prompt": prompt, "after": len(ids) - prompt,
                           "kvpress": metadata.version("kvpress"), "made": known}  # fmt: skip
                    _forget(model)
                    _add(args.out, row)


def _press(kvpress: Any, name: str, ratio: float) -> Any:
    """A press that evicts this share of the prompt. `ada:NAME` lets heads of a layer share a budget."""
    outer, _, inner = name.rpartition(":")
    options = {"layerwise": False} if inner == "KVzip" else {}
    press = getattr(kvpress, f"{inner}Press")(compression_ratio=ratio, **options)
    return kvpress.AdaKVPress(press) if outer == "ada" else press


def _forget(model: Any) -> None:
    """Presses that evict by a mask leave it at the layers."""
    for layer in model.model.layers:
        if getattr(layer.self_attn, "masked_key_indices", None) is not None:
            layer.self_attn.masked_key_indices = None


def summary(args: argparse.Namespace) -> None:
    """Of each text and arm: means over windows, and the change of perplexity in per cent with its standard error."""
    from kvfold.eval.perplexity import paired_difference

    rows, found = _rows(args.rows), []
    for text in sorted({row["text"] for row in rows}):
        for arm in dict.fromkeys(row["arm"] for row in rows):
            here = [row for row in rows if (row["text"], row["arm"]) == (text, arm)]
            if not here:
                continue
            mean, error = paired_difference(*([row[name] for row in here] for name in ("loss", "loss_full")))
            factor = 100 * math.exp(mean)
            means = {
                name: sum(row[name] for row in here) / len(here) for name in ("kl", "kept", "held_bytes", "seconds")
            }
            found.append({"text": text, "arm": arm, "windows": len(here), **means,
                          "perplexity_change_percent": factor - 100, "standard_error": error and factor * error,
                          **{name: here[-1].get(name) for name in ("asked", "kvpress", "made")}})  # fmt: skip
    whole = {"prompt": rows[0]["prompt"], "after": rows[0]["after"], "rows": found}
    args.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    for one in found:
        sys.stdout.write(json.dumps(one) + "\n")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for function in (ours, theirs, summary):
        one = commands.add_parser(function.__name__, help=function.__doc__)
        one.set_defaults(run=function)
        one.add_argument("rows" if function is summary else "model", type=Path if function is summary else str)
        one.add_argument("out", type=Path)
        if function is ours:
            one.add_argument("--text", type=Path, action="append", required=True)
            one.add_argument("--arm", action="append", required=True, help="NAME=ADAPTER@@TIME")
            one.add_argument("--prompt", type=int, default=768)
            one.add_argument("--after", type=int, default=256)
            one.add_argument("--windows", type=int, default=8)
        if function is theirs:
            one.add_argument("--press", action="append", required=True)
            one.add_argument("--kept", type=int, action="append", required=True)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
