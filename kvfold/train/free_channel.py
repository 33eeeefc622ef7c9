"""Which channel of q and k a gate may take for its decisions: the one that the model misses least.

The published channel is the last or the first. Under rotary positions those may be the ones that matter most: the last turns
least and tells what a key is about, the first turns fastest and tells the neighbours apart.
Letters: N blocks, T tokens, D head dim, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from kvfold.eval.progress import Report, silent
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.options import CallOptions
from kvfold.train.settings import RetrofitSettings
from kvfold.train.student import gate_config_of

_SEQUENCES, _TOKENS = 2, 256
"""Text that every channel is tried on."""


@torch.no_grad()
def least_missed_channel(
    model: FoldForCausalLM, blocks_NT: Tensor, settings: RetrofitSettings, *, report: Report = silent
) -> dict[str, Any]:
    """Zero each channel as the method would, and compare with the model as it is: the `channel` with the lowest KL, its `kl`,
    that of the last channel, `kl_of_last`, and `kl_of_each`, nats a token.

    Source: none; arXiv 2403.09636 and its code take a fixed channel.
    """
    config, dim = model.config, model.config.head_dim
    ids_NT = blocks_NT[:_SEQUENCES, :_TOKENS].to(model.device)
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
