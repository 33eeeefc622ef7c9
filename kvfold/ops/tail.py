"""What follows attention in a layer, for the few rows of a decoding step, as one C function: output projection, residual, norm,
gated feed-forward, residual. As separate operations they take longer to start than their weights take to read.
Letters: B rows, T tokens, A channels of all query heads, C channels.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kvfold.ops.linear import PackedWeights


class PackedTail:
    """The tail of one layer over its packed weights. Copies and pickles of a model leave it behind."""

    def __init__(self, modules: tuple[nn.Module, ...], norm: nn.Module, eps: float, factor: float):
        """`modules`: all that the function stands for: o, gate, up and down, packed, then those around them. `norm`: one of
        them, with a weight alone. `factor`: of both blocks, before the residual.
        """
        self._modules, self._norm, self._eps, self._factor = modules, norm, eps, factor
        self._o, self._gate_up, self._down = (modules[at].packed for at in (0, 1, 3))

    @staticmethod
    def reads(packed: Iterable[PackedWeights | None]) -> bool:
        """Whether these copies have the form that the function reads, without biases."""
        return all(one is not None and one.panels_NCW is not None and not one.has_bias for one in packed)

    def serves(self, modules: tuple[nn.Module, ...], hidden_BTC: Tensor) -> bool:
        """Whether the function can stand for these modules in a call with this residual stream."""
        if modules != self._modules or not self._o.allows(hidden_BTC):
            return False
        for module in modules[4:]:
            if module._forward_hooks or module._forward_pre_hooks:
                return False
        gain, packed = self._norm._parameters.get("weight"), (self._o, self._gate_up, self._down)
        return (
            gain is not None and gain.dtype == torch.float32 and gain.is_contiguous()
            and packed == (modules[0].packed, modules[1].packed, modules[3].packed)
            and self._o.holds() and self._gate_up.holds() and self._down.holds()
            and self.reads(packed)
        )  # fmt: skip

    def __call__(self, attended_BTA: Tensor, hidden_BTC: Tensor) -> Tensor:
        """The residual stream behind the layer, from what attention gave and from the stream before it."""
        attended, hidden, gain = attended_BTA.contiguous(), hidden_BTC.contiguous(), self._norm._parameters["weight"]
        out, o, down = torch.empty_like(hidden), self._o, self._down
        failed = o.library.tail(
            attended.data_ptr(), hidden.data_ptr(), o.panels_NCW.data_ptr(), gain.data_ptr(),
            self._gate_up.panels_NCW.data_ptr(), down.panels_NCW.data_ptr(), out.data_ptr(),
            hidden.numel() // o.outputs, o.inputs, o.outputs, down.inputs, self._eps, self._factor,
            torch.get_num_threads(), o.library.parallel,
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for the feed-forward block of a decoding step")
        return out

    def __reduce__(self):
        return _nothing, ()


def _nothing() -> None:
    """What a copied or unpickled model has in place of a tail."""
