"""The training view: no cache, differentiable, one call over whole texts. DMC and DMS in their training form, soft or hard.

Letters: B rows, T tokens of this call, H query heads, K kv heads, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.layout.kvlayout import KVLayout
from kvfold.ops.attention import dense_attention
from kvfold.ops.gating import Gates, first_real, from_next, real_first, reordered
from kvfold.ops.key_bias import key_bias_attention
from kvfold.ops.pooling import pooled
from kvfold.ops.rotation import Rotation, rotate, rotate_queries
from kvfold.specs.dms import DMSSpec
from kvfold.specs.window import WindowSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shared:
    """What an owner and its readers attend to."""

    k_BTKD: Tensor
    v_BTKD: Tensor
    bias_BTK: Tensor | None = None
    free: int = 0


class DenseView:
    """Attention inside one call, nothing stored: the training form. A window is a mask; H2O and TOVA, which drop
    only between calls, drop nothing here.
    """

    def __init__(self, layout: KVLayout, *, real_BT: Tensor | None, scale: float, softcap: float | None = None):
        """`real_BT`: bool, False at padding; None = no padding. `scale` and `softcap` as the model's attention has."""
        self._layout, self._real_BT, self._scale, self._softcap = layout, real_BT, scale, softcap
        self._shared: dict[int, _Shared] = {}
        self._masks: dict[tuple, Tensor | None] = {}

    def attend(
        self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor | None, v_BTKD: Tensor | None, rotation: Rotation | None,
        gates: Gates | None = None,
    ) -> Tensor:  # fmt: skip
        """See `KVView`. A reader attends to what its owner attended to, with the owner's bias."""
        owner = self._layout.owner_of(layer)
        if owner == layer:
            shared = self._own(owner, k_BTKD, v_BTKD, rotation, gates)
            if self._layout.last_reader(owner) != owner:
                self._shared[owner] = shared
        else:
            shared = self._shared[owner]
        q = rotate_queries(rotation, q_BTHD, None if gates is None else gates.q_keep_HD)
        common = {"scale": self._scale, "softcap": self._softcap}
        if shared.bias_BTK is None:
            return dense_attention(q, shared.k_BTKD, shared.v_BTKD, mask=self._mask(owner, q_BTHD), **common)
        window = self._layout.layers[owner].window
        mask = None if window is None else self._mask(owner, q_BTHD)
        return key_bias_attention(
            q,
            shared.k_BTKD,
            shared.v_BTKD,
            shared.bias_BTK,
            free=shared.free,
            mask=mask,
            real_BT=self._real_BT,
            **common,
        )

    def _own(self, owner: int, k: Tensor, v: Tensor, rotation: Rotation | None, gates: Gates | None) -> _Shared:
        """Rotated keys, values, and the bias that the owner's gates give each key."""
        keep, real = None if gates is None else gates.k_keep_KD, self._real_BT
        if gates is None or gates.alpha_BTK is None:
            return _Shared(k_BTKD=rotate(rotation, k, keep), v_BTKD=v)
        spec, log_stay = self._layout.time_of(owner), gates.log_stay_BTK
        if isinstance(spec, DMSSpec):
            bias = from_next(log_stay, real, 0.0) if gates.from_next else log_stay
            return _Shared(k_BTKD=rotate(rotation, k, keep), v_BTKD=v, bias_BTK=bias, free=spec.delay)
        opens = first_real(real, k.shape[1], k.device)[..., None]
        kv = pooled_real(
            torch.cat((k, v), dim=-1), gates.weight_BTK, gates.alpha_BTK.masked_fill(opens, 0.0), spec.window, real
        )
        k, v = kv.split((k.shape[-1], v.shape[-1]), dim=-1)
        bias = from_next(log_stay.masked_fill(opens, 0.0), real, 0.0)
        return _Shared(k_BTKD=rotate(rotation, k, keep), v_BTKD=v, bias_BTK=bias)

    def _mask(self, owner: int, q_BTHD: Tensor) -> Tensor | None:
        spec, window = self._layout.time_of(owner), self._layout.layers[owner].window
        key = (spec if isinstance(spec, WindowSpec) else None, window)
        if key not in self._masks:
            self._masks[key] = call_mask(key[0], window, self._real_BT, q_BTHD.shape[1], q_BTHD.device)
        return self._masks[key]


def pooled_real(
    x_BTKD: Tensor, weight_BTK: Tensor, alpha_BTK: Tensor, window: int | None, real_BT: Tensor | None,
    past: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """`ops.pooling.pooled` over the real tokens of each row; what stands at padding is of no meaning, but finite."""
    if real_BT is None:
        return pooled(x_BTKD, weight_BTK, alpha_BTK, window, past)
    # Padding goes behind, where it takes no place in a window; there it opens entries of its own.
    order, back = real_first(real_BT)
    pad = ~real_BT[..., None]
    weight, alpha = weight_BTK.masked_fill(pad, 1.0), alpha_BTK.masked_fill(pad, 0.0)
    found = pooled(reordered(x_BTKD, order), reordered(weight, order), reordered(alpha, order), window, past)
    return reordered(found, back)


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
