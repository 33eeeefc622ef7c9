"""Rotary positions: turning q and k by the angle of their position. Which angles a model uses is the model's business. The few
rows of a decoding step on a CPU are turned by a C function, since torch makes five operations of it.

Letters: B rows, T tokens of this call, H heads, D head dim, R rotated dims (R <= D; the rest passes unchanged).
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvfold.ops import native

MOST_ROWS = 192
"""Above, torch's threads are worth more than the fewer operations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotation:
    """The cosines and sines of the tokens of one call, each [B or 1, T, R], in the dtype of q and k.

    Both halves of R carry the same angles, as transformers lays them out.
    """

    cos_BTR: Tensor
    sin_BTR: Tensor
    query_gain_D: Tensor | None = None
    """What each channel of a rotated query is multiplied by: a norm's gain that stands behind the rotation."""
    _cos_BT1R: Tensor = field(init=False, repr=False, compare=False)
    _sin_BT1R: Tensor = field(init=False, repr=False, compare=False)
    _in_place: bool = field(init=False, repr=False, compare=False)
    """Whether C can read the angles where they are."""

    def __post_init__(self) -> None:
        # Once a call, not once a layer: room for the heads, and the sign that the first half of the rotated vector has.
        left, right = self.sin_BTR.chunk(2, dim=-1)
        object.__setattr__(self, "_cos_BT1R", self.cos_BTR.unsqueeze(2))
        object.__setattr__(self, "_sin_BT1R", torch.cat((-left, right), dim=-1).unsqueeze(2))
        cos, sin = self.cos_BTR, self.sin_BTR
        plain = cos.dtype == sin.dtype == torch.float32 and cos.device.type == "cpu" and cos.stride() == sin.stride()
        object.__setattr__(self, "_in_place", plain and cos.stride(2) == 1)

    def part(self, start: int, end: int) -> "Rotation":
        """That of some of the tokens."""
        if (start, end) == (0, self.cos_BTR.shape[1]):
            return self
        return replace(self, cos_BTR=self.cos_BTR[:, start:end], sin_BTR=self.sin_BTR[:, start:end])

    def rows(self, index: Tensor) -> "Rotation":
        """That of some rows of the call."""
        if self.cos_BTR.shape[0] == 1:
            return self
        return replace(self, cos_BTR=self.cos_BTR[index], sin_BTR=self.sin_BTR[index])

    def column(self, column_B: Tensor) -> "Rotation":
        """That of one token of each row."""
        row = torch.arange(column_B.shape[0], device=column_B.device) if self.cos_BTR.shape[0] > 1 else 0
        one = {name: getattr(self, name)[row, column_B].unsqueeze(1) for name in ("cos_BTR", "sin_BTR")}
        return replace(self, **one)

    def apply(self, x_BTHD: Tensor) -> Tensor:
        """Rotate the first R dims of every head; the first half pairs with the second, as Llama checkpoints expect."""
        width = self._cos_BT1R.shape[-1]
        library = native.linear_library()
        if library is not None and self._few(x_BTHD):
            return self._turned_by(library, x_BTHD)
        if width == x_BTHD.shape[-1]:
            return self._turn(x_BTHD)
        return torch.cat((self._turn(x_BTHD[..., :width]), x_BTHD[..., width:]), dim=-1)

    def _few(self, x_BTHD: Tensor) -> bool:
        """Whether the C function serves this call: one token of each of few rows, its heads side by side."""
        rows, tokens, _, dims = x_BTHD.shape
        return (
            tokens == 1
            and rows <= MOST_ROWS
            and x_BTHD.dtype == torch.float32
            and self._in_place
            and x_BTHD.stride()[2:] == (dims, 1)
            and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        )

    def _turned_by(self, library: native.LinearLibrary, x_B1HD: Tensor) -> Tensor:
        rows, _, heads, dims = x_B1HD.shape
        cos, out = self.cos_BTR, x_B1HD.new_empty(x_B1HD.shape)
        library.rotate(
            x_B1HD.data_ptr(), cos.data_ptr(), self.sin_BTR.data_ptr(), out.data_ptr(), rows, heads, dims, cos.shape[2],
            x_B1HD.stride(0), cos.stride(0) if cos.shape[0] > 1 else 0,
        )  # fmt: skip
        return out

    def _turn(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * self._cos_BT1R + torch.cat((right, left), dim=-1) * self._sin_BT1R


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
