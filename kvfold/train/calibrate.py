"""What is found out about gates by forward passes alone: the shift at which held-out text is compressed exactly as asked for,
what they then keep of text, before training the channel that they may take, and gates that are fitted to what attention gives.

One shift for all heads, found as a quantile of their logits: heads keep the differences that they learned. (A threshold of
its own for each head would make all heads compress alike, which costs quality.) Decisions change what later layers see, so the
shift is found again under the shifted decisions until the compression holds; shifts that were too small or too large
bound it, since a quantile alone may swing to and fro.
Letters: N blocks or sequences, K kv heads, T tokens, S KV streams (owners ascending, then heads), D head dim, V vocabulary,
B rows, H query heads, C model width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.cache.views import TrainingView
from kvfold.errors import UserError
from kvfold.eval.progress import Report, silent
from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.gates import GateConfig
from kvfold.models.adapters import adapter_folder, read_adapter
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.gates import CallOptions
from kvfold.models.load import whole_folder
from kvfold.ops.gating import Gates
from kvfold.ops.rotation import Rotation, rotate, rotate_queries
from kvfold.train.objectives import KeptAtEnd
from kvfold.train.settings import RetrofitSettings
from kvfold.train.student import gate_config_of, retention_of, save_adapter

_ROUNDS = 12
_CLOSE = 0.005
"""Of the compression asked for, as a share."""
_FLAT_TAU = 100.0
"""A temperature at which probabilities tell their logits: at the gates' own they are 0 or 1."""

_PARTS = (4, 2, 1)
"""Of a sequence's length: the three lengths at which ratios are taken."""
CALL_TOKENS, _ROWS = 256, 8
"""Of one call of the model."""
_DIGITS = 4
_CHANNEL_SEQUENCES, _CHANNEL_TOKENS = 2, 256
"""Text that every channel is tried on."""


@torch.no_grad()
def calibrate(
    model: FoldForCausalLM, blocks_NT: Tensor, settings: RetrofitSettings, *, report: Report = silent
) -> dict[str, Any]:
    """Shift the model's gates, in place. Gives the shift in logits, and the compression before and after."""
    model.eval()
    target = settings.compression
    share = retention_of(model, settings).share_for(target)
    tried: dict[float, float] = {}
    shift = 0.0
    for done in range(_ROUNDS):
        report("setting the gates", done, _ROUNDS)
        tried[shift], logits = read_gates(model, blocks_NT)
        if abs(tried[shift] / target - 1) < _CLOSE:
            break
        proposed = _between(shift + _shift_for(logits, share), tried, target)
        shift_gates(model, proposed - shift)
        shift = proposed
    report("setting the gates", _ROUNDS, _ROUNDS)
    best = min(tried, key=lambda one: abs(tried[one] / target - 1))
    shift_gates(model, best - shift)
    return {"shift": best, "before": tried[0.0], "after": tried[best], "sequences": blocks_NT.shape[0]}


def _between(proposed: float, tried: dict[float, float], target: float) -> float:
    """The proposed shift, unless it lies outside of those found to be too small and too large: then half way between."""
    low = max((one for one, found in tried.items() if found < target), default=None)
    high = min((one for one, found in tried.items() if found > target), default=None)
    if low is None or high is None or low < proposed < high:
        return proposed
    return (low + high) / 2


@torch.no_grad()
def read_gates(model: FoldForCausalLM, blocks_NT: Tensor) -> tuple[float, Tensor]:
    """The real compression of some blocks under hard decisions, and the logits of all decisions that reach a token, [number]."""
    gates, layout = model.config.gates, model.config.layout
    from_next = gates["reads"] == "next"
    model.config.gates = gates | {"tau": _FLAT_TAU}
    kept, shares, logits = KeptAtEnd(layout, from_next=from_next, model_bytes=model.dtype.itemsize), [], []
    try:
        for block in blocks_NT:
            outputs = model(block[None].to(model.device), use_cache=False, logits_to_keep=1, output_decisions=True)
            shares.append(kept.shares(outputs.decisions)["kept"])
            for owner, one in zip(layout.owners, outputs.gate_probs, strict=True):
                if one is not None:
                    # Those that change what is kept at the end.
                    governing = layout.time_of(owner).governing(one.shape[2], from_next)
                    logits.append(_FLAT_TAU * torch.logit(one[:, :, governing]).flatten().cpu())
    finally:
        model.config.gates = gates
    return 1 / float(torch.stack(shares).mean()), torch.cat(logits)


def _shift_for(logits: Tensor, share: float) -> float:
    """What to add so that this share of the logits is above 0: half way between the two neighbours of the border."""
    fired = min(max(round(share * logits.numel()), 1), logits.numel() - 1)
    ordered = logits.sort(descending=True).values
    return -float((ordered[fired - 1] + ordered[fired]) / 2)


@torch.no_grad()
def shift_gates(model: FoldForCausalLM, shift: float) -> None:
    """Add `shift` to every logit: an adapter's biases have it, or the offset of gates that read a channel."""
    gates = model.config.gate_config
    if gates.source == "adapter":
        for name in _gate_biases(model.config.layout):
            # Of several numbers a head the first decides.
            model.get_parameter(name)[:: gates.form.outputs] += shift / gates.scale
    else:
        model.config.gates = model.config.gates | {"offset": gates.offset - shift}


def _gate_biases(layout: KVLayout) -> list[str]:
    """Names of the adapters' biases, of the owners whose gates decide."""
    owners = [owner for owner in layout.owners if layout.time_of(owner).trained]
    return [f"model.layers.{owner}.self_attn.fold_proj.bias" for owner in owners]


@torch.inference_mode()
def measure_kept_ratios(
    model: FoldForCausalLM, blocks_NT: Tensor, *, report: Report = silent
) -> dict[str, Any]:  # fmt: skip
    """What the model's method keeps of text, for engines that have to know before a request has run: tokens kept over tokens
    seen, per owner and KV head, as the cache itself counts them. The ratios belong to the gates and hardly to the text; Tangram's
    authors (arXiv 2606.06302) find about 50 samples enough.

    Plain values: the method's text form under `time`, and what the engine's `SequenceCost` reads, after a quarter, a half
    and all of the sequences.
    """
    layout, tokens = model.config.layout, blocks_NT.shape[1]
    lengths = sorted({max(1, tokens // part) for part in _PARTS})
    found: list[list[Tensor]] = [[] for _ in lengths]
    for first in range(0, len(blocks_NT), _ROWS):
        report("kept ratios", first, len(blocks_NT))
        ids = blocks_NT[first : first + _ROWS].to(model.device)
        cache, seen = model.new_cache(rows=len(ids), time=layout.time_text(), bits=layout.bits_text()), 0
        for place, length in enumerate(lengths):
            while seen < length:
                stop = min(length, seen + CALL_TOKENS)
                model.model(ids[:, seen:stop], past_key_values=cache, use_cache=True)
                seen = stop
            found[place].append(kept_streams(cache.kept_tokens) / length)
        cache.free()
    report("kept ratios", len(blocks_NT), len(blocks_NT))
    rows = {
        name: [
            [round(share, _DIGITS) for share in torch.cat(one).double().quantile(quantile, dim=0).tolist()]
            for one in found
        ]
        for name, quantile in (("median", 0.5), ("p95", 0.95))
    }
    return {"time": layout.time_text(), "lengths": lengths, **rows}


def kept_streams(kept_ONK: Tensor) -> Tensor:
    """A cache's `kept_tokens`, -1 where an owner has fewer heads, as [N, S]."""
    by_sequence = kept_ONK.transpose(0, 1).flatten(1)
    return by_sequence[:, by_sequence[0] >= 0].cpu()


def shifted_settings(folder: Path, *, compression: float | None, seq_len: int) -> RetrofitSettings | None:
    """What `recalibrate` goes by, None where the gates are to stay. Raises `UserError` for a folder without an adapter, for an
    adapter without gates, and for a compression that its method can't reach at this length.
    """
    about, _ = read_adapter(folder)
    if about.gates is None or about.time is None:
        raise UserError(f"adapter {folder}: it has no gates to shift: give one that compresses")
    if compression is None:
        return None
    return RetrofitSettings(time=about.time, compression=compression, seq_len=seq_len, trains="full")


def recalibrate(
    model: FoldForCausalLM, folder: Path, out: Path, blocks_NT: Tensor, settings: RetrofitSettings | None, *,
    report: Report = silent,
) -> dict[str, Any]:  # fmt: skip
    """Write the adapter in `folder` to `out`, shifted so that the blocks are compressed as the settings say (None = as they are),
    with its kept ratios on the blocks. `model` has the adapter on, and has the shift afterwards. Gives the shift in logits, and
    where something was shifted the compression before and after.
    """
    facts: dict[str, Any] = {"shift": 0.0, "sequences": blocks_NT.shape[0]}
    if settings is not None:
        facts = calibrate(model, blocks_NT, settings, report=report)
    about, weights = read_adapter(folder)
    gates = GateConfig.from_json(about.gates)
    if gates.source == "adapter":
        # As calibration did to the model, which may be in another dtype.
        for name in _gate_biases(model.config.layout):
            weights[name][:: gates.form.outputs] += facts["shift"] / gates.scale
    else:
        about = replace(about, gates=about.gates | {"offset": gates.offset - facts["shift"]})
    model.config.kept_ratios = measure_kept_ratios(model, blocks_NT, report=report)
    with whole_folder(out) as partial:
        (partial / "README.md").write_text(_card(out, folder, blocks_NT.shape[1], settings, facts), encoding="utf-8")
        save_adapter(replace(about, kept_ratios=model.config.kept_ratios), weights, partial)
    return facts


def _card(out: Path, folder: Path, tokens: int, settings: RetrofitSettings | None, facts: dict[str, Any]) -> str:
    old = adapter_folder(folder) / "README.md"
    if settings is None:
        # The same gates: their card holds.
        return old.read_text(encoding="utf-8") if old.is_file() else f"# {out.name}\n"
    card = (
        f"# {out.name}\n\nThe adapter `{folder.name}` at another compression, written by `kvfold calibrate`: its gates were "
        f"shifted by {facts['shift']:+.3f}, nothing was trained. Over {facts['sequences']} sequences of {tokens:,} tokens "
        f"the compression was {facts['before']:.2f} before and is {facts['after']:.2f} now, window included; "
        f"{settings.compression:g} was asked for.\n"
    )
    if old.is_file():
        card += "\nWhat follows is the card of that adapter; its figures are at its own compression.\n\n"
        card += old.read_text(encoding="utf-8")
    return card


@torch.no_grad()
def least_missed_channel(
    model: FoldForCausalLM, blocks_NT: Tensor, settings: RetrofitSettings, *, report: Report = silent
) -> dict[str, Any]:
    """Zero each channel as the method would, and compare with the model as it is: the `channel` with the lowest KL, its `kl`,
    that of the last channel, `kl_of_last`, and `kl_of_each`, nats a token. The published channel is the last or the first; under
    rotary positions those may be the ones that matter most.

    Source: none; arXiv 2403.09636 and its code take a fixed channel.
    """
    config, dim = model.config, model.config.head_dim
    ids_NT = blocks_NT[:_CHANNEL_SEQUENCES, :_CHANNEL_TOKENS].to(model.device)
    was, model_trains = (config.layout, config.gates), model.training
    model.eval()

    def log_p(options: CallOptions | None = None) -> Tensor:
        return model(ids_NT, use_cache=False, options=options).logits.float().log_softmax(dim=-1)

    expected_NTV, missed = log_p(), []
    try:
        for channel in range(dim):
            report("finding the channel", channel, dim)
            model.set_gates(gate_config_of(settings.with_values(channel=channel, find_channel=False)), settings.time)
            apart_NTV = expected_NTV - log_p(CallOptions(channel_factor=0.0))
            missed.append(float((expected_NTV.exp() * apart_NTV).sum(dim=-1).mean()))
        report("finding the channel", dim, dim)
    finally:
        config.layout, config.gates = was
        model.train(model_trains)
    best = min(range(dim), key=missed.__getitem__)
    return {"channel": best, "kl": missed[best], "kl_of_last": missed[-1], "kl_of_each": missed}


_SEQUENCES = 48
"""Sequences that are read, if there are as many."""
_SHIFTED_SEQUENCES = 8
_RIDGE = 1e-3
"""Beside normed inputs, whose mean square is 1."""
_SMALLEST = 1e-9
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
    """Fit the model's gates to the attention that tokens receive, on some blocks, in place, and shift them to the compression
    asked for. Gives what was found.

    A token that some later query attends to strongly, after the delay, had better stay. So what is predicted, from a token's own
    normed residual stream, is the log of the largest weight that any query beyond the delay gives it, over the query heads of the
    group and over all readers. A gate then fires where the prediction is low; how low is set by the compression asked for, one
    threshold for all heads of all layers.
    """
    model.eval()
    used, gates = blocks_NT[:_SEQUENCES], model.config.gate_config
    solved = fitted(model, used, "fitting gates", report)
    spread = float(torch.cat([one.variance for one in solved.values()]).mean().sqrt())
    gain = _LOGIT_SPREAD / max(spread, 1e-6)
    for owner, fit in solved.items():
        # The logit is minus the prediction times the gain; the threshold comes later, as a shift.
        projection = model.model.layers[owner].self_attn.fold_proj
        projection.weight.copy_(-gain / gates.scale * fit.weight_KC)
        projection.bias.copy_((gates.offset - gain * fit.bias_K) / gates.scale)
    shifted = calibrate(model, blocks_NT[:_SHIFTED_SEQUENCES], settings, report=report)
    return {"tokens": used.numel(), "explained_variance": explained_variance(solved), "compression": shifted["after"]}


@torch.no_grad()
def fit_importance(
    model: FoldForCausalLM, blocks_NT: Tensor, *, report: Report = silent
) -> dict[str, Any]:  # fmt: skip
    """Fit what the model's adapters say beside their decisions, in place: how much a token matters beside others of its head, the
    log of the mean attention to come. Gives what was found.
    """
    model.eval()
    used, outputs = blocks_NT[:_SEQUENCES], model.config.gate_config.form.outputs
    solved = fitted(model, used, "fitting importance", report, measure=mean_attention, join=add)
    for owner, fit in solved.items():
        projection = model.model.layers[owner].self_attn.fold_proj
        projection.weight[1::outputs] = fit.weight_KC.to(projection.weight)
        if projection.bias is not None:
            projection.bias[1::outputs] = fit.bias_K.to(projection.bias)
    return {"tokens": used.numel(), "explained_variance": explained_variance(solved)}


def fitted(model: FoldForCausalLM, blocks_NT: Tensor, what: str, report: Report, **watched: Any) -> dict[int, "Fit"]:
    """Of each owner the fit to what comes to its tokens; `watched`: see `attention_to_come`."""
    sums = {owner: Moments() for owner in _gated_owners(model)}
    for done, block in enumerate(blocks_NT):
        report(what, done, len(blocks_NT))
        for owner, x, y in attention_to_come(model, block[None].to(model.device), **watched):
            sums[owner].add(x, y)
    report(what, len(blocks_NT), len(blocks_NT))
    return {owner: one.solve() for owner, one in sums.items()}


def explained_variance(fits: dict[int, "Fit"]) -> float:
    """Share of what was to be predicted that is, mean over owners and heads."""
    return float(torch.cat([one.explained for one in fits.values()]).mean())


def attention_to_come(
    model: FoldForCausalLM, ids_BT: Tensor, *, measure: Callable[..., Tensor] | None = None,
    join: Callable[[Tensor, Tensor], Tensor] = torch.maximum,
) -> list[tuple[int, Tensor, Tensor]]:  # fmt: skip
    """Of each owner with gates: its layer, the normed residual stream [tokens, C], and the log of the largest attention to
    come [tokens, K]. Tokens that too few queries will see are left out. `measure`: in place of `largest_attention`, each head its
    own; `join`: how the measures of two layers that read one owner become one.
    """
    decoder, layout, owners = model.model, model.config.layout, _gated_owners(model)
    view = _WatchedView(layout, measure or largest_attention, join, **decoder.attention_options)
    (hidden, rotations), inputs, found = decoder.opened(ids_BT), {}, []
    for index, (layer, rotation) in enumerate(zip(decoder.layers, rotations, strict=True)):
        if index in owners:
            inputs[index] = layer.self_attn.fold_norm(hidden)
        hidden = layer(hidden, view, rotation, None)
    for owner in owners:
        seen = view.found[owner]
        if measure is None and model.config.gate_config.per == "layer":
            seen = seen.amax(dim=1, keepdim=True).expand_as(seen)
        queries = max(0, ids_BT.shape[1] - 1 - layout.time_of(owner).eviction_delay)
        counted = queries - queries // _LEAST_QUERIES_SHARE
        y = seen[:, :, :counted].clamp(min=_SMALLEST).log().transpose(1, 2)
        found.append((owner, inputs[owner][:, :counted].flatten(0, 1), y.flatten(0, 1)))
    return found


def _gated_owners(model: FoldForCausalLM) -> list[int]:
    """Owners whose marked tokens leave after a delay."""
    layout = model.config.layout
    return [owner for owner in layout.owners if layout.time_of(owner).eviction_delay is not None]


class _WatchedView:
    """Plain attention, and a measure of what queries beyond the delay give each key."""

    def __init__(
        self, layout: KVLayout, measure: Callable[..., Tensor], join: Callable[[Tensor, Tensor], Tensor], **options: Any
    ):
        self._layout, self._measure, self._join, self._options = layout, measure, join, options
        self._plain = TrainingView(layout.base(), real_BT=None, **options)
        self._keys: dict[int, Tensor] = {}
        self.found: dict[int, Tensor] = {}
        """Of each owner under DMS, [B, K, T]."""

    def attend(
        self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor | None, v_BTKD: Tensor | None, rotation: Rotation | None,
        gates: Gates | None = None,
    ) -> Tensor:  # fmt: skip
        """See `KVView`."""
        owner = self._layout.owner_of(layer)
        delay = self._layout.time_of(owner).eviction_delay
        if delay is not None:
            if k_BTKD is not None:
                self._keys[owner] = rotate(rotation, k_BTKD)
            q = rotate_queries(rotation, q_BTHD)
            found = self._measure(q, self._keys[owner], delay=delay, **self._options)
            self.found[owner] = self._join(self.found[owner], found) if owner in self.found else found
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
