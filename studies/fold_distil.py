"""fold trained: a DMS adapter's gates taken over, importance fitted, then distilled; and the controls that it is held against.

    python studies/fold_distil.py fit MODEL FOLDED --data TEXT ... [--time fold:128] [--blocks 16]
    python studies/fold_distil.py train MODEL START OUT --data TEXT ... --work WORK [--tokens 262144]
    python studies/fold_distil.py match MODEL FOLDED DMS --data TEXT ... --out MATCH.json
    python studies/fold_distil.py measure MODEL OUT.jsonl --text TEXT ... --arm NAME=ADAPTER[@@TIME] ...
    python studies/fold_distil.py summary OUT.jsonl SUMMARY.json --arm NAME --against NAME ...

`train` goes on from an adapter: under fold its gates are frozen and hard, and importance, b, c and lambda learn; under DMS the
gates learn as in a retrofit, at the compression that they have. A run that was stopped resumes from WORK. `match` finds the
delay with which DMS holds as many bytes as fold, on average over the grid's phases, each with its own state. `measure` writes a
line for each text, window and arm; lines that are there already are not measured again. `summary` compares arms window by window.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

import kvfold
from kvfold.data.texts import read_text_file
from kvfold.data.windows import text_windows
from kvfold.eval.scoring import next_token_logits, score
from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import layout_bytes, page_bytes, page_class, page_classes
from kvfold.models.adapters import Base, apply_adapter
from kvfold.models.decoder import FoldForCausalLM
from kvfold.ops.denormals import flush_denormals
from kvfold.report.results import cpu_name, git_commit
from kvfold.train.calibrate import calibrate
from kvfold.train.data import TrainingOrder, draw_text
from kvfold.train.losses import divergence, ratio_loss, slice_rows, summed_in_slices
from kvfold.train.results import write_trained
from kvfold.train.settings import RetrofitSettings
from kvfold.train.student import retention_of
from kvfold.train.taken_gates import fit_importance, take_gates
from kvfold.train.teacher import TeacherStates

SEQUENCE_TOKENS = 1024
FROM_POSITION = 256
"""`kl_late` is over the positions from here on: before it hardly anything has left."""
LAST_QUERIES = 64
"""What is kept is the mean over so many last queries, so that every grid's phases count alike."""
MODEL_BYTES = 2
"""Bytes are counted for a model in half precision."""
_MATCHED_WITHIN = 0.002


def settings_of(args: argparse.Namespace, time_text: str) -> RetrofitSettings:
    """What adapters are written by and gates are trained by; of fold's gates those that it took over."""
    return RetrofitSettings(
        time="dms:" + time_text.split(":")[1].split("+")[0], trains="adapter", reads="own", compression=args.compression,
        data=tuple(args.data), sequence_tokens=SEQUENCE_TOKENS, seed=args.seed,
    )  # fmt: skip


def fit(args: argparse.Namespace) -> None:
    """An adapter for fold from one for DMS."""
    model = kvfold.load(args.model)
    base = Base.of(model, args.name)
    apply_adapter(model, args.adapter)
    took = model.config.layout.time_of(0)
    take_gates(model, args.time or f"fold:{took.delay}")
    tokenizer, began = kvfold.load_tokenizer(args.model), time.process_time()
    text = _text(args, tokenizer, args.blocks * SEQUENCE_TOKENS)
    facts = fit_importance(model, text.train[: args.blocks])
    args.folder.mkdir(parents=True, exist_ok=True)
    write_trained(model, tokenizer, settings_of(args, model.config.layout.time_text()), base, args.folder, tokens=0)
    _say(json.dumps({**facts, "cpu_seconds": time.process_time() - began, **_about(args)}))


class Run:
    """One training run: the model, what learns in it, and where its steps stand."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.model = args, kvfold.load(args.model)
        self.base, self.tokenizer = Base.of(self.model, args.name), kvfold.load_tokenizer(args.model)
        self.teacher = None if args.teacher_states is None else TeacherStates(args.teacher_states, self.model)
        apply_adapter(self.model, args.start, time=args.time)
        self.settings = settings_of(args, self.model.config.layout.time_text())
        self.folds = self.model.config.layout.time_of(0).grid is not None
        self.steps = args.tokens // (args.batch * SEQUENCE_TOKENS)
        text = _text(args, self.tokenizer, args.tokens)
        if args.calibrate and not (args.work / "state.pt").exists():
            _say(json.dumps(calibrate(self.model, text.calibration[:8], self.settings)))
        self.samples = TrainingOrder(text.train, steps=self.steps, batch=args.batch, seed=args.seed)
        self.optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.95), weight_decay=0.0)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.done = 0

    def _groups(self) -> list[dict]:
        """What learns. Under fold decisions stay as they are: their rows, and the norm that they share with importance."""
        self.model.requires_grad_(False)
        modules = [one.self_attn for one in self.model.model.layers]
        weights = [weight for one in modules for weight in (one.fold_proj.weight, one.fold_proj.bias)]
        if not self.folds:
            weights += [one.fold_norm.weight for one in modules]
            return [{"params": [one.requires_grad_(True) for one in weights], "lr": self.args.rate}]
        for weight in weights:
            weight.requires_grad_(True)
            weight.register_hook(_without_decisions)
        heads = [one.fold_proj.heads.requires_grad_(True) for one in modules]
        return [{"params": weights, "lr": self.args.rate}, {"params": heads, "lr": self.args.heads_rate}]

    def losses(self, sample: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of one sequence: the divergence from the model with its gates off, nats a token, and the pressure on gates."""
        ids, model = sample["input_ids"][None], self.model
        theirs = self._teacher(ids)[0, :-1]
        asked = {} if self.folds else {"noise_key": sample["noise_key"][None], "output_decisions": True}
        outputs = model.model(ids, use_cache=False, **asked)

        def loss_of(part: slice, states_NC: Tensor) -> Tensor:
            with torch.no_grad():
                theirs_NV = next_token_logits(model, theirs[part])
            return divergence(next_token_logits(model, states_NC), theirs_NV, self.args.kl).sum()

        rows = slice_rows(model.config.vocab_size)
        main = summed_in_slices(loss_of, outputs.last_hidden_state[0, :-1], slice_rows=rows) / theirs.shape[0]
        if self.folds:
            return main, main.new_zeros(())
        share = retention_of(model, self.settings).share_for(self.settings.compression)
        return main, ratio_loss(outputs.decisions, share)

    @torch.no_grad()
    def _teacher(self, ids_BT: Tensor) -> Tensor:
        def ask(missing: Tensor) -> Tensor:
            options = kvfold.CallOptions(gates="off")
            return self.model.model(missing, use_cache=False, options=options).last_hidden_state

        return ask(ids_BT) if self.teacher is None else self.teacher.of(ids_BT, ask)

    def step(self) -> dict[str, float]:
        """One optimizer step."""
        warm = min(1.0, (self.done + 1) / max(1, self.steps // 16))
        factor = warm * (0.1 + 0.9 * (1 + math.cos(math.pi * self.done / self.steps)) / 2)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        total = {"kl": 0.0, "ratio": 0.0}
        for index in range(self.args.batch):
            main, ratio = self.losses(self.samples[self.done * self.args.batch + index])
            ((main + ratio) / self.args.batch).backward()
            total["kl"] += float(main.detach()) / self.args.batch
            total["ratio"] += float(ratio.detach()) / self.args.batch
        learned = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        total["norm"] = float(torch.nn.utils.clip_grad_norm_(learned, 1.0))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return total

    def save(self, file: Path) -> None:
        """All that is needed to resume."""
        weights = {name: one.detach() for name, one in self.model.named_parameters() if one.requires_grad}
        state = {"weights": weights, "optimizer": self.optimizer.state_dict(), "done": self.done}
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, file)

    def resume(self, file: Path) -> None:
        """Go on where `save` was."""
        state = torch.load(file, weights_only=True)
        with torch.no_grad():
            for name, weight in state["weights"].items():
                self.model.get_parameter(name).copy_(weight)
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["done"]


def train(args: argparse.Namespace) -> None:
    """Distil an adapter, and write it."""
    run, checkpoint, curve = Run(args), args.work / "state.pt", args.work / "steps.jsonl"
    args.work.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        run.resume(checkpoint)
    kept = curve.read_text(encoding="utf-8").splitlines() if curve.exists() else []
    curve.write_text("".join(f"{line}\n" for line in kept if json.loads(line)["step"] <= run.done), encoding="utf-8")
    run.model.train(not run.folds)
    while run.done < run.steps:
        began = time.process_time()
        point = {"step": run.done + 1, "tokens": (run.done + 1) * args.batch * SEQUENCE_TOKENS, **run.step()}
        point |= {"cpu_seconds": time.process_time() - began, **_about(args)}
        with curve.open("a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")
        if run.done % args.save_steps == 0 or run.done == run.steps:
            run.save(checkpoint)
        _say(f"step {run.done} of {run.steps}: KL {point['kl']:.5f}, {point['cpu_seconds']:.0f} s")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.calibrate:
        text = _text(args, run.tokenizer, args.tokens)
        _say(json.dumps(calibrate(run.model, text.calibration, run.settings)))
    write_trained(run.model.eval(), run.tokenizer, run.settings, run.base, args.out, tokens=args.tokens)


def _without_decisions(grad: Tensor) -> Tensor:
    """Of two numbers a head the first decides."""
    return grad.index_fill(0, torch.arange(0, grad.shape[0], 2), 0.0)


# -- what is kept, and what it costs -------------------------------------------------------------------------------------


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
    while high - low > 1 and abs(held(guess) - 1) > _MATCHED_WITHIN:
        low, high = (guess, high) if held(guess) < 1 else (low, guess)
        # What a token of delay costs is near what a token costs.
        guess = min(max(low + 1, guess + round((1 / held(guess) - 1) * 300)), high - 1)
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
    return draw_text(args.data, tokenizer, tokens=tokens, sequence_tokens=SEQUENCE_TOKENS, seed=args.seed)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _about(args: argparse.Namespace) -> dict:
    return {
        "model": args.name, "git_commit": git_commit(), "kvfold": kvfold.__version__, "torch": torch.__version__,
        "transformers": version("transformers"), "threads": torch.get_num_threads(), "cpu": cpu_name(),
    }  # fmt: skip


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="SmolLM2-135M-Instruct.Q4_1", help="what the model is called in the lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compression", type=float, default=4.0, help="that the gates were trained to")
    commands = parser.add_subparsers(required=True)

    def command(function, *places: str) -> argparse.ArgumentParser:
        one = commands.add_parser(function.__name__, help=function.__doc__.splitlines()[0])
        one.set_defaults(run=function)
        for place in places:
            one.add_argument(place, type=str if place == "model" else Path)
        return one

    one = command(fit, "model", "folder")
    one.add_argument("--adapter", default="smollm2-135m-dms-4x")
    one.add_argument("--time", help="the text form of fold; as long a delay as the adapter has if not given")
    one.add_argument("--blocks", type=int, default=16, help=f"sequences of {SEQUENCE_TOKENS} tokens to fit on")
    one.add_argument("--data", action="append", required=True)
    one = command(train, "model", "start", "out")
    one.add_argument("--data", action="append", required=True)
    one.add_argument("--work", type=Path, required=True)
    one.add_argument("--teacher-states", type=Path)
    one.add_argument("--tokens", type=int, default=262_144)
    one.add_argument("--time", help="another text form of the adapter's method")
    one.add_argument(
        "--calibrate", action="store_true", help="shift the gates to the compression before the first step"
    )
    one.add_argument("--batch", type=int, default=4)
    one.add_argument("--rate", type=float, default=3e-5, help="of projections (and of norms under DMS)")
    one.add_argument("--heads-rate", type=float, default=1e-2, help="of b, c and lambda")
    one.add_argument("--kl", choices=("reverse", "forward"), default="reverse")
    one.add_argument("--save-steps", type=int, default=4)
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
