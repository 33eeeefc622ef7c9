"""After training: shift all gates together so that held-out text is compressed exactly as asked for.

One shift for all heads, found as a quantile of their logits: heads keep the differences that they learned. (A threshold of
its own for each head would make all heads compress alike, which costs quality.) Decisions change what later layers see, so the
shift is found again under the shifted decisions until the compression holds; shifts that were too small or too large
bound it, since a quantile alone may swing to and fro.
Letters: N blocks, K kv heads, T tokens.
"""

from typing import Any

import torch
from torch import Tensor

from kvfold.eval.progress import Report, silent
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.decoder import FoldForCausalLM
from kvfold.train.reached import reached
from kvfold.train.settings import RetrofitSettings
from kvfold.train.student import retention_of

_ROUNDS = 12
_CLOSE = 0.005
"""Of the compression asked for, as a share."""
_FLAT_TAU = 100.0
"""A temperature at which probabilities tell their logits: at the gates' own they are 0 or 1."""


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
    shares, logits = [], []
    try:
        for block in blocks_NT:
            outputs = model(block[None].to(model.device), use_cache=False, logits_to_keep=1, output_decisions=True)
            found = reached(outputs.decisions, layout, from_next=from_next, model_bytes=model.dtype.itemsize)
            shares.append(found.kept)
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
