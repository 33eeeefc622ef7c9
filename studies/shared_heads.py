"""What single KV heads could share with the layer below, keys and values apart, beside whole layers: without training.

    python studies/shared_heads.py MODEL OUT.jsonl --calibration TEXT ... --text TEXT ... [--layers 3 5 10]

The upper layer of each pair (0 and 1, 2 and 3, ...) may take the keys, or the values, of one KV head from a head of the lower
layer. What reads them is refitted: the queries of the head by gradient steps towards its old attention output, W_o by ridge
regression towards the old residual stream. First every such part by itself and every whole layer, each with the KL divergence
of the next token's distribution on calibration text that nothing was fitted to; then, on other text, the cheapest whole layers
beside as many bytes of the cheapest parts, refitted from the bottom up. A model of Llama's form alone. Lines that are there
already are not measured again.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import kvfold
from kvfold.convert.conversion import calibration_windows, export_model
from kvfold.convert.fitted_group import LeastSquares
from kvfold.data import read_text_file, text_windows
from kvfold.eval.perplexity import paired_difference
from kvfold.ops.native import flush_denormals
from kvfold.record import made

STEPS, RATE = 96, 0.02
"""Of the queries' refit; the rate as a share of the weights' root mean square."""
RIDGE = 3e-4


@dataclass(frozen=True, order=True)
class Taken:
    """The keys (`k`) or values (`v`) of a layer's head that come from the layer below."""

    layer: int
    kind: str
    head: int


class Stack:
    """The layers of a Llama, one at a time, with some heads' keys or values taken from the layer below."""

    def __init__(self, model: nn.Module):
        self.model, self.layers, config = model, model.model.layers, model.config
        self.kv_heads, self.dim = config.num_key_value_heads, self.layers[0].self_attn.head_dim
        self.group, self._rotary = config.num_attention_heads // self.kv_heads, LlamaRotaryEmbedding(config)

    def projected(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What enters a layer's attention, normed, and its q, k and v [W, heads, T, D] before rotary positions."""
        layer = self.layers[index]
        normed, attention = layer.input_layernorm(hidden), layer.self_attn
        return normed, *(self.split(one(normed)) for one in (attention.q_proj, attention.k_proj, attention.v_proj))

    def split(self, flat: Tensor) -> Tensor:
        """[W, T, heads x D] as [W, heads, T, D]."""
        return flat.unflatten(-1, (-1, self.dim)).transpose(1, 2)

    def turned(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Both under rotary positions."""
        return apply_rotary_pos_emb(q, k, *self._rotary(q, torch.arange(q.shape[2])[None]))

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the heads give, [W, heads, T, D]."""
        return F.scaled_dot_product_attention(
            *self.turned(q, k), v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )

    def through(self, index: int, hidden: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
        """The stream behind a layer's attention and behind the layer. `heads`: [W, H, T, D]."""
        layer = self.layers[index]
        middle = hidden + layer.self_attn.o_proj(heads.transpose(1, 2).flatten(2))
        return middle, middle + layer.mlp(layer.post_attention_layernorm(middle))

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Of the next token, from the stream behind the last layer."""
        return self.model.lm_head(self.model.model.norm(hidden)).float().log_softmax(-1)


@dataclass
class Original:
    """The unchanged model's reading of some windows: the stream before each layer and behind each attention."""

    before: list[Tensor]
    middle: list[Tensor]
    log_probs: list[Tensor]

    @classmethod
    def read(cls, stack: Stack, ids_WT: Tensor, *, judged: bool) -> "Original":
        """`judged`: with the distributions, window by window."""
        hidden, before, middle = stack.model.model.embed_tokens(ids_WT), [], []
        for index in range(len(stack.layers)):
            before.append(hidden)
            _, *qkv = stack.projected(index, hidden)
            behind, hidden = stack.through(index, hidden, stack.attended(*qkv))
            middle.append(behind)
        return cls([*before, hidden], middle, [stack.log_probs(one) for one in hidden] if judged else [])


def matched(stack: Stack, index: int, original: Original) -> dict[tuple[str, int], int]:
    """For the keys and the values of each head the lower layer's head that explains most of them."""
    _, q, k, v = stack.projected(index, original.before[index])
    _, _, k_below, v_below = stack.projected(index - 1, original.before[index - 1])
    found = {}
    for head in range(stack.kv_heads):
        wanted, half = v[:, head].flatten(0, 1), stack.dim // 2
        errors = [
            wanted - x @ torch.linalg.lstsq(x, wanted).solution
            for x in (v_below[:, one].flatten(0, 1) for one in range(stack.kv_heads))
        ]
        found["v", head] = min(range(stack.kv_heads), key=lambda one: float(errors[one].square().sum()))
        queries = q[:, head * stack.group : (head + 1) * stack.group].square().mean(dim=(0, 1, 2))
        energy = queries[:half] + queries[half:]
        shares = [_factor(k[:, head], k_below[:, one])[1] for one in range(stack.kv_heads)]
        found["k", head] = max(range(stack.kv_heads), key=lambda one: float((shares[one] * energy).sum()))
    return found


def _factor(wanted: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """The complex factor of each rotary channel that turns `given` into `wanted`, and the energy that it explains."""
    one, other = (torch.complex(*x.flatten(0, -2).chunk(2, dim=-1)) for x in (wanted, given))
    crossed, own = (one * other.conj()).sum(dim=0), other.abs().square().sum(dim=0)
    return crossed / own, crossed.abs().square() / own


def refit_queries(stack: Stack, index: int, head: int, k_taken: Tensor, normed: Tensor, original: Original) -> None:
    """Turn the queries of a KV head towards the keys that were taken, then let them learn the old attention's output."""
    rows = slice(head * stack.group * stack.dim, (head + 1) * stack.group * stack.dim)
    projection = stack.layers[index].self_attn.q_proj
    _, q_old, k_old, v_old = stack.projected(index, original.before[index])
    own = slice(head * stack.group, (head + 1) * stack.group)
    wanted = stack.attended(q_old[:, own], k_old[:, head : head + 1], v_old[:, head : head + 1])
    factor, _ = _factor(k_old[:, head], k_taken)
    old = projection.weight[rows].unflatten(0, (stack.group, 2, -1))
    new = torch.complex(old[:, 0], old[:, 1]) * factor.conj()[None, :, None]
    weight = torch.stack((new.real, new.imag), dim=1).flatten(0, 2).detach().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=RATE * float(weight.detach().square().mean().sqrt()))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    scale = float(wanted.square().mean())
    for step in range(STEPS):
        one = slice(step % len(normed), step % len(normed) + 1)
        with torch.enable_grad():
            q = stack.split(normed[one] @ weight.T)
            error = stack.attended(q, k_taken[one, None], v_old[one, head : head + 1]) - wanted[one]
            (error.square().mean() / scale).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    projection.weight[rows] = weight.detach()


def heads_of(
    stack: Stack, index: int, hidden: Tensor, below: Tensor, taken: Mapping[tuple[str, int], int]
) -> tuple[Tensor, Tensor]:
    """A layer's attention over what it has taken, [W, H, T, D], and the keys. `below`: the stream before the lower layer."""
    _, q, k, v = stack.projected(index, hidden)
    _, _, k_below, v_below = stack.projected(index - 1, below)
    for (kind, head), source in taken.items():
        (k if kind == "k" else v)[:, head] = (k_below if kind == "k" else v_below)[:, source]
    return stack.attended(q, k, v), k


def refit(
    stack: Stack, index: int, hidden: Tensor, below: Tensor, taken: Mapping[tuple[str, int], int], original: Original
) -> Tensor:
    """Refit the queries and W_o of a layer that takes; what its heads then give."""
    normed = stack.layers[index].input_layernorm(hidden)
    _, k = heads_of(stack, index, hidden, below, taken)
    for kind, head in taken:
        if kind == "k":
            refit_queries(stack, index, head, k[:, head], normed, original)
    heads, _ = heads_of(stack, index, hidden, below, taken)
    flat, projection = heads.transpose(1, 2).flatten(2), stack.layers[index].self_attn.o_proj
    sums = LeastSquares(projection.in_features, projection.out_features, flat.device)
    error = original.middle[index] - hidden - projection(flat)
    # Relative to the stream, as the norms above see it: a few tokens have activations that would rule all others.
    sums.add(flat, error, 1 / original.middle[index].square().mean(dim=-1))
    projection.weight += sums.solve(RIDGE).float().T
    return heads


class Trial:
    """A model under change whose weights are put back."""

    def __init__(self, stack: Stack, fitting: Original, held: Original):
        self.stack, self.fitting, self.held = stack, fitting, held
        self.matches = {index: matched(stack, index, fitting) for index in range(1, len(stack.layers), 2)}

    def fitted(self, parts: Iterable[Taken]) -> dict[int, dict[tuple[str, int], int]]:
        """Refit for these parts, from the bottom up on the changed model's own stream; what each layer takes from where."""
        by_layer: dict[int, dict[tuple[str, int], int]] = {}
        for one in sorted(parts):
            by_layer.setdefault(one.layer, {})[one.kind, one.head] = self.matches[one.layer][one.kind, one.head]
        hidden = below = self.fitting.before[min(by_layer) - 1]
        for index in range(min(by_layer) - 1, max(by_layer) + 1):
            if index in by_layer:
                heads = refit(self.stack, index, hidden, below, by_layer[index], self.fitting)
            else:
                heads = self.stack.attended(*self.stack.projected(index, hidden)[1:])
            below, hidden = hidden, self.stack.through(index, hidden, heads)[1]
        return by_layer

    def judged(
        self, taken: Mapping[int, Mapping[tuple[str, int], int]], original: Original, ids_WT: Tensor
    ) -> dict[str, list[float]]:
        """KL divergence from the unchanged model, and both losses, window by window."""
        start, stack = min(taken) - 1, self.stack
        hidden = below = original.before[start]
        for index in range(start, len(stack.layers)):
            if index in taken:
                heads, _ = heads_of(stack, index, hidden, below, taken[index])
            else:
                heads = stack.attended(*stack.projected(index, hidden)[1:])
            below, hidden = hidden, stack.through(index, hidden, heads)[1]
        told: dict[str, list[float]] = {"kl": [], "loss": [], "full_loss": []}
        for theirs, window, ids in zip(original.log_probs, hidden, ids_WT, strict=True):
            ours = stack.log_probs(window)
            told["kl"].append(float((theirs.exp() * (theirs - ours)).sum(-1)[:-1].mean()))
            for name, one in (("loss", ours), ("full_loss", theirs)):
                told[name].append(float(F.nll_loss(one[:-1], ids[1:])))
        return told


def whole(layer: int, kv_heads: int) -> list[Taken]:
    """All parts of a layer."""
    return [Taken(layer, kind, head) for kind in "kv" for head in range(kv_heads)]


def singles(trial: Trial, held_WT: Tensor) -> Iterator[tuple[str, list[Taken]]]:
    """Every part by itself, and every whole layer."""
    for layer in trial.matches:
        for part in whole(layer, trial.stack.kv_heads):
            yield "part", [part]
        yield "layer", whole(layer, trial.stack.kv_heads)


def choices(
    rows: Sequence[Mapping[str, Any]], layers: Sequence[int], kv_heads: int
) -> Iterator[tuple[str, int, list[Taken]]]:
    """Of equal bytes: the cheapest whole layers, and the cheapest parts."""
    parts, wholes = (
        sorted((row for row in rows if row["what"] == what), key=lambda row: row["kl"]) for what in ("part", "layer")
    )
    for number in layers:
        yield "layers", number, [one for row in wholes[:number] for one in whole(row["parts"][0][0], kv_heads)]
        yield "parts", number, [Taken(*row["parts"][0]) for row in parts[: 2 * kv_heads * number]]


@torch.no_grad()
def main() -> None:
    """Parts and layers by themselves, then together."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model")
    options.add_argument("out", type=Path)
    options.add_argument("--calibration", type=Path, action="append", required=True)
    options.add_argument("--text", type=Path, action="append", required=True)
    options.add_argument("--layers", type=int, nargs="+", default=[3, 5, 10])
    options.add_argument("--tokens", type=int, default=12_288, help="to fit on; half as many judge the parts")
    options.add_argument("--context", type=int, default=512)
    options.add_argument("--windows", type=int, default=16, help="of each other text")
    args = options.parse_args()
    flush_denormals()
    tokenizer, model = kvfold.load_tokenizer(args.model), kvfold.load(args.model)
    name, stack = model.config.name_or_path or Path(args.model).name, Stack(export_model(model).float())
    ids = calibration_windows(tokenizer, args.calibration, tokens=3 * args.tokens // 2, context_tokens=args.context)
    judges = torch.arange(len(ids)) % 3 == 2
    trial = Trial(
        stack, Original.read(stack, ids[~judges], judged=False), Original.read(stack, ids[judges], judged=True)
    )
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    start = {
        key: value.clone() for key, value in stack.model.state_dict().items() if "q_proj" in key or "o_proj" in key
    }
    about = {
        "model": Path(name).name,
        "fitted_tokens": int((~judges).sum()) * args.context,
        **made(torch.get_num_threads(), "float32"),
    }

    def put_back() -> None:
        stack.model.load_state_dict(start, strict=False)

    def write(row: dict[str, Any]) -> None:
        rows.append({**row, **about})
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()

    def listed(parts: Sequence[Taken]) -> list[list[Any]]:
        return [[one.layer, one.kind, one.head] for one in parts]

    for what, parts in singles(trial, ids[judges]):
        if any(row["what"] == what and row["parts"] == listed(parts) for row in rows):
            continue
        taken = trial.fitted(parts)
        told = trial.judged(taken, trial.held, ids[judges])
        put_back()
        write({"what": what, "parts": listed(parts), "kl": sum(told["kl"]) / len(told["kl"])})
    for path in args.text:
        text = text_windows(read_text_file(path), tokenizer, windows=args.windows, context_tokens=args.context)
        unseen = Original.read(stack, text.ids_WT, judged=True)
        for what, number, parts in list(choices(rows, args.layers, stack.kv_heads)):
            if any((row["what"], row.get("layers"), row.get("text")) == (what, number, text.name) for row in rows):
                continue
            told = trial.judged(trial.fitted(parts), unseen, text.ids_WT)
            put_back()
            mean, error = paired_difference(told["loss"], told["full_loss"])
            write({
                "what": what, "layers": number, "text": text.name, "windows": text.num_windows, "parts": listed(parts),
                "kl": sum(told["kl"]) / len(told["kl"]), "kl_by_window": told["kl"],
                "perplexity_change_percent": 100 * (math.exp(mean) - 1), "standard_error": 100 * math.exp(mean) * error,
            })  # fmt: skip


if __name__ == "__main__":
    main()
