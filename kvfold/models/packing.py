"""Packing a model for inference on a CPU: copies of its weights in the form that is quick for a few rows.

The weights themselves stay as they are, so saving, training, adapters and edits see an ordinary model; a call with gradients
enabled never uses a copy. The copies take as much memory as the weights that they copy (the input embedding has none).
"""

import os
import warnings
from collections.abc import Iterator

from torch import nn

from kvfold.models.blocks import FoldLayer
from kvfold.ops.linear import PackableLinear, PackedWeights

MEMORY_SHARE = 4
"""Without being asked, copies take at most one part in so many of the machine's memory."""
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that share their input. k and v of a layer with a KV norm of its own do not share q's."""


def pack(model: nn.Module, *, rows: int | None = None, force: bool = False) -> int:
    """Pack every linear layer that gains by it; gives the bytes of all copies. Layers that are packed already stay so.

    `rows`: how many rows a decoding step will have, where that is known; at one or two, fp32 gains nothing. Nothing happens on
    a device or for a dtype that has no quicker form. Unless forced, a model whose copies would take more than a quarter of
    the machine's memory stays as it is, with a warning.
    """
    groups = [group for group in _groups(model) if all(PackedWeights.helps(layer.weight, rows) for layer in group)]
    missing = [group for group in groups if group[0].packed is None]
    needed = sum(layer.weight.nbytes for group in missing for layer in group)
    if not force and needed > _machine_bytes() // MEMORY_SHARE:
        warnings.warn(
            f"packed weights would take {needed / 1e9:.1f} GB more, over a quarter of this machine's memory: decoding runs on "
            "the plain ones; kvfold.models.packing.pack(model, force=True) packs them all the same",
            stacklevel=2,
        )
        return packed_bytes(model)
    for group in missing:
        copy = PackedWeights(group)
        for layer in group:
            layer.packed = copy
    for layer in model.modules():
        if isinstance(layer, FoldLayer):
            layer.front, layer.tail = layer.new_front(), layer.new_tail()
    return packed_bytes(model)


def unpack(model: nn.Module) -> None:
    """Give the copies' memory back."""
    for module in model.modules():
        if isinstance(module, PackableLinear):
            module.packed = None
        if isinstance(module, FoldLayer):
            module.front = module.tail = None


def packed_bytes(model: nn.Module) -> int:
    """Bytes of a model's packed copies, on top of its weights."""
    copies = {id(module.packed): module.packed for module in model.modules() if isinstance(module, PackableLinear)}
    return sum(copy.num_bytes for copy in copies.values() if copy is not None)


def _groups(model: nn.Module) -> Iterator[tuple[PackableLinear, ...]]:
    """Layers to be packed together; each layer is in one group."""
    for module in model.modules():
        children = {name: child for name, child in module.named_children() if isinstance(child, PackableLinear)}
        for names in _TOGETHER:
            if set(names) <= children.keys() and getattr(module, "kv_norm", None) is None:
                yield tuple(children.pop(name) for name in names)
        for child in children.values():
            yield (child,)


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
