"""fold without training: what merging what leaves gains over dropping it, by the slow reference, under a DMS adapter.

    python studies/fold_trial.py fit MODEL IMPORTANCE.safetensors --text TRAIN ... [--windows 10]
    python studies/fold_trial.py shift MODEL --text TRAIN ... --compression 8 --context 2048
    python studies/fold_trial.py measure MODEL IMPORTANCE.safetensors OUT.jsonl --text TEXT ... --arm ARM ...

`fit` predicts from the adapter's normed hidden state, by ridge regression, the log of the mean attention that a token
receives after its delay; forward passes alone. `shift` prints what to add to all gate logits for a compression. `measure`
writes a line for each text, window and arm; lines that are there already are not measured again.

An arm is `dms` (step by step, dropped), or settings of `FoldRule` with commas: `grid=32` drops on a grid,
`grid=32,threshold=0.65` merges values, `grid=32,threshold=0.65,merges_keys=1` keys too. `dms,delay=143` has a longer delay, to
keep as much as a grid does.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import kvfold
from kvfold.cache.views import TrainingView
from kvfold.convert.fitted_group import LeastSquares
from kvfold.data import read_text_file, text_windows
from kvfold.eval.reading import next_token_logits
from kvfold.models.decoder import FoldForCausalLM
from kvfold.ops.fold_reference import FoldRule, FoldTrace, fold_attention_reference
from kvfold.ops.gating import Gates
from kvfold.ops.rotation import Rotation, rotate, rotate_queries
from kvfold.record import made
from kvfold.train.calibrate import calibrate, shift_gates
from kvfold.train.settings import RetrofitSettings

FROM_POSITION = 256
"""`kl_late` is over the positions from here on: before it hardly anything has left."""
LAST_QUERIES = 64
"""What is kept is the mean over so many last queries, so that every grid's phases count alike."""
_RIDGE = 1e-3
_SMALLEST = 1e-9
_KNOWN_BY = ("text", "window", "of_windows", "arm", "context", "shift")
"""What tells the lines of a file apart."""
_SLICE = 256
"""Positions whose logits are held at once."""


class ReferenceView:
    """A KV view that plays fold's reference. `s_BTK` of a layer is put there before the layer runs."""

    def __init__(self, rule: FoldRule, *, scale: float, softcap: float | None):
        self._rule, self._options = rule, {"scale": scale, "softcap": softcap}
        self.s_BTK: Tensor | None = None
        self.traces: list[FoldTrace] = []

    def attend(
        self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, rotation: Rotation | None, gates: Gates
    ) -> Tensor:
        """See `KVView`; every layer owns its keys and values."""
        q, k, flag = rotate_queries(rotation, q_BTHD), rotate(rotation, k_BTKD), gates.alpha_BTK > 0
        s = torch.zeros_like(gates.alpha_BTK) if self.s_BTK is None else self.s_BTK
        out, trace = fold_attention_reference(q, k, v_BTKD, flag, s, self._rule, **self._options)
        self.traces.append(trace)
        return out


class StepView:
    """Eviction step by step, with counts of what each query sees."""

    def __init__(self, layout, delay: int, **options):
        self._plain, self._delay = TrainingView(layout, real_BT=None, **options), delay
        self.s_BTK: Tensor | None = None
        self.kept: list[Tensor] = []

    def attend(self, layer, q_BTHD, k_BTKD, v_BTKD, rotation, gates: Gates) -> Tensor:
        """See `KVView`."""
        flag = gates.alpha_BTK.transpose(1, 2) > 0
        tokens = flag.shape[-1]
        gone = flag.long().cumsum(dim=-1)[..., : max(0, tokens - self._delay - 1)]
        kept = torch.arange(1, tokens + 1).expand_as(flag).clone()
        kept[..., self._delay + 1 :] -= gone
        self.kept.append(kept)
        return self._plain.attend(layer, q_BTHD, k_BTKD, v_BTKD, rotation, gates)


class AttentionView:
    """Plain attention, and of each token the log of the mean attention that it receives after its delay."""

    def __init__(self, layout, delay: int, *, scale: float, softcap: float | None):
        self._plain = TrainingView(layout.base(), real_BT=None, scale=scale, softcap=softcap)
        self._delay, self._scale = delay, scale
        self.s_BTK: Tensor | None = None
        self.labels: list[Tensor] = []
        """[B, T, K] of each layer; of tokens that no query sees after their delay -inf."""

    def attend(self, layer, q_BTHD, k_BTKD, v_BTKD, rotation, gates: Gates) -> Tensor:
        """See `KVView`."""
        q, k = rotate_queries(rotation, q_BTHD), rotate(rotation, k_BTKD)
        tokens = q.shape[1]
        index = torch.arange(tokens)
        distance = index[:, None] - index
        logits = torch.einsum("btkgd,bskd->bkgts", q.unflatten(2, (k.shape[2], -1)), k) * self._scale
        weights = logits.masked_fill_(distance < 0, -torch.inf).softmax(dim=-1).sum(dim=2)
        received = weights.masked_fill_(distance <= self._delay, 0.0).sum(dim=2)
        queries = (tokens - 1 - self._delay - index).clamp(min=0)
        self.labels.append((received / queries).clamp(min=_SMALLEST).log().transpose(1, 2))
        return self._plain.attend(layer, q_BTHD, k_BTKD, v_BTKD, rotation, None)


class Laboratory:
    """A model with its adapter, run layer by layer through any view."""

    def __init__(self, model: FoldForCausalLM, importance: dict[str, Tensor] | None = None):
        self.model, self._importance = model.eval(), importance
        layout = model.config.layout
        assert len(layout.owners) == layout.num_layers, "no layer may share"
        self.delay = layout.time_of(0).delay

    @torch.no_grad()
    def run(self, ids_BT: Tensor, view, *, inputs: list[Tensor] | None = None) -> Tensor:
        """Hidden states before the head [B, T, C]. What the gates read goes to `inputs`."""
        decoder = self.model.model
        hidden, rotations = decoder.opened(ids_BT)
        call = decoder.gate_call(None, False)
        for index, (layer, rotation) in enumerate(zip(decoder.layers, rotations, strict=True)):
            x = layer.self_attn.fold_norm(hidden)
            if inputs is not None:
                inputs.append(x)
            if self._importance is not None:
                view.s_BTK = x @ self._importance[f"{index}.weight"] + self._importance[f"{index}.bias"]
            hidden = layer(hidden, view, rotation, call)
        return decoder.norm(hidden)

    @torch.no_grad()
    def fit(self, ids_WT: Tensor) -> tuple[dict[str, Tensor], dict]:
        """The ridge's weights, and what it explains."""
        options, layers = self.model.model.attention_options, self.model.config.num_hidden_layers
        sums: list[LeastSquares | None] = [None] * layers
        yy = [0.0] * layers
        for ids in ids_WT:
            view, inputs = AttentionView(self.model.config.layout, self.delay, **options), []
            self.run(ids[None], view, inputs=inputs)
            counted = (len(ids) - 1 - self.delay) * 7 // 8
            for index, (x, y) in enumerate(zip(inputs, view.labels, strict=True)):
                x, y = x[0, :counted], y[0, :counted]
                x = torch.cat((x, x.new_ones(counted, 1)), dim=1)
                if sums[index] is None:
                    sums[index] = LeastSquares(x.shape[1], y.shape[1], x.device)
                sums[index].add(x, y)
                yy[index] = yy[index] + (y.double() ** 2).sum(dim=0)
        found, explained = {}, []
        for index, one in enumerate(sums):
            ridge = _RIDGE * one.num_tokens * torch.eye(len(one.xx_II), dtype=torch.float64)
            ridge[-1, -1] = 0
            solved = torch.linalg.solve(one.xx_II + ridge, one.xy_IO)
            found[f"{index}.weight"], found[f"{index}.bias"] = solved[:-1].float().contiguous(), solved[-1].float()
            error = yy[index] - 2 * (solved * one.xy_IO).sum(dim=0) + (solved * (one.xx_II @ solved)).sum(dim=0)
            explained.append(1 - error / (yy[index] - one.xy_IO[-1] ** 2 / one.num_tokens))
        return found, {"tokens": ids_WT.numel(), "explained_variance": float(torch.cat(explained).mean())}

    def arm(self, text: str, ids_BT: Tensor) -> tuple[Tensor, dict]:
        """States under an arm, and its counts."""
        options = self.model.model.attention_options
        values = dict(part.split("=") for part in text.split(",") if part != "dms")
        if text.split(",")[0] == "dms":
            delay = int(values.get("delay", self.delay))
            layout = self.model.config.layout.with_time(f"dms:{delay}")
            view = StepView(layout, delay, **options)
            states = self.run(ids_BT, view)
            return states, {"kept": float(torch.stack(view.kept)[..., -LAST_QUERIES:].float().mean())}
        kinds = {"grid": int, "delay": int, "reach": int, "merges_keys": lambda x: bool(int(x))}
        given = {"delay": self.delay, "threshold": None}
        given |= {name: kinds.get(name, float)(value) for name, value in values.items()}
        view = ReferenceView(FoldRule(**given), **options)
        states = self.run(ids_BT, view)
        kept = torch.stack([trace.kept_BKT[..., -LAST_QUERIES:].float().mean() for trace in view.traces]).mean()
        left = sum(int((trace.left_at < ids_BT.shape[1]).sum()) for trace in view.traces)
        merged = sum(int((trace.slot >= 0).sum()) for trace in view.traces)
        return states, {"kept": float(kept), "merged_share": merged / max(1, left)}


def measure(lab: Laboratory, args: argparse.Namespace, tokenizer) -> None:
    """A line for each text, window and arm."""
    done = set()
    if args.out.exists():
        rows = [json.loads(line) for line in args.out.read_text(encoding="utf-8").splitlines()]
        done = {tuple(row[name] for name in _KNOWN_BY) for row in rows}
    for window in range(args.first_window, args.windows):
        for path in args.text:
            name, ids_WT = _windows(path, tokenizer, args)
            if window >= len(ids_WT):
                continue
            ids = ids_WT[window][None]
            todo = [one for one in args.arm if (name, window, args.windows, one, args.context, args.shift) not in done]
            if not todo:
                continue
            with torch.no_grad():
                full = lab.model.model(ids, use_cache=False, options=kvfold.CallOptions(gates="off")).last_hidden_state[
                    0, :-1
                ]
                full_NV = next_token_logits(lab.model, full).log_softmax(dim=-1)
            for arm in todo:
                began = time.process_time()
                states, counts = lab.arm(arm, ids)
                row = {
                    "text": name, "window": window, "of_windows": args.windows, "context": args.context, "arm": arm,
                    "shift": args.shift, **_scores(lab.model, states[0, :-1], full_NV, ids[0, 1:]), **counts,
                    "compression": args.context / counts["kept"], "cpu_seconds": time.process_time() - began, **_about(args),
                }  # fmt: skip
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                _say(f"{name} {window} {arm}: KL {row['kl_late']:.5f}, kept {row['kept']:.1f}")


@torch.no_grad()
def _scores(model: FoldForCausalLM, states_NC: Tensor, full_NV: Tensor, targets_N: Tensor) -> dict[str, float]:
    """Losses, and the divergence KL(full || ours), nats a token. `full_NV`: log probabilities of the model with its gates off."""
    loss, kl, agrees = [], [], []
    for start in range(0, len(targets_N), _SLICE):
        part = slice(start, start + _SLICE)
        ours, full = next_token_logits(model, states_NC[part]).log_softmax(dim=-1), full_NV[part]
        loss.append(-torch.stack((ours, full)).gather(2, targets_N[None, part, None].expand(2, -1, -1))[..., 0])
        agrees.append(ours.argmax(dim=-1) == full.argmax(dim=-1))
        kl.append((full.exp() * (full - ours)).sum(dim=-1))
    loss_2N, kl_N = torch.cat(loss, dim=1), torch.cat(kl)
    return {
        "loss": float(loss_2N[0].mean()), "loss_full": float(loss_2N[1].mean()), "kl": float(kl_N.mean()),
        "kl_late": float(kl_N[FROM_POSITION:].mean()), "same_top1": float(torch.cat(agrees).float().mean()),
    }  # fmt: skip


_CACHED: dict[str, tuple[str, Tensor]] = {}


def _windows(path: Path, tokenizer, args: argparse.Namespace) -> tuple[str, Tensor]:
    if str(path) not in _CACHED:
        found = text_windows(read_text_file(path), tokenizer, windows=args.windows, context_tokens=args.context)
        _CACHED[str(path)] = found.name, found.ids_WT
    return _CACHED[str(path)]


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _about(args: argparse.Namespace) -> dict:
    return {
        "model": args.name, "adapter": args.adapter, **made(torch.get_num_threads(), "float32"),
        "transformers": version("transformers"),
    }  # fmt: skip


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("fit", "shift", "measure"))
    parser.add_argument("model", help="a model's folder")
    parser.add_argument("importance", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--adapter", default="smollm2-135m-dms-4x")
    parser.add_argument("--arm", action="append", default=[])
    parser.add_argument("--windows", type=int, default=10, help="windows of each text, evenly spaced")
    parser.add_argument("--first-window", type=int, default=0)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--shift", type=float, default=0.0, help="added to every gate's logit")
    parser.add_argument("--compression", type=float, default=8.0)
    parser.add_argument("--name", default="SmolLM2-135M-Instruct.Q4_1", help="what the model is called in the lines")
    args = parser.parse_args()
    model, tokenizer = kvfold.load(args.model, adapter=args.adapter), kvfold.load_tokenizer(args.model)
    if args.shift:
        shift_gates(model, args.shift)
    if args.what == "measure":
        measure(Laboratory(model, load_file(args.importance)), args, tokenizer)
        return
    ids_WT = torch.cat([_windows(path, tokenizer, args)[1] for path in args.text])
    if args.what == "fit":
        began = time.process_time()
        found, facts = Laboratory(model).fit(ids_WT)
        save_file(found, args.importance)
        texts = [path.name for path in args.text]
        facts |= {"texts": texts, "windows": args.windows, "cpu_seconds": time.process_time() - began, **_about(args)}
        _say(json.dumps(facts))
        return
    settings = RetrofitSettings(
        time=model.config.layout.time_text(), compression=args.compression, seq_len=args.context
    )
    _say(json.dumps({**calibrate(model, ids_WT, settings), **asdict(settings), **_about(args)}))


if __name__ == "__main__":
    main()
