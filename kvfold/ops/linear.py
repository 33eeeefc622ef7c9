"""Linear layers, and the RMS norm before them, that are quick for the few rows that decoding brings.

MKL rearranges the weights of an ordinary product at every call from three rows on. `PackedWeights` is a copy of the weights of
one or several layers in a form that need not be rearranged: in fp32 panels of output channels for linear_cpu.c, which reads
them once and in order; otherwise, and where no C file can be built, oneDNN's own format. Which layers are packed, and when, is
decided in models/blocks.py; `studies/packed_products.py` measures the products. Of a norm torch makes five operations,
linear_cpu.c one. What stands before and behind attention in a layer is one C function each: norm, projections and rotation;
output projection, residual, norm, gated feed-forward, residual. As separate operations those of a decoding step take longer to
start than their weights take to read, and those of a prompt hand each other tensors too large for any cache.
Letters: R rows, C input channels, N panels of W output channels; B rows, T tokens, H query heads, K kv heads, D head dim, A
channels of all query heads.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvfold.ops import native

if TYPE_CHECKING:
    from kvfold.ops.rotation import Rotation

FP32_ROWS = range(1, 193)
"""Rows for which panels win in fp32: above, the rearranging no longer matters."""
ONEDNN_ROWS = range(3, 193)
"""Rows for which oneDNN's format wins in fp32: below, memory is the limit whatever the form."""
FEW_ROWS = 192
"""Above, torch's threads are worth more to a norm or a rotation than fewer operations."""
_LEAST_OUTPUTS = 64
_PROBES = 4
_ONEDNN_ROWS_HINT = 16
_PLAIN = (nn.Parameter, Tensor)


class PackableLinear(nn.Linear):
    """`nn.Linear` with the same weights and the same result up to rounding; quick for few rows once it is packed."""

    packed: PackedWeights | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.packed is None or not self.packed.serves((self,), x):
            return F.linear(x, self.weight, self.bias)
        return self.packed(x)[0]


def project(x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """What several layers make of one input; one product where their weights are packed together."""
    packed = getattr(layers[0], "packed", None)
    if packed is None or not packed.serves(layers, x):
        return [layer(x) for layer in layers]
    return packed(x)


class PackedWeights:
    """A copy of the weights of layers that share an input, in the form that is quickest for a few rows on this CPU.

    It is made anew when a weight was replaced or written. An edit through `.data` leaves no trace in torch's version counter:
    a few elements of each weight are compared, which shows whatever changes a weight as a whole (a merged low-rank
    addition, another rounding); after an edit of single elements through `.data` the layers must be packed again.
    Copies and pickles of a model leave it behind.
    """

    def __init__(self, layers: Sequence[PackableLinear]):
        self._layers = tuple(layers)
        self._outputs = [layer.out_features for layer in layers]
        self.outputs = sum(self._outputs)
        self._make()

    @staticmethod
    def helps(weight: Tensor, rows: int | None = None) -> bool:
        """Whether this CPU and torch have a quicker form for such a weight, at so many rows where that is known."""
        if type(weight.data) is not Tensor or weight.is_inference() or weight.device.type != "cpu":
            return False  # quantised weights are tensors of kinds of their own
        if min(weight.shape) < _LEAST_OUTPUTS:
            return False
        if weight.dtype == torch.float32:
            if rows is not None and rows not in fp32_rows():
                return False
            if native.linear_library() is not None:
                return True
            return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
        return _onednn_knows(weight.dtype)

    @property
    def num_bytes(self) -> int:
        """What the copy takes in memory, on top of the weights."""
        if self.panels_NCW is not None:
            return self.panels_NCW.nbytes
        return torch.ops.mkldnn._nbytes(self._onednn)

    def serves(self, layers: tuple[nn.Module, ...], x: Tensor) -> bool:
        """Whether `x` can go through the copy in place of these layers; a copy that is out of date is made anew."""
        return x.shape[-1] == self.inputs and layers == self._layers and self.allows(x) and self.holds()

    def allows(self, x: Tensor, *, any_rows: bool = False) -> bool:
        """Whether a copy may be used at all in a call of this kind, dtype and number of rows."""
        if x.dtype != self._dtype or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if self._dtype == torch.float32 and not any_rows and x.numel() // x.shape[-1] not in self._rows:
            return False
        return not torch.is_autocast_enabled("cpu")

    def holds(self) -> bool:
        """Whether the copy, made anew if need be, stands for its layers: nobody listens to them, and no weight has changed."""
        fresh = True
        for mark, layer in zip(self._marks, self._layers):  # noqa: B905  as many: this runs for every layer of every step
            if layer._forward_hooks or layer._forward_pre_hooks:
                return False
            fresh = fresh and mark.holds(layer._parameters.get("weight"), layer._parameters.get("bias"))
        return fresh or self._remade()

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """[..., C] -> [..., outputs] of each layer, in turn."""
        if self.panels_NCW is None:
            out = torch.ops.mkldnn._linear_pointwise(x, self._onednn, None, "none", [], "")
        else:
            out = self._multiplied(x.reshape(-1, self.inputs)).view(*x.shape[:-1], -1)
        parts = out.split(self._outputs, dim=-1) if len(self._outputs) > 1 else (out,)
        if self.has_bias:
            for part, layer in zip(parts, self._layers, strict=True):
                if layer.bias is not None:
                    part += layer.bias
        return parts

    def _multiplied(self, x_RC: Tensor) -> Tensor:
        """[R, all outputs]."""
        x_RC, library = x_RC.contiguous(), self.library
        rows, outputs = x_RC.shape[0], self.outputs
        out = x_RC.new_empty(rows, outputs)
        library.linear(
            x_RC.data_ptr(), self.panels_NCW.data_ptr(), out.data_ptr(), rows, self.inputs, outputs,
            torch.get_num_threads(), library.parallel,
        )  # fmt: skip
        return out

    @torch.no_grad()
    def _make(self) -> None:
        weights = [layer.weight.detach() for layer in self._layers]
        joint = weights[0] if len(weights) == 1 else torch.cat(weights)
        self._dtype, self.inputs, self._rows = joint.dtype, joint.shape[1], fp32_rows()
        self.panels_NCW = self._onednn = None
        self.library = native.linear_library() if self._dtype == torch.float32 else None
        if self.library is not None:
            self.panels_NCW = _panels(joint, self.library.panel)
        else:
            self._onednn = torch.ops.mkldnn._reorder_linear_weight(joint.contiguous(), _ONEDNN_ROWS_HINT)
        self._marks = [_Mark(layer.weight, layer.bias) for layer in self._layers]
        self.has_bias = any(layer.bias is not None for layer in self._layers)

    def _remade(self) -> bool:
        """The weights have changed: copy them again, or do without where this is no longer the place for it."""
        weights = [layer.weight for layer in self._layers]
        if len({weight.dtype for weight in weights}) > 1 or not all(map(self.helps, weights)):
            for layer in self._layers:
                layer.packed = None
            return False
        self._make()
        return self._dtype == weights[0].dtype

    def __reduce__(self):
        return _nothing, ()


class _Mark:
    """What tells that a weight is still the one that was copied."""

    __slots__ = ("_bias", "_pointer", "_probe", "_values", "_version", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self._weight, self._version, self._pointer = weight, weight._version, weight.data_ptr()
        self._bias = bias
        probe = weight.detach()[len(weight) // 2, :_PROBES]  # side by side: a single access to memory
        # Seen through numpy, which is quicker than any operation of torch: this is asked for every layer of every step.
        self._probe = probe.view(torch.uint8).numpy()
        self._values = self._probe.tobytes()

    def holds(self, weight: Tensor | None, bias: Tensor | None) -> bool:
        """Neither another tensor, nor written, nor given other memory, nor edited behind torch's back; a bias is where it was."""
        return (
            weight is self._weight
            and bias is self._bias
            and weight._version == self._version
            and weight.data_ptr() == self._pointer
            and self._probe.tobytes() == self._values
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in x's shape and dtype."""
    library = few_rows(x, x.numel() // weight.shape[0])
    if library is None or not (weight.dtype == torch.float32 and type(weight) in _PLAIN and weight.is_contiguous()):
        return F.rms_norm(x, weight.shape, weight, eps)
    x, out, width = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format), weight.shape[0]
    library.rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // width, width, eps)
    return out


def few_rows(x: Tensor, rows: int) -> native.LinearLibrary | None:
    """The functions of linear_cpu.c, where they serve a tensor of so many rows."""
    others = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    few = rows <= FEW_ROWS and x.dtype == torch.float32 and x.device.type == "cpu"
    return native.linear_library() if few and not others else None


def fp32_rows() -> range:
    """Rows for which a copy in fp32 wins here."""
    return ONEDNN_ROWS if native.linear_library() is None else FP32_ROWS


def _panels(weight: Tensor, width: int) -> Tensor:
    """[outputs, C] -> [N, C, W]; the last panel is filled up with zeros."""
    outputs, inputs = weight.shape
    panels = native.huge_pages(weight.new_empty(-(-outputs // width), inputs, width))
    whole = outputs // width
    panels[:whole] = weight[: whole * width].view(whole, width, inputs).transpose(1, 2)
    if whole < len(panels):
        panels[whole].zero_()
        panels[whole, :, : outputs - whole * width] = weight[whole * width :].t()
    return panels


def _onednn_knows(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies in this dtype by instructions of its own; elsewhere oneDNN refuses to pack."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _nothing() -> None:
    """What a copied or unpickled model has in place of packed weights."""


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
        told, tells = None, _NOTHING
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


_NOTHING: tuple[int, ...] = (0, 0, 0, 0, 0)
"""What C is told where there is no adapter."""


def _told(hidden: Tensor, norm: nn.Module, projection: nn.Module) -> tuple[Tensor, tuple[int, ...]]:
    """Where an adapter's output goes, and what C needs to find it; weights of adapters are fp32 whatever the model's are."""
    gain, own = norm._parameters["weight"], projection._parameters
    weight, bias = own["weight"], own.get("bias")
    told = hidden.new_empty((*hidden.shape[:2], len(weight)))
    bias_at = 0 if bias is None else bias.data_ptr()
    return told, (gain.data_ptr(), weight.data_ptr(), bias_at, told.data_ptr(), len(weight))
