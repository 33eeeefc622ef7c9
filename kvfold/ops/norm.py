"""RMS norm over the last dim: torch's own, and for the few rows of a decoding step on a CPU a C function, since torch makes
five operations of it. Letters: R rows, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from kvfold.ops import native

MOST_ROWS = 192
"""Above, torch's threads are worth more than the fewer operations."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in x's shape and dtype."""
    library = native.linear_library()
    if library is None or not _few(x, weight):
        return F.rms_norm(x, weight.shape, weight, eps)
    x, width = x.contiguous(), weight.shape[0]
    out = torch.empty_like(x)
    library.rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // width, width, eps)
    return out


def _few(x: Tensor, weight: Tensor) -> bool:
    """Whether the C function serves this call."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() <= MOST_ROWS * weight.shape[0]
        and type(weight) in (Parameter, Tensor)
        and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
        and weight.is_contiguous()
    )
