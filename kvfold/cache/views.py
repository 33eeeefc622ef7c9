"""The seam between decoder and cache: what a layer hands over (q, k, v before rotary positions, and what its gate decided)
and what it gets back.

`KVView` is the contract. The training view lives in training.py, the store view in call.py.
Letters: B rows, T tokens of this call, H query heads, K kv heads, D head dim.
"""

from typing import Protocol

from torch import Tensor

from kvfold.ops.gating import Gates
from kvfold.ops.rotation import Rotation


class KVView(Protocol):
    """What the decoder needs of a cache during one call."""

    def attend(
        self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor | None, v_BTKD: Tensor | None, rotation: Rotation | None,
        gates: Gates | None = None,
    ) -> Tensor:  # fmt: skip
        """Take the call's q, k, v of one layer as they stand before rotary positions (k and v are None in a reader),
        and give the attention output [B, T, H, D]. `gates` is None where the owner's method has none.
        """
