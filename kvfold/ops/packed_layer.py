"""What stands before and behind attention in a layer, each as one C function: norm, projections and rotation; output
projection, residual, norm, gated feed-forward, residual. As separate operations those of a decoding step take longer to start
than their weights take to read, and those of a prompt hand each other tensors too large for any cache.
Letters: B rows, T tokens, H query heads, K kv heads, D head dim, A channels of all query heads, C channels.
"""

import struct
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kvfold.ops.linear import PackedWeights
from kvfold.ops.rotation import Rotation

_FRONT = struct.Struct("13P 11q d")
_TAIL = struct.Struct("8P 5q 2d")
"""`front_job` and `tail_job` of linear_cpu.c, field for field."""


class _PackedPart:
    """Modules that one C function stands for. Copies and pickles of a model leave it behind."""

    def __init__(self, modules: tuple[nn.Module, ...], linear: tuple[int, ...], norm: nn.Module, eps: float):
        """`modules`: all, packed layers first. `linear`: places of packed layers, one of each copy. `norm`: one of the modules,
        with a weight alone.
        """
        self._modules, self._norm, self._eps = modules, norm, eps
        self._copies = [(place, modules[place].packed) for place in linear]
        self._others = [one for one in modules if getattr(one, "packed", None) is None]

    @staticmethod
    def reads(packed: Iterable[PackedWeights | None]) -> bool:
        """Whether these copies have the form that the functions read, without biases."""
        return all(one is not None and one.panels_NCW is not None and not one.has_bias for one in packed)

    def serves(self, modules: tuple[nn.Module, ...], hidden_BTC: Tensor) -> bool:
        """Whether the function can stand for these modules in a call with this residual stream."""
        if modules != self._modules or not self._copies[0][1].allows(hidden_BTC, any_rows=True):
            return False
        for module in self._others:
            if module._forward_hooks or module._forward_pre_hooks:
                return False
        for place, copy in self._copies:
            if modules[place].packed is not copy or not copy.holds() or copy.panels_NCW is None or copy.has_bias:
                return False
        gain = self._norm._parameters.get("weight")
        return gain is not None and gain.dtype == torch.float32 and gain.is_contiguous()

    def __reduce__(self):
        return _nothing, ()


class PackedFront(_PackedPart):
    """From the residual stream to q, k and v of one layer's heads; in a layer without keys of its own to q alone."""

    def __init__(self, modules: tuple[nn.Module, ...], norm: nn.Module, eps: float, head_dim: int):
        """`modules`: q, and in an owner k and v, packed together, then those around them."""
        super().__init__(modules, (0,), norm, eps)
        self._head_dim = head_dim
        packed = [one.out_features // head_dim for one in modules if getattr(one, "packed", None) is not None]
        self._heads, self._kv_heads = packed[0], packed[1] if len(packed) > 1 else 0

    @staticmethod
    def turns(rotation: Rotation | None) -> bool:
        """Whether the function can rotate as asked: angles that C can read, no gain behind them."""
        return rotation is None or (rotation.in_place and rotation.query_gain_D is None)

    def tells(self, adapter: tuple[nn.Module, nn.Module] | None) -> bool:
        """Whether the function can stand for an adapter too: a norm with a gain alone and the same eps, and a projection."""
        if adapter is None:
            return True
        for module in adapter:
            weight = module._parameters.get("weight")  # none where something is wrapped around the module
            if weight is None or not weight.is_contiguous() or module._forward_hooks or module._forward_pre_hooks:
                return False
        norm = adapter[0]
        return not norm.offset and norm.eps == self._eps

    def __call__(
        self, hidden_BTC: Tensor, rotation: Rotation | None, adapter: tuple[nn.Module, nn.Module] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """q [B, T, H, D], k and v [B, T, K, D], q and k rotated; and what the adapter (norm and projection) gives [B, T, X]."""
        hidden, copy, (rows, tokens, _) = hidden_BTC.contiguous(), self._copies[0][1], hidden_BTC.shape
        q = hidden.new_empty((rows, tokens, self._heads, self._head_dim))
        k = v = None
        if self._kv_heads:
            k, v = hidden.new_empty((2, rows, tokens, self._kv_heads, self._head_dim))
        angles = (0, 0), (0, 1, 0, 0)
        if rotation is not None:
            cos, sin = rotation.cos_BTR, rotation.sin_BTR
            by_sequence = cos.stride(0) if len(cos) > 1 else 0
            angles = (cos.data_ptr(), sin.data_ptr()), (cos.shape[2], tokens, by_sequence, cos.stride(1))
        told, tells = None, (0, 0, 0, 0, 0)
        if adapter is not None:
            told, tells = _told(hidden, *adapter)
        job = _FRONT.pack(
            hidden.data_ptr(), self._norm._parameters["weight"].data_ptr(), copy.panels_NCW.data_ptr(), *angles[0],
            q.data_ptr(), 0 if k is None else k.data_ptr(), 0 if v is None else v.data_ptr(), *tells[:4],
            copy.library.parallel, tells[4], rows * tokens, copy.inputs, self._heads, self._kv_heads, self._head_dim,
            *angles[1], torch.get_num_threads(), self._eps,
        )  # fmt: skip
        if copy.library.front(job):
            raise MemoryError("no memory for the projections in front of attention")
        return q, k, v, told


class PackedTail(_PackedPart):
    """From what attention found to the residual stream behind the layer."""

    def __init__(self, modules: tuple[nn.Module, ...], norm: nn.Module, eps: float, factor: float):
        """`modules`: o, gate, up and down, packed, then those around them. `factor`: of both blocks, before the residual."""
        super().__init__(modules, (0, 1, 3), norm, eps)
        self._factor = factor

    def __call__(self, attended_BTA: Tensor, hidden_BTC: Tensor) -> Tensor:
        """The residual stream behind the layer, from what attention gave and from the stream before it."""
        attended, hidden, gain = attended_BTA.contiguous(), hidden_BTC.contiguous(), self._norm._parameters["weight"]
        out, (o, gate_up, down) = torch.empty_like(hidden), [copy for _, copy in self._copies]
        job = _TAIL.pack(
            attended.data_ptr(), hidden.data_ptr(), o.panels_NCW.data_ptr(), gain.data_ptr(),
            gate_up.panels_NCW.data_ptr(), down.panels_NCW.data_ptr(), out.data_ptr(), o.library.parallel,
            hidden.numel() // o.outputs, o.inputs, o.outputs, down.inputs, torch.get_num_threads(), self._eps,
            self._factor,
        )  # fmt: skip
        if o.library.tail(job):
            raise MemoryError("no memory for the feed-forward block of a layer")
        return out


def _told(hidden: Tensor, norm: nn.Module, projection: nn.Module) -> tuple[Tensor, tuple[int, ...]]:
    """Where an adapter's output goes, and what C needs to find it; weights of adapters are fp32 whatever the model's are."""
    gain, own = norm._parameters["weight"], projection._parameters
    weight, bias = own["weight"], own.get("bias")
    told = hidden.new_empty((*hidden.shape[:2], len(weight)))
    bias_at = 0 if bias is None else bias.data_ptr()
    return told, (gain.data_ptr(), weight.data_ptr(), bias_at, told.data_ptr(), len(weight))


def _nothing() -> None:
    """What a copied or unpickled model has in place of a part."""
