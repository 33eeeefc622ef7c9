"""The parts of a decoder layer, for every family that families.py describes, and packing them for inference on a CPU. Attention
itself happens behind the seam: a layer hands q, k, v to a KV view and knows no cache.

Packed weights are copies in the form that is quick for a few rows. The weights themselves stay as they are, so saving,
training, adapters and edits see an ordinary model; a call with gradients enabled never uses a copy. The copies take as much
memory as the weights that they copy (the input embedding has none).
Letters: B rows, T tokens of this call, H query heads, K kv heads, D head dim, C model width.
"""

import os
import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN, SiLUActivation
from transformers.modeling_layers import GradientCheckpointingLayer

from kvfold.cache.views import KVView
from kvfold.methods.gates import GateConfig
from kvfold.models.config import FoldConfig
from kvfold.models.gates import GateCall, GateNorm, GateProjection, decide
from kvfold.ops.linear import PackableLinear, PackedFront, PackedTail, PackedWeights, project, rms_norm
from kvfold.ops.rotation import Rotation

Heads = tuple[Tensor, Tensor | None, Tensor | None]
"""q [B, T, H, D], and k and v [B, T, K, D], which a layer without keys of its own has not."""


class FoldRMSNorm(nn.Module):
    """RMS norm over the last dim; with an offset the gain is 1 + weight, computed in fp32.

    Differs: in bf16 a Llama norm rounds once, after the gain, where transformers rounds before it as well.
    """

    def __init__(self, size: int, config: FoldConfig):
        super().__init__()
        self.eps, self.offset = config.rms_norm_eps, config.norm_offset
        self.weight = nn.Parameter(torch.full((size,), 0.0 if self.offset else 1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as `x`."""
        if self.offset:
            return F.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), self.eps).type_as(x)
        return rms_norm(x, self.weight, self.eps)


class FoldAttention(nn.Module):
    """q (and in an owner k and v) of the call's tokens, the view's answer, and the output projection."""

    def __init__(self, config: FoldConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.norm_whole = layer, config.head_dim, config.qk_norm == "full"
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.layout.layers[layer].num_kv_heads * config.head_dim
        owner = config.layout.is_owner(layer)
        self.q_proj = PackableLinear(config.hidden_size, q_width, bias=config.qkv_bias)
        self.k_proj = PackableLinear(config.hidden_size, kv_width, bias=config.qkv_bias) if owner else None
        self.v_proj = PackableLinear(config.hidden_size, kv_width, bias=config.qkv_bias) if owner else None
        self.o_proj = PackableLinear(q_width, config.hidden_size, bias=config.o_bias)
        self.q_norm, self.k_norm = _head_norm(config, q_width), _head_norm(config, kv_width) if owner else None
        self.query_layernorm = self.key_layernorm = None
        if config.qk_norm == "rotated":
            self.query_layernorm = FoldRMSNorm(config.head_dim, config)
            self.key_layernorm = FoldRMSNorm(config.head_dim, config)
        self.kv_norm = FoldRMSNorm(config.hidden_size, config) if config.kv_norm and owner else None
        self.fold_norm: GateNorm | None = None
        self.fold_proj: GateProjection | None = None
        if owner and config.gates is not None:
            self.add_adapter(config.gate_config, config)

    def add_adapter(self, gates: GateConfig, config: FoldConfig) -> None:
        """Give an owner the modules of its gate, where that is an adapter; a new one never fires."""
        fresh = new_adapter(gates, config, self.layer) if gates.source == "adapter" else (None, None)
        self.fold_norm, self.fold_proj = fresh

    def forward(
        self, normed_BTC: Tensor | None, hidden_BTC: Tensor, view: KVView, rotation: Rotation | None, call: GateCall | None,
        project_out: bool = True, ready: tuple[Tensor | None, ...] | None = None,
    ) -> Tensor:  # fmt: skip
        """`normed_BTC` is the layer's input as the block takes it, `hidden_BTC` the residual stream itself; `ready` in place of
        the former: q, k and v of all heads, and what the adapter gives. Without `project_out` what all query heads found,
        [B, T, H * D].
        """
        q, k, v = self._projected(normed_BTC, hidden_BTC, call) if ready is None else ready[:3]
        gates = None
        if call is not None:
            adapter = self.adapter(call)
            told = ready[3] if ready is not None else None if adapter is None else adapter[1](adapter[0](hidden_BTC))
            gates = decide(call, self.layer, q, k, told, None if adapter is None else adapter[1].heads)
        rotation = rotation if self.query_layernorm is None else self._with_gain(rotation)
        attended = view.attend(self.layer, q, k, v, rotation, gates).flatten(2)
        return self.o_proj(attended) if project_out else attended

    def _projected(self, normed_BTC: Tensor, hidden_BTC: Tensor, call: GateCall | None) -> Heads:
        """q, k and v of all heads, before they are rotated."""
        source = normed_BTC if self.kv_norm is None else self.kv_norm(hidden_BTC)
        if self.kv_norm is None and self.k_proj is not None:
            q, k, v = project(normed_BTC, self.q_proj, self.k_proj, self.v_proj)
        else:
            q = self.q_proj(normed_BTC)
            k, v = (None, None) if self.k_proj is None else project(source, self.k_proj, self.v_proj)
        if call is not None and not call.off and call.table.masked[self.layer] is not None:
            q, k = self._masked(q, k, normed_BTC, source, call.table.masked[self.layer])
        return self._heads(q, self.q_norm), self._heads(k, self.k_norm), self._heads(v, None)

    def adapter(self, call: GateCall | None) -> tuple[nn.Module, nn.Module] | None:
        """Norm and projection that decide here in a call, of the model's own gates or of those that came with the call."""
        own, config = self._modules, None if call is None or call.off else call.table.configs[self.layer]
        if config is None or config.source != "adapter" or own.get("k_proj") is None:
            return None
        return (own["fold_norm"], own["fold_proj"]) if call.gate_set is None else call.gate_set.adapter(self.layer)

    def _with_gain(self, rotation: Rotation | None) -> Rotation | None:
        """For norms behind the rotation, q and k come here without their gains: a rotation keeps a head's size, so that this
        much of a norm may stand before it. Since q . (w * k) = (q * w) . k, both gains go to the rotated query, and layers with
        gains of their own can read one cache.

        Source: arXiv 2411.02265 (Hunyuan-Large) norms rotated keys in every layer of a group, with that layer's gain.
        Differs: the norm is taken once, before the keys are stored.
        """
        if rotation is None:
            return rotation
        return replace(rotation, query_gain_D=self.query_layernorm.weight * self.key_layernorm.weight)

    def _masked(
        self, q: Tensor, k: Tensor | None, normed_BTC: Tensor, source_BTC: Tensor, channel: int
    ) -> tuple[Tensor, Tensor | None]:
        """q and k; channel `channel` of each head is what a low-rank addition gives alone, without the base weights."""
        found = []
        for out, projection, x in ((q, self.q_proj, normed_BTC), (k, self.k_proj, source_BTC)):
            if out is not None:
                heads = torch.arange(out.shape[-1] // self.head_dim, device=x.device)
                rows = heads * self.head_dim + channel % self.head_dim
                out = out.index_copy(-1, rows, _low_rank(projection, x, rows).to(out.dtype))
            found.append(out)
        return found[0], found[1]

    def _heads(self, x: Tensor | None, norm: nn.Module | None) -> Tensor | None:
        """[B, T, heads * D] -> [B, T, heads, D], normed over all heads or over each; None (of a reader) stays None."""
        if x is None:
            return None
        if norm is not None and self.norm_whole:
            x = norm(x)
        x = x.view(*x.shape[:2], -1, self.head_dim)
        return x if norm is None or self.norm_whole else norm(x)


def new_adapter(gates: GateConfig, config: FoldConfig, layer: int) -> tuple[GateNorm, GateProjection]:
    """The modules of one owner's gate; new ones never fire."""
    heads, form = config.layout.layers[layer].num_kv_heads, gates.form
    norm = GateNorm(config.hidden_size, config.rms_norm_eps, offset=config.norm_offset)
    return norm, GateProjection(
        config.hidden_size, heads * form.outputs, bias=gates.bias or config.qkv_bias, heads=heads,
        head_numbers=form.head_numbers,
    )  # fmt: skip


def _head_norm(config: FoldConfig, width: int) -> nn.Module | None:
    """What norms the heads of q or k, `width` channels in all, before they are rotated."""
    if config.qk_norm == "none":
        return None
    if config.qk_norm == "rotated":
        return nn.RMSNorm(config.head_dim, config.rms_norm_eps, elementwise_affine=False)
    return FoldRMSNorm(width if config.qk_norm == "full" else config.head_dim, config)


def _low_rank(projection: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
    """Some rows of what peft's additions to a projection give, [..., rows]; 0 where it has none.

    In fp32, and not as the difference of two large numbers: a gate multiplies it, and decides by a threshold.
    """
    found = x.new_zeros((*x.shape[:-1], rows.numel()), dtype=torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        for name in getattr(projection, "active_adapters", ()):
            down, up = projection.lora_A[name].weight, projection.lora_B[name].weight
            inner = F.linear(x.float(), down.float())
            found = found + F.linear(inner, up[rows].float()) * projection.scaling[name]
    return found


class FoldMLP(nn.Module):
    """The gated feed-forward block."""

    def __init__(self, config: FoldConfig):
        super().__init__()
        self.gate_proj = PackableLinear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = PackableLinear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = PackableLinear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Same shape as its input."""
        gate, up = project(x_BTC, self.gate_proj, self.up_proj)
        inner = self.act(gate)
        # Of a long prompt these are the largest tensors that there are: where no gradient needs the factors, no third is made.
        return self.down_proj(inner * up if torch.is_grad_enabled() else inner.mul_(up))


class FoldLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each added to the residual stream; the norms stand where the family has them."""

    front: PackedFront | None = None
    tail: PackedTail | None = None

    def __init__(self, config: FoldConfig, layer: int):
        super().__init__()
        self.placement, self.residual_multiplier = config.norm_placement, config.residual_multiplier
        self.self_attn, self.mlp = FoldAttention(config, layer), FoldMLP(config)
        for name in _NORMS[config.norm_placement]:
            setattr(self, name, FoldRMSNorm(config.hidden_size, config))

    def forward(
        self, hidden_BTC: Tensor, view: KVView, rotation: Rotation | None, call: GateCall | None = None
    ) -> Tensor:
        """The residual stream after this layer."""
        h = hidden_BTC
        if self.tail is not None and self.tail.serves(self._tail_modules(), h):
            if self._front_serves(h, rotation, call):
                ready = self.front(h, rotation, self.self_attn.adapter(call))
                return self.tail(self.self_attn(None, h, view, None, call, project_out=False, ready=ready), h)
            return self.tail(self.self_attn(self.input_layernorm(h), h, view, rotation, call, project_out=False), h)
        if self.placement == "pre":
            h = self._add(h, self.self_attn(self.input_layernorm(h), h, view, rotation, call))
            return self._add(h, self.mlp(self.post_attention_layernorm(h)))
        sandwich = self.placement == "sandwich"
        attended = self.self_attn(self.input_layernorm(h) if sandwich else h, h, view, rotation, call)
        h = self._add(h, self.post_attention_layernorm(attended))
        x = self.pre_feedforward_layernorm(h) if sandwich else h
        return self._add(h, self.post_feedforward_layernorm(self.mlp(x)))

    def _front_serves(self, hidden_BTC: Tensor, rotation: Rotation | None, call: GateCall | None) -> bool:
        """Whether q, k and v come from one function, rotated: not where gates want to see them as they were."""
        front = self.front
        return (
            front is not None and front.turns(rotation) and front.serves(self._front_modules(), hidden_BTC)
            and (call is None or not call.sees_heads(self.self_attn.layer))
            and front.tells(self.self_attn.adapter(call))
        )  # fmt: skip

    def new_front(self) -> PackedFront | None:
        """All before attention as one function; None where the layer has another form, or is not packed."""
        attention, norm = self.self_attn, getattr(self, "input_layernorm", None)
        linear = [one for one in (attention.q_proj, attention.k_proj, attention.v_proj) if one is not None]
        packed = {getattr(one, "packed", None) for one in linear}
        norms = (attention.q_norm, attention.query_layernorm, attention.kv_norm)
        if self.placement != "pre" or norm.offset or any(one is not None for one in norms):
            return None
        if len(packed) != 1 or not PackedFront.reads(packed):
            return None
        return PackedFront(self._front_modules(), norm, norm.eps, attention.head_dim)

    def _front_modules(self) -> tuple[nn.Module, ...]:
        own = self._modules
        inner = own["self_attn"]._modules
        projections = ("q_proj", "k_proj", "v_proj") if inner.get("k_proj") is not None else ("q_proj",)
        return (*[inner[name] for name in projections], own.get("input_layernorm"), own["self_attn"])

    def new_tail(self) -> PackedTail | None:
        """All behind attention as one function; None where the layer has another form, or is not packed."""
        mlp, norm = self.mlp, getattr(self, "post_attention_layernorm", None)
        packed = {getattr(one, "packed", None) for one in self._tail_modules()[:4]}
        if self.placement != "pre" or norm.offset or len(packed) != 3 or not PackedTail.reads(packed):
            return None
        if not isinstance(mlp.act, nn.SiLU | SiLUActivation):
            return None
        return PackedTail(self._tail_modules(), norm, norm.eps, self.residual_multiplier)

    def _tail_modules(self) -> tuple[nn.Module, ...]:
        """Not by attributes, which are slow to find in a module."""
        own = self._modules
        attention, norm, mlp = own["self_attn"], own.get("post_attention_layernorm"), own["mlp"]
        inner = mlp._modules
        return (
            attention._modules["o_proj"], inner["gate_proj"], inner["up_proj"], inner["down_proj"], inner["act"],
            attention, norm, mlp,
        )  # fmt: skip

    def _add(self, hidden: Tensor, block: Tensor) -> Tensor:
        return hidden + block if self.residual_multiplier == 1.0 else hidden + block * self.residual_multiplier


_NORMS = {
    "pre": ("input_layernorm", "post_attention_layernorm"),
    "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "sandwich": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
}  # fmt: skip
"""transformers' names of a layer's norms, by where they stand."""


MEMORY_SHARE = 4
"""Without being asked, copies take at most one part in so many of the machine's memory."""
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that share their input. k and v of a layer with a KV norm of its own do not share q's."""


def pack(model: nn.Module, *, rows: int | None = None, force: bool = False) -> int:
    """Pack every linear layer that gains by it; gives the bytes of all copies. Layers that are packed already stay so.

    `rows`: how many rows a decoding step will have, where that is known; at one or two, fp32 gains nothing. Nothing happens on
    a device or for a dtype that has no quicker form. Unless forced, a model whose copies would take more than a quarter of
    the machine's memory stays as it is, with a warning.
    """
    groups = [group for group in _groups(model) if all(PackedWeights.helps(layer.weight, rows) for layer in group)]
    missing = [group for group in groups if group[0].packed is None]
    needed = sum(layer.weight.nbytes for group in missing for layer in group)
    if not force and needed > _machine_bytes() // MEMORY_SHARE:
        warnings.warn(
            f"packed weights would take {needed / 1e9:.1f} GB more, over a quarter of this machine's memory: decoding runs on "
            "the plain ones; kvfold.models.blocks.pack(model, force=True) packs them all the same",
            stacklevel=2,
        )
        return packed_bytes(model)
    for group in missing:
        copy = PackedWeights(group)
        for layer in group:
            layer.packed = copy
    for layer in model.modules():
        if isinstance(layer, FoldLayer):
            layer.front, layer.tail = layer.new_front(), layer.new_tail()
    return packed_bytes(model)


def unpack(model: nn.Module) -> None:
    """Give the copies' memory back."""
    for module in model.modules():
        if isinstance(module, PackableLinear):
            module.packed = None
        if isinstance(module, FoldLayer):
            module.front = module.tail = None


def packed_bytes(model: nn.Module) -> int:
    """Bytes of a model's packed copies, on top of its weights."""
    copies = {id(module.packed): module.packed for module in model.modules() if isinstance(module, PackableLinear)}
    return sum(copy.num_bytes for copy in copies.values() if copy is not None)


def _groups(model: nn.Module) -> Iterator[tuple[PackableLinear, ...]]:
    """Layers to be packed together; each layer is in one group."""
    for module in model.modules():
        children = {name: child for name, child in module.named_children() if isinstance(child, PackableLinear)}
        for names in _TOGETHER:
            if set(names) <= children.keys() and getattr(module, "kv_norm", None) is None:
                yield tuple(children.pop(name) for name in names)
        for child in children.values():
            yield (child,)


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
