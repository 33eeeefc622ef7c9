"""Rotary positions: turning q and k by the angle of their position. Which angles a model uses is the model's business. The few
rows of a decoding step on a CPU are turned by a C function, since torch makes five operations of it.

Letters: B rows, T tokens of this call, H heads, D head dim, R rotated dims (R <= D; the rest passes unchanged).
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvfold.ops.gating import picked
from kvfold.ops.linear import few_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotation:
    """The cosines and sines of the tokens of one call, each [B or 1, T, R], in the dtype of q and k.

    Both halves of R carry the same angles, as transformers lays them out.
    """

    cos_BTR: Tensor
    sin_BTR: Tensor
    query_gain_D: Tensor | None = None
    """What each channel of a rotated query is multiplied by: a norm's gain that stands behind the rotation."""
    in_place: bool = field(init=False, repr=False, compare=False)
    """Whether C can read the angles where they are."""

    def __post_init__(self) -> None:
        plain = self.cos_BTR.dtype == self.sin_BTR.dtype == torch.float32 and self.cos_BTR.stride(2) == 1
        object.__setattr__(self, "in_place", plain and self.cos_BTR.stride() == self.sin_BTR.stride())

    def part(self, start: int, end: int) -> "Rotation":
        """That of some of the tokens."""
        if (start, end) == (0, self.cos_BTR.shape[1]):
            return self
        return replace(self, cos_BTR=self.cos_BTR[:, start:end], sin_BTR=self.sin_BTR[:, start:end])

    def at(self, row: Tensor, column: Tensor | None) -> "Rotation":
        """That of some rows of a call, see `picked`."""
        if self.cos_BTR.shape[0] == 1:
            row = torch.zeros_like(row)
        cos, sin = (picked(x, row, column) for x in (self.cos_BTR, self.sin_BTR))
        return replace(self, cos_BTR=cos, sin_BTR=sin)

    def apply(self, x_BTHD: Tensor) -> Tensor:
        """Rotate the first R dims of every head; the first half pairs with the second, as Llama checkpoints expect."""
        rows, tokens, heads, dims = x_BTHD.shape
        cos, width = self.cos_BTR, self.cos_BTR.shape[-1]
        side_by_side = tokens == 1 and x_BTHD.stride()[2:] == (dims, 1)
        library = few_rows(x_BTHD, rows) if side_by_side and self.in_place else None
        if library is not None:
            out = x_BTHD.new_empty(x_BTHD.shape)
            addresses = (one.data_ptr() for one in (x_BTHD, cos, self.sin_BTR, out))
            library.rotate(*addresses, rows, heads, dims, width, x_BTHD.stride(0), cos.stride(0) if len(cos) > 1 else 0)
            return out
        if width == dims:
            return self._turn(x_BTHD)
        return torch.cat((self._turn(x_BTHD[..., :width]), x_BTHD[..., width:]), dim=-1)

    def _turn(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * self.cos_BTR.unsqueeze(2) + torch.cat((-right, left), dim=-1) * self.sin_BTR.unsqueeze(2)


def rotate(rotation: Rotation | None, x_BTHD: Tensor, keep_HD: Tensor | None = None) -> Tensor:
    """Rotate x; a layer without rotary positions hands over None and gets x back.

    `keep_HD`: factor of each channel before and after, 0 where a gate freed it: turning would mix it with its partner.
    """
    if keep_HD is None:
        return x_BTHD if rotation is None else rotation.apply(x_BTHD)
    kept = x_BTHD * keep_HD
    return kept if rotation is None else rotation.apply(kept) * keep_HD


def rotate_queries(rotation: Rotation | None, q_BTHD: Tensor, keep_HD: Tensor | None = None) -> Tensor:
    """`rotate` for queries, with the gain that they alone have."""
    rotated = rotate(rotation, q_BTHD, keep_HD)
    return rotated if rotation is None or rotation.query_gain_D is None else rotated * rotation.query_gain_D
