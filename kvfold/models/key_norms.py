"""Hunyuan's cross-layer attention as one shared cache: the key norms that each layer has of its own move into its queries.

There a group shares keys after rotary positions and before the key norm, and layer j multiplies the normed keys n by its
own gain w_j. Since q . (w_j * n) = (q * w_j) . n, the gain can stand on the queries, and what is left to store is n alone.
"""

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor

QUERY_GAIN, KEY_GAIN = "self_attn.query_layernorm.weight", "self_attn.key_layernorm.weight"
"""Hunyuan's names of the gains, [D], that follow rotary positions."""


def fold_key_norms(weights: MutableMapping[str, Tensor], owners: Sequence[int]) -> None:
    """Rewrite a Hunyuan state dict in place, so that every layer of a group can read one normed cache: each layer's query
    gain takes its key gain in, an owner's key gain is all ones, a reader has none. `owners`: one a layer.

    Exact for norms that follow rotary positions; a gain before them would not pass through the turn.

    Source: arXiv 2411.02265 (Hunyuan-Large), its released config: CLA with a key norm in every layer.
    Differs: the fold, which its code does not do: it norms the shared keys again in every layer.
    """
    for layer, owner in enumerate(owners):
        query, key = (f"model.layers.{layer}.{part}" for part in (QUERY_GAIN, KEY_GAIN))
        if query not in weights or key not in weights:
            raise ValueError(
                f"layer {layer} has no {QUERY_GAIN} or {KEY_GAIN}: the fold is for layers that norm queries and keys: "
                "give a Hunyuan checkpoint"
            )
        weights[query] = weights[query] * weights[key]
        if owner == layer:
            weights[key] = torch.ones_like(weights[key])
        else:
            del weights[key]
