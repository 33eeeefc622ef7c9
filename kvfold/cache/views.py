"""The seam between decoder and cache: what a layer hands over (q, k, v before rotary positions, and what its gate decided)
and what it gets back. `KVView` is the contract.

Here is the training view: no cache, differentiable, one call over whole texts, learned methods in their training form, soft or
hard. The views of the store live in decode.py and chunk.py.
Letters: B rows, T tokens of this call, H query heads, K kv heads, D head dim.
"""

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.base import Method
from kvfold.methods.plans import Held, Lives, TrainingForm, TrainingTokens
from kvfold.ops.attention import dense_attention, lifespan_attention
from kvfold.ops.gating import Gates
from kvfold.ops.key_bias import key_bias_attention
from kvfold.ops.rotation import Rotation, rotate, rotate_queries


class KVView(Protocol):
    """What the decoder needs of a cache during one call."""

    def attend(
        self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor | None, v_BTKD: Tensor | None, rotation: Rotation | None,
        gates: Gates | None = None,
    ) -> Tensor:  # fmt: skip
        """Take the call's q, k, v of one layer as they stand before rotary positions (k and v are None in a reader),
        and give the attention output [B, T, H, D]. `gates` is None where the owner's method has none.
        """


class TrainingView:
    """Attention inside one call, nothing stored. A method that decides by positions is a mask; one that decides by attention
    scores evicts between calls only, and nothing here.
    """

    def __init__(self, layout: KVLayout, *, real_BT: Tensor | None, scale: float, softcap: float | None = None):
        """`real_BT`: bool, False at padding; None = no padding. `scale` and `softcap` as the model's attention has."""
        self._layout, self._real_BT, self._scale, self._softcap = layout, real_BT, scale, softcap
        self._shared: dict[int, TrainingForm | Lives] = {}
        self._masks: dict[tuple, Tensor | None] = {}

    def attend(
        self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor | None, v_BTKD: Tensor | None, rotation: Rotation | None,
        gates: Gates | None = None,
    ) -> Tensor:  # fmt: skip
        """See `KVView`. A reader attends to what its owner attended to, with the owner's bias."""
        owner = self._layout.owner_of(layer)
        shared = self._own(owner, k_BTKD, v_BTKD, rotation, gates) if owner == layer else self._shared[owner]
        if layer == owner < self._layout.last_reader(owner):
            self._shared[owner] = shared
        q = rotate_queries(rotation, q_BTHD, None if gates is None else gates.q_keep_HD)
        common = {"scale": self._scale, "softcap": self._softcap}
        if isinstance(shared, Lives):
            return lifespan_attention(
                q, shared.k_BEKD, shared.v_BEKD, query_BT=self._positions(q_BTHD), position_BKE=shared.first_BKE,
                last_BKE=shared.last_BKE, bias_BKE=shared.bias_BKE, **common,
            )  # fmt: skip
        if shared.bias_BTK is None:
            return dense_attention(q, shared.k_BTKD, shared.v_BTKD, mask=self._mask(owner, q_BTHD), **common)
        window = self._layout.layers[owner].window
        mask = None if window is None else self._mask(owner, q_BTHD)
        kv = shared.k_BTKD, shared.v_BTKD, shared.bias_BTK
        return key_bias_attention(q, *kv, free=shared.free, mask=mask, real_BT=self._real_BT, **common)

    def _positions(self, x_BT: Tensor) -> Tensor:
        """Real tokens before each token, -1 at padding; int64 [B, T]."""
        if self._real_BT is None:
            return torch.arange(x_BT.shape[1], device=x_BT.device).expand(x_BT.shape[:2])
        return (self._real_BT.long().cumsum(dim=1) - 1).masked_fill(~self._real_BT, -1)

    def _lives(self, method: Method, k_BTKD: Tensor, v_BTKD: Tensor, gates: Gates) -> Lives:
        """Under a grid: what lives between its borders. Keys are rotated."""
        position_BT = self._positions(k_BTKD)
        shape = (k_BTKD.shape[0], k_BTKD.shape[2], k_BTKD.shape[1])
        noted = {name: one.transpose(1, 2) for name, one in method.noted(gates, self._real_BT).items()}
        arrays = {name: noted.get(name, k_BTKD.new_zeros(shape, dtype=torch.float32)) for name in method.slot_arrays}
        held = Held(
            k_BEKD=k_BTKD, v_BEKD=v_BTKD, position_BKE=position_BT[:, None].expand(shape), arrays=arrays,
            before_B=torch.zeros_like(position_BT[:, 0]), seen_B=position_BT.amax(dim=1) + 1,
        )  # fmt: skip
        return method.cross(held, gates).lives

    def _own(
        self, owner: int, k: Tensor, v: Tensor, rotation: Rotation | None, gates: Gates | None
    ) -> TrainingForm | Lives:
        """What an owner and its readers attend to, keys rotated."""
        keep = None if gates is None else gates.k_keep_KD
        if gates is None or gates.alpha_BTK is None:
            return TrainingForm(k_BTKD=rotate(rotation, k, keep), v_BTKD=v)
        method = self._layout.time_of(owner)
        if method.grid is not None:
            return self._lives(method, rotate(rotation, k, keep), v, gates)
        form = method.training_form(TrainingTokens(k_BTKD=k, v_BTKD=v, gates=gates, real_BT=self._real_BT))
        return replace(form, k_BTKD=rotate(rotation, form.k_BTKD, keep))

    def _mask(self, owner: int, q_BTHD: Tensor) -> Tensor | None:
        method, window = self._layout.time_of(owner), self._layout.layers[owner].window
        # Gates that are off mask nothing; nor do scores.
        method = None if method.trained or not method.lossy or method.attention_scores is not None else method
        if method is None and window is None and self._real_BT is None:
            return None
        key = (method, window)
        if key not in self._masks:
            self._masks[key] = _call_mask(method, window, self._real_BT, q_BTHD.shape[1], q_BTHD.device)
        return self._masks[key]


def _call_mask(
    method: Method | None, window: int | None, real_BT: Tensor | None, num_tokens: int, device: torch.device
) -> Tensor:
    """Which of a call's own tokens each of its queries sees, bool [B or 1, 1, T, T].

    Positions are counted in real tokens. Padding sees itself, so that no row of a softmax is empty.
    """
    index = torch.arange(num_tokens, device=device)
    position = index[None] if real_BT is None else real_BT.long().cumsum(dim=1) - 1
    seen = (index[:, None] >= index)[None]
    if window is not None and window < num_tokens:
        seen = seen & (position[:, :, None] - position[:, None, :] < window)
    chosen = None if method is None else method.sees(position, position[:, None])
    if chosen is not None:
        seen = seen & chosen[:, 0]
    if real_BT is not None:
        seen = (seen & real_BT[:, None, :]) | torch.eye(num_tokens, dtype=torch.bool, device=device)
    return seen[:, None]
