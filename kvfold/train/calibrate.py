"""What is found out about gates by forward passes alone: the shift at which held-out text is compressed exactly as asked for,
what they then keep of text, and before training the channel that they may take.

One shift for all heads, found as a quantile of their logits: heads keep the differences that they learned. (A threshold of
its own for each head would make all heads compress alike, which costs quality.) Decisions change what later layers see, so the
shift is found again under the shifted decisions until the compression holds; shifts that were too small or too large
bound it, since a quantile alone may swing to and fro.
Letters: N blocks or sequences, K kv heads, T tokens, S KV streams (owners ascending, then heads), D head dim, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kvfold.engine.budget import KeptRatios
from kvfold.errors import UserError
from kvfold.eval.progress import Report, silent
from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.gates import GateConfig
from kvfold.models.adapters import ABOUT, WEIGHTS, AdapterAbout, adapter_folder, read_adapter
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.gates import CallOptions
from kvfold.models.load import whole_folder
from kvfold.train.losses import KeptAtEnd
from kvfold.train.settings import RetrofitSettings
from kvfold.train.student import gate_config_of, retention_of

_ROUNDS = 12
_CLOSE = 0.005
"""Of the compression asked for, as a share."""
_FLAT_TAU = 100.0
"""A temperature at which probabilities tell their logits: at the gates' own they are 0 or 1."""

PARTS = (4, 2, 1)
"""Of a sequence's length: the three lengths at which ratios are taken."""
CALL_TOKENS, ROWS = 256, 8
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
        for name in gate_biases(model.config.layout):
            # Of several numbers a head the first decides.
            model.get_parameter(name)[:: gates.form.outputs] += shift / gates.scale
    else:
        model.config.gates = model.config.gates | {"offset": gates.offset - shift}


def gate_biases(layout: KVLayout) -> list[str]:
    """Names of the adapters' biases, of the owners whose gates decide."""
    owners = [owner for owner in layout.owners if layout.time_of(owner).trained]
    return [f"model.layers.{owner}.self_attn.fold_proj.bias" for owner in owners]


@torch.inference_mode()
def measure_kept_ratios(
    model: FoldForCausalLM, blocks_NT: Tensor, *, lengths: Sequence[int] | None = None, report: Report = silent
) -> dict[str, Any]:
    """What the model's method keeps of text, for engines that have to know before a request has run: tokens kept over tokens
    seen, per owner and KV head, as the cache itself counts them. The ratios belong to the gates and hardly to the text; Tangram's
    authors (arXiv 2606.06302) find about 50 samples enough.

    Plain values: the method's text form under `time`, and `KeptRatios`. `lengths`: tokens seen, ascending; None = a quarter, a
    half and all of the sequences. Raises `UserError` where they are longer than the sequences.
    """
    layout, tokens = model.config.layout, blocks_NT.shape[1]
    lengths = sorted({max(1, tokens // part) for part in PARTS}) if lengths is None else list(lengths)
    if not len(blocks_NT) or lengths[-1] > tokens:
        raise UserError(f"lengths up to {lengths[-1]} tokens: sequences have {tokens}: give longer text")
    found: list[list[Tensor]] = [[] for _ in lengths]
    for first in range(0, len(blocks_NT), ROWS):
        report("kept ratios", first, len(blocks_NT))
        ids = blocks_NT[first : first + ROWS].to(model.device)
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
        name: tuple(
            tuple(round(share, _DIGITS) for share in torch.cat(one).double().quantile(quantile, dim=0).tolist())
            for one in found
        )
        for name, quantile in (("median", 0.5), ("p95", 0.95))
    }
    return {"time": layout.time_text(), **KeptRatios(lengths=tuple(lengths), **rows).to_json()}


def kept_streams(kept_ONK: Tensor) -> Tensor:
    """A cache's `kept_tokens`, -1 where an owner has fewer heads, as [N, S]."""
    by_sequence = kept_ONK.transpose(0, 1).flatten(1)
    return by_sequence[:, by_sequence[0] >= 0].cpu()


def shifted_settings(time: str, *, compression: float, seq_len: int) -> RetrofitSettings:
    """What calibration goes by. Raises `UserError` for a compression that the method can't reach at this length."""
    return RetrofitSettings(time=time, compression=compression, seq_len=seq_len, trains="full")


def method_of(folder: Path) -> str:
    """The method of an adapter. Raises `UserError` for a folder that is none, and for an adapter without gates."""
    about, _ = read_adapter(folder)
    if about.gates is None or about.time is None:
        raise UserError(f"adapter {folder}: it has no gates to shift: give one that compresses")
    return about.time


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
    if settings is None:
        pass
    elif gates.source == "adapter":
        # As calibration did to the model, which may be in another dtype.
        for name in gate_biases(model.config.layout):
            weights[name][:: gates.form.outputs] += facts["shift"] / gates.scale
    else:
        about = replace(about, gates=about.gates | {"offset": gates.offset - facts["shift"]})
    model.config.kept_ratios = measure_kept_ratios(model, blocks_NT, report=report)
    about = replace(about, kept_ratios=model.config.kept_ratios)
    _write_adapter(about, weights, out, _card(out, folder, blocks_NT.shape[1], settings, facts))
    return facts


def _write_adapter(about: AdapterAbout, weights: dict[str, Tensor], out: Path, card: str) -> None:
    with whole_folder(out) as folder:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / WEIGHTS)
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / ABOUT).write_text(about.to_text(), encoding="utf-8")


def _card(out: Path, folder: Path, tokens: int, settings: RetrofitSettings | None, facts: dict[str, Any]) -> str:
    old = adapter_folder(folder) / "README.md"
    if settings is None:
        # The same gates: their card holds.
        return old.read_text(encoding="utf-8") if old.is_file() else f"# {out.name}\n"
    lines = [
        f"# {out.name}",
        "",
        f"The adapter `{folder.name}` at another compression, written by `kvfold calibrate`: its gates were shifted by "
        f"{facts['shift']:+.3f}, nothing was trained. Over {facts['sequences']} sequences of {tokens:,} tokens "
        f"the compression was {facts['before']:.2f} before and is {facts['after']:.2f} now, window included; "
        f"{settings.compression:g} was asked for.",
        "",
    ]
    if old.is_file():
        lines += ["What follows is the card of that adapter; its figures are at its own compression.", ""]
        lines.append(old.read_text(encoding="utf-8"))
    return "\n".join(lines)


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
    expected_NTV = _log_probabilities(model, ids_NT)
    missed = []
    try:
        for channel in range(dim):
            report("finding the channel", channel, dim)
            model.set_gates(gate_config_of(settings.with_values(channel=channel, find_channel=False)), settings.time)
            found_NTV = _log_probabilities(model, ids_NT, CallOptions(channel_factor=0.0))
            missed.append(float((expected_NTV.exp() * (expected_NTV - found_NTV)).sum(dim=-1).mean()))
        report("finding the channel", dim, dim)
    finally:
        config.layout, config.gates = was
        model.train(model_trains)
    best = min(range(dim), key=missed.__getitem__)
    return {"channel": best, "kl": missed[best], "kl_of_last": missed[-1], "kl_of_each": missed}


def _log_probabilities(model: FoldForCausalLM, ids_NT: Tensor, options: CallOptions | None = None) -> Tensor:
    """fp32 [N, T, V]."""
    return model(ids_NT, use_cache=False, options=options).logits.float().log_softmax(dim=-1)
