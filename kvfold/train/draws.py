"""Which layers share in a step, where that is drawn: one model learns to do with any of many layouts. No torch.

Source: arXiv 2604.22782 draws, in pretraining, a layer's own keys and values or an earlier layer's.
Differs: readers and owners are those of a pattern, and a trained model is trained on; drawn for a step, not a sample.
"""

import random

from kvfold.layout.kvlayout import KVLayout

_SHARE = 0.5
"""How often a layer that may share does."""


def drawn_layout(base: KVLayout, widest: KVLayout, *, seed: int, step: int) -> KVLayout:
    """A layout between `base` and `widest`, in which most layers share, the same on every process: each layer that has
    another owner in `widest` stays where `base` has it, or reads what the layer before it in its group of `widest` reads. So
    every layout can come up whose owners include those of `widest` and whose readers read the nearest owner before them.
    """
    draw = random.Random(f"{seed} {step}")
    owners: list[int] = []
    newest: dict[int, int] = {}
    for layer in range(base.num_layers):
        own, group = base.owner_of(layer), widest.owner_of(layer)
        goes = draw.random() < _SHARE and group in newest
        # The owner that it had may have become a reader itself.
        owners.append(newest[group] if goes else layer if own == layer else owners[own])
        newest[group] = owners[-1]
    return base.with_owners(owners)
