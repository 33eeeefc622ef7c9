"""Which layers share in a step, where that is drawn: one model learns to do with any of many layouts. No torch.

Source: arXiv 2604.22782 draws, in pretraining, a layer's own keys and values or an earlier layer's.
Differs: readers and owners are those of a pattern, and a trained model is trained on; drawn for a step, not a sample.
"""

import random

from kvfold.layout import KVLayout

_SHARE = 0.5
"""How often a layer that may share does."""


def drawn_layout(base: KVLayout, widest: KVLayout, *, seed: int, step: int) -> KVLayout:
    """A layout between `base` and `widest`, in which most layers share, the same on every process: each layer that has
    another owner in `widest` goes there or stays where `base` has it.
    """
    draw = random.Random(f"{seed} {step}")
    owners: list[int] = []
    for layer in range(base.num_layers):
        own, other = base.owner_of(layer), widest.owner_of(layer)
        goes = draw.random() < _SHARE
        # The owner that it had may have become a reader itself.
        owners.append(other if goes else layer if own == layer else owners[own])
    return base.with_owners(owners)
