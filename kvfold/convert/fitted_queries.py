"""Turning a layer's queries towards keys that are not its own any more: a few gradient steps on its query projection."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def refit_queries(
    layer: nn.Module,
    given: Callable[[int], Tensor],
    wanted: Sequence[tuple[Tensor, Tensor]],
    *,
    steps: int,
    rate: float,
) -> None:
    """`steps` Adam steps on W_q, one batch each, so that the attention block gives what is wanted of it.

    `given(place)`: what the output projection gives for a batch, [B, T, C]; `wanted[place]`: what it should give, and how
    much each token's squared error counts, [B, T]. `rate` is the first step's size as a share of the weights' own; it falls
    to zero along a cosine.
    """
    projection, asked = layer.self_attn.q_proj, [one for one in layer.parameters() if one.requires_grad]
    for one in asked:
        one.requires_grad_(False)
    projection.weight = nn.Parameter(projection.weight.detach().clone())
    start = rate * float(projection.weight.detach().square().mean().sqrt())
    adam = torch.optim.Adam([projection.weight], lr=start, betas=(0.9, 0.95))
    with torch.enable_grad():
        for step in range(steps):
            adam.param_groups[0]["lr"] = start * 0.5 * (1.0 + math.cos(math.pi * step / steps))
            place = step % len(wanted)
            goal, weight = wanted[place]
            loss = ((given(place) - goal).square().sum(dim=-1) * weight).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    for one in asked:
        one.requires_grad_(True)
