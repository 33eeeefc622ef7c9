"""A linear layer that stays quick for the handful of rows that decoding brings."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SKINNY_ROWS = range(8, 41)
"""Rows for which MKL multiplies weight by input faster than input by weight: 1.2 to 2.6 times, measured on two x86 cores
with weights of 576 x 192 to 4096 x 4096; below and above, as it comes."""


class SkinnyLinear(nn.Linear):
    """`nn.Linear` with the same weights and the same result up to rounding; in inference on a CPU with MKL the product of a
    few rows is taken the other way round.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        rows = x.numel() // max(1, x.shape[-1])
        if rows not in SKINNY_ROWS or torch.is_grad_enabled() or not _turns(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        out = (self.weight @ x.reshape(rows, -1).t()).t()
        if self.bias is not None:
            out = out + self.bias
        return out.reshape(*x.shape[:-1], -1).contiguous()


def _turns(x: Tensor, weight: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and torch.backends.mkl.is_available()
