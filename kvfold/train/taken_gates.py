"""A method that takes over another's trained gates: its own numbers are fitted by ridge regression, from forward passes alone.

What is predicted from a token's normed residual stream is the log of the mean weight that queries beyond the delay give it,
summed over the query heads of the group and over all readers: how much the token matters beside others of its head.
Letters: B rows, T tokens, H query heads, K kv heads, D head dim.
"""

from dataclasses import replace
from operator import add
from typing import Any

import torch
from torch import Tensor

from kvfold.errors import UserError
from kvfold.eval.progress import Report, silent
from kvfold.methods.registry import parse_time
from kvfold.models.decoder import FoldForCausalLM
from kvfold.train.warm_start import SMALLEST, Moments, WatchedView, attention_beyond, counted_tokens, gated_owners


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
