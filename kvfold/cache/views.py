"""The seam between decoder and cache: what a layer hands over (q, k, v before rotary positions) and what it gets back.

`KVView` is the contract; `DenseView` is the training view: no cache, differentiable, one call over whole texts.
The store view lives in attend.py. Letters: B rows, T tokens of this call, H query heads, K kv heads, D head dim.
"""

from typing import Protocol

import torch
from torch import Tensor

from kvfold.layout import KVLayout
from kvfold.ops.attention import dense_attention
from kvfold.ops.rotation import Rotation, rotate
from kvfold.specs.window import WindowSpec


class KVView(Protocol):
    """What the decoder needs of a cache during one call."""

    def attend(
        self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor | None, v_BTKD: Tensor | None, rotation: Rotation | None
    ) -> Tensor:
        """Take the call's q, k, v of one layer as they stand before rotary positions (k and v are None in a reader),
        and give the attention output [B, T, H, D].
        """


class DenseView:
    """Attention inside one call, nothing stored: the training form. A window is a mask; H2O and TOVA, which drop
    only between calls, drop nothing here.
    """

    def __init__(self, layout: KVLayout, *, real_BT: Tensor | None, scale: float, softcap: float | None = None):
        """`real_BT`: bool, False at padding; None = no padding. `scale` and `softcap` as the model's attention has."""
        self._layout, self._real_BT, self._scale, self._softcap = layout, real_BT, scale, softcap
        self._shared: dict[int, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple, Tensor | None] = {}

    def attend(
        self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor | None, v_BTKD: Tensor | None, rotation: Rotation | None
    ) -> Tensor:
        """See `KVView`. A reader attends to the rotated k and the v of its owner."""
        owner = self._layout.owner_of(layer)
        if owner == layer:
            k, v = rotate(rotation, k_BTKD), v_BTKD
            if self._layout.last_reader(owner) != owner:
                self._shared[owner] = (k, v)
        else:
            k, v = self._shared[owner]
        mask = self._mask(owner, q_BTHD)
        return dense_attention(rotate(rotation, q_BTHD), k, v, scale=self._scale, softcap=self._softcap, mask=mask)

    def _mask(self, owner: int, q_BTHD: Tensor) -> Tensor | None:
        spec, window = self._layout.time_of(owner), self._layout.layers[owner].window
        key = (spec if isinstance(spec, WindowSpec) else None, window)
        if key not in self._masks:
            self._masks[key] = call_mask(key[0], window, self._real_BT, q_BTHD.shape[1], q_BTHD.device)
        return self._masks[key]


def call_mask(
    spec: WindowSpec | None, window: int | None, real_BT: Tensor | None, num_tokens: int, device: torch.device
) -> Tensor | None:
    """Which of a call's own tokens each of its queries sees, bool [B or 1, 1, T, T]; None = plain causal.

    Distances are counted in real tokens. Padding sees itself, so that no row of a softmax is empty.
    """
    if spec is None and window is None and real_BT is None:
        return None
    index = torch.arange(num_tokens, device=device)
    position = index[None] if real_BT is None else real_BT.long().cumsum(dim=1) - 1
    seen = (index[:, None] >= index)[None]
    distance = position[:, :, None] - position[:, None, :]
    if window is not None and window < num_tokens:
        seen = seen & (distance < window)
    if spec is not None:
        recent = torch.tensor([spec.recent.tokens(n + 1) for n in range(num_tokens)], device=device)
        reach = recent[position.clamp(min=0)][:, :, None]
        seen = seen & ((distance < reach) | (position[:, None, :] < spec.sinks))
    if real_BT is not None:
        seen = (seen & real_BT[:, None, :]) | torch.eye(num_tokens, dtype=torch.bool, device=device)
    return seen[:, None]
