"""Rotary positions: turning q and k by the angle of their position. Which angles a model uses is the model's business.

Letters: B rows, T tokens of this call, H heads, D head dim, R rotated dims (R <= D; the rest passes unchanged).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotation:
    """The cosines and sines of the tokens of one call, each [B or 1, T, R], in the dtype of q and k."""

    cos_BTR: Tensor
    sin_BTR: Tensor

    def apply(self, x_BTHD: Tensor) -> Tensor:
        """Rotate the first R dims of every head; the first half pairs with the second, as Llama checkpoints expect."""
        width = self.cos_BTR.shape[-1]
        cos, sin = self.cos_BTR.unsqueeze(2), self.sin_BTR.unsqueeze(2)
        if width == x_BTHD.shape[-1]:
            return x_BTHD * cos + _half_turn(x_BTHD) * sin
        turned, passed = x_BTHD[..., :width], x_BTHD[..., width:]
        return torch.cat((turned * cos + _half_turn(turned) * sin, passed), dim=-1)


def rotate(rotation: Rotation | None, x_BTHD: Tensor) -> Tensor:
    """Rotate x; a layer without rotary positions hands over None and gets x back."""
    return x_BTHD if rotation is None else rotation.apply(x_BTHD)


def _half_turn(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((-right, left), dim=-1)
