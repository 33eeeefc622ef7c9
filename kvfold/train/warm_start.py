"""Gates of an adapter from forward passes alone: fitted by ridge regression to the attention that tokens will receive. And what a
method that takes over another's trained gates adds to them: how much a token matters beside others of its head.

A token that some later query attends to strongly, after the delay, had better stay. So what is predicted, from a token's own
normed residual stream, is the log of the largest weight that any query beyond the delay gives it, over the query heads of the
group and over all readers. A gate then fires where the prediction is low; how low is set by the compression asked for, one
threshold for all heads of all layers.
Letters: B rows, T tokens, H query heads, K kv heads, D head dim, C model width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import add
from typing import Any

import torch
from torch import Tensor

from kvfold.cache.views import TrainingView
from kvfold.errors import UserError
from kvfold.eval.progress import Report, silent
from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.registry import parse_time
from kvfold.models.decoder import FoldForCausalLM
from kvfold.ops.gating import Gates
from kvfold.ops.rotation import Rotation, rotate, rotate_queries
from kvfold.train.calibrate import calibrate
from kvfold.train.settings import RetrofitSettings

SEQUENCES = 48
"""Sequences that are read, if there are as many."""
_SHIFTED_SEQUENCES = 8
_RIDGE = 1e-3
"""Beside normed inputs, whose mean square is 1."""
SMALLEST = 1e-9
"""A weight below this counts as this."""
_LEAST_QUERIES_SHARE = 8
"""A token counts if at least one in so many of the queries that a first token has come after its delay."""
_LOGIT_SPREAD = 5.0
"""Standard deviation of the fitted logits; that of the noise in training is 1.8."""
_QUERIES_AT_ONCE = 128


@torch.no_grad()
def warm_start(
    model: FoldForCausalLM, blocks_NT: Tensor, settings: RetrofitSettings, *, report: Report = silent
) -> dict[str, Any]:
    """Fit the model's gates on some blocks, in place, and shift them to the compression asked for. Gives what was found."""
    model.eval()
    used = blocks_NT[:SEQUENCES]
    fits = {owner: Moments() for owner in gated_owners(model)}
    for done, block in enumerate(used):
        report("fitting gates", done, len(used))
        for owner, x, y in attention_to_come(model, block[None].to(model.device)):
            fits[owner].add(x, y)
    report("fitting gates", len(used), len(used))
    solved = {owner: fit.solve() for owner, fit in fits.items()}
    spread = float(torch.cat([one.variance for one in solved.values()]).mean().sqrt())
    _write_gates(model, solved, gain=_LOGIT_SPREAD / max(spread, 1e-6))
    shifted = calibrate(model, blocks_NT[:_SHIFTED_SEQUENCES], settings, report=report)
    explained = torch.cat([one.explained for one in solved.values()]).mean()
    return {"tokens": used.numel(), "explained_variance": float(explained), "compression": shifted["after"]}


def attention_to_come(model: FoldForCausalLM, ids_BT: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """Of each owner with gates: its layer, the normed residual stream [tokens, C], and the log of the largest attention to
    come [tokens, K]. Tokens that too few queries will see are left out.
    """
    decoder, layout = model.model, model.config.layout
    view = WatchedView(layout, **decoder.attention_options)
    (hidden, rotations), inputs = decoder.opened(ids_BT), {}
    for index, (layer, rotation) in enumerate(zip(decoder.layers, rotations, strict=True)):
        if layer.self_attn.fold_norm is not None:
            inputs[index] = layer.self_attn.fold_norm(hidden)
        hidden = layer(hidden, view, rotation, None)
    found = []
    for owner in gated_owners(model):
        largest = view.largest[owner]
        if model.config.gate_config.per == "layer":
            largest = largest.amax(dim=1, keepdim=True).expand_as(largest)
        counted = counted_tokens(ids_BT.shape[1], layout.time_of(owner).eviction_delay)
        y = largest[:, :, :counted].clamp(min=SMALLEST).log().transpose(1, 2)
        found.append((owner, inputs[owner][:, :counted].flatten(0, 1), y.flatten(0, 1)))
    return found


def counted_tokens(tokens: int, delay: int) -> int:
    """First tokens of a sequence that enough queries see after their delay."""
    queries = max(0, tokens - 1 - delay)
    return queries - queries // _LEAST_QUERIES_SHARE


def gated_owners(model: FoldForCausalLM) -> list[int]:
    """Owners whose marked tokens leave after a delay."""
    layout = model.config.layout
    return [owner for owner in layout.owners if layout.time_of(owner).eviction_delay is not None]


class WatchedView:
    """Plain attention, and of each key the largest weight that queries beyond the delay give it."""

    def __init__(
        self, layout: KVLayout, *, scale: float, softcap: float | None, measure: Callable[..., Tensor] | None = None,
        join: Callable[[Tensor, Tensor], Tensor] = torch.maximum,
    ):  # fmt: skip
        """`measure` in place of `largest_attention`, and how the measures of two layers that read one owner become one."""
        self._layout, self._scale, self._softcap = layout, scale, softcap
        self._measure, self._join = measure or largest_attention, join
        self._plain = TrainingView(layout.base(), real_BT=None, scale=scale, softcap=softcap)
        self._keys: dict[int, Tensor] = {}
        self.largest: dict[int, Tensor] = {}
        """Of each owner under DMS, [B, K, T]."""

    def attend(
        self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor | None, v_BTKD: Tensor | None, rotation: Rotation | None,
        gates: Gates | None = None,
    ) -> Tensor:  # fmt: skip
        """See `KVView`."""
        owner = self._layout.owner_of(layer)
        spec = self._layout.time_of(owner)
        if spec.eviction_delay is not None:
            if k_BTKD is not None:
                self._keys[owner] = rotate(rotation, k_BTKD)
            found = self._measure(
                rotate_queries(rotation, q_BTHD),
                self._keys[owner],
                delay=spec.eviction_delay,
                scale=self._scale,
                softcap=self._softcap,
            )
            self.largest[owner] = self._join(self.largest[owner], found) if owner in self.largest else found
            if self._layout.last_reader(owner) == layer:
                del self._keys[owner]
        return self._plain.attend(layer, q_BTHD, k_BTKD, v_BTKD, rotation, gates)


def largest_attention(
    q_BTHD: Tensor, k_BTKD: Tensor, *, delay: int, scale: float, softcap: float | None = None
) -> Tensor:
    """The largest weight of each key over the queries t with t - k > delay and over its head's query heads, fp32 [B, K, T];
    0 where there is no such query. q and k are rotated.
    """
    found = q_BTHD.new_zeros((q_BTHD.shape[0], k_BTKD.shape[2], q_BTHD.shape[1]), dtype=torch.float32)
    for stop, weights in attention_beyond(q_BTHD, k_BTKD, delay=delay, scale=scale, softcap=softcap):
        found[..., :stop] = torch.maximum(found[..., :stop], weights.amax(dim=(2, 3)))
    return found


def attention_beyond(
    q_BTHD: Tensor, k_BTKD: Tensor, *, delay: int, scale: float, softcap: float | None
) -> Iterator[tuple[int, Tensor]]:
    """Some queries at a time: the number of keys that they may see, and the weights [B, K, G, queries, keys] of those more than
    `delay` tokens older, 0 for the others. Softmax is over all.
    """
    tokens, heads = q_BTHD.shape[1], k_BTKD.shape[2]
    q = q_BTHD.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)
    k = k_BTKD.permute(0, 2, 3, 1).unsqueeze(2)
    index = torch.arange(tokens, device=q.device)
    for start in range(0, tokens, _QUERIES_AT_ONCE):
        stop = min(start + _QUERIES_AT_ONCE, tokens)
        logits = (q[..., start:stop, :] @ k[..., :stop]).float() * scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        distance = index[start:stop, None] - index[:stop]
        weights = logits.masked_fill_(distance < 0, -torch.inf).softmax(dim=-1)
        yield stop, weights.masked_fill_(distance <= delay, 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """y = weight x + bias, per head."""

    weight_KC: Tensor
    bias_K: Tensor
    variance: Tensor
    """Of the predictions, fp64 [K]."""
    explained: Tensor
    """Share of y's variance that they explain, fp64 [K]."""


class Moments:
    """Sums that a ridge regression needs, so that no token is kept."""

    def __init__(self) -> None:
        self._xx = self._xy = self._yy = self._number = 0

    def add(self, x_NC: Tensor, y_NK: Tensor) -> None:
        """Some more tokens."""
        x = torch.cat((x_NC.double(), x_NC.new_ones((x_NC.shape[0], 1), dtype=torch.float64)), dim=1)
        y = y_NK.double()
        self._xx, self._xy = self._xx + x.T @ x, self._xy + x.T @ y
        self._yy, self._number = self._yy + (y * y).sum(dim=0), self._number + x.shape[0]

    def solve(self) -> Fit:
        """The fit to all that was added; the bias is not held back."""
        xx, xy, yy = self._xx / self._number, self._xy / self._number, self._yy / self._number
        held = torch.full((xx.shape[0],), _RIDGE, dtype=xx.dtype, device=xx.device)
        held[-1] = 0.0
        solved = torch.linalg.solve(xx + torch.diag(held), xy)
        mean = xx[-1] @ solved
        variance = torch.einsum("ck,cd,dk->k", solved, xx, solved) - mean**2
        error = yy - 2 * (solved * xy).sum(dim=0) + variance + mean**2
        explained = 1 - error / (yy - xy[-1] ** 2).clamp(min=1e-12)
        return Fit(weight_KC=solved[:-1].T, bias_K=solved[-1], variance=variance, explained=explained)


def _write_gates(model: FoldForCausalLM, fits: dict[int, Fit], *, gain: float) -> None:
    """Gates whose logit is minus the prediction times `gain`; the threshold comes later, as a shift."""
    gates = model.config.gate_config
    for owner, fit in fits.items():
        projection = model.model.layers[owner].self_attn.fold_proj
        projection.weight.copy_(-gain / gates.scale * fit.weight_KC)
        projection.bias.copy_((gates.offset - gain * fit.bias_K) / gates.scale)


@torch.no_grad()
def take_gates(model: FoldForCausalLM, time: str) -> None:
    """Put a model that has trained gates under the method `time`, in place: the decisions stay, whatever else the adapters give
    is as in new ones. Raises `UserError` for a method that does not take gates like these.
    """
    gates, method = model.config.gate_config, parse_time(time.split(";")[0])
    wanted = None if method.gate_form is None else method.gate_form.gates_of
    if wanted is None:
        raise UserError(f"time '{time}': {method.name} takes over no gates: choose a method that does")
    if gates is None or wanted != gates.method or gates.source != "adapter":
        has = "no gates" if gates is None else f"gates of {gates.method} from its {gates.source}"
        raise UserError(
            f"time '{time}': the model has {has}, and it needs an adapter for {wanted}: load one with the model"
        )
    layers = [one.self_attn for one in model.model.layers]
    old = [(one.fold_norm, one.fold_proj) for one in layers]
    model.set_gates(replace(gates, method=method.name), time)
    for layer, (norm, projection) in zip(layers, old, strict=True):
        if norm is None:
            continue
        layer.fold_norm.load_state_dict(norm.state_dict())
        for name in ("weight", "bias"):
            given = getattr(projection, name)
            if given is not None:
                getattr(layer.fold_proj, name)[:: method.gate_form.outputs] = given


@torch.no_grad()
def fit_importance(model: FoldForCausalLM, blocks_NT: Tensor, *, report: Report = silent) -> dict[str, Any]:
    """Fit what the model's adapters say beside their decisions on some blocks, in place. Gives what was found."""
    model.eval()
    owners, layout = gated_owners(model), model.config.layout
    fits = {owner: Moments() for owner in owners}
    for done, block in enumerate(blocks_NT):
        report("fitting importance", done, len(blocks_NT))
        view = WatchedView(layout, measure=mean_attention, join=add, **model.model.attention_options)
        (hidden, rotations), inputs = model.model.opened(block[None].to(model.device)), {}
        for index, (layer, rotation) in enumerate(zip(model.model.layers, rotations, strict=True)):
            if index in fits:
                inputs[index] = layer.self_attn.fold_norm(hidden)
            hidden = layer(hidden, view, rotation, None)
        for owner, fit in fits.items():
            counted = counted_tokens(len(block), layout.time_of(owner).eviction_delay)
            y = view.largest[owner][:, :, :counted].clamp(min=SMALLEST).log().transpose(1, 2)
            fit.add(inputs[owner][:, :counted].flatten(0, 1), y.flatten(0, 1))
    report("fitting importance", len(blocks_NT), len(blocks_NT))
    outputs, explained = model.config.gate_config.form.outputs, []
    for owner, fit in fits.items():
        solved, projection = fit.solve(), model.model.layers[owner].self_attn.fold_proj
        projection.weight[1::outputs] = solved.weight_KC.to(projection.weight)
        if projection.bias is not None:
            projection.bias[1::outputs] = solved.bias_K.to(projection.bias)
        explained.append(solved.explained)
    return {"tokens": blocks_NT.numel(), "explained_variance": float(torch.cat(explained).mean())}


def mean_attention(q_BTHD: Tensor, k_BTKD: Tensor, *, delay: int, scale: float, softcap: float | None = None) -> Tensor:
    """The weight of each key, summed over its head's query heads, mean over the queries more than `delay` tokens behind it, fp32
    [B, K, T]; 0 where there is no such query. q and k are rotated.
    """
    tokens = q_BTHD.shape[1]
    found = q_BTHD.new_zeros((q_BTHD.shape[0], k_BTKD.shape[2], tokens), dtype=torch.float32)
    for stop, weights in attention_beyond(q_BTHD, k_BTKD, delay=delay, scale=scale, softcap=softcap):
        found[..., :stop] += weights.sum(dim=(2, 3))
    queries = (tokens - 1 - delay - torch.arange(tokens, device=found.device)).clamp(min=1)
    return found / queries
