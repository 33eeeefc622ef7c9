"""How the gates of a learned method decide: from a freed channel of k or q, or from a small adapter on the residual stream; what
a call asks of them and gets to know; and what a model with gates offers.

Which token a decision governs and what it does to keys and values is the method's business (methods/), what the gates look
like in one model stands in methods/gates.py. All in fp32, whatever the model's dtype: a decision is a threshold.
Letters: B rows, T tokens of this call, H query heads, K kv heads, G = H // K, D head dim, C model width, F outputs a head.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from kvfold.errors import UserError
from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.gates import GateConfig
from kvfold.ops.gating import STAY_NEVER, Gates
from kvfold.ops.linear import rms_norm

IMPORTANCE_FLOOR = 2.0**-7
"""Added to every importance: the epsilon of bf16, whatever the dtype, as the official inference has it."""
IMPORTANCE_OFFSET = 5.0
"""Added to the channel of q before the sigmoid that gives the importance."""
_MIX = 0x9E3779B97F4A7C15
"""An odd 64-bit number without structure (from the golden ratio) that keeps the layers' noise apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallOptions:
    """Given as `model(ids, options=CallOptions(...))`, and through `generate` likewise."""

    gates: Literal["on", "off"] = "on"
    """`off`: nothing is merged or evicted by a learned method, and no channel is zeroed unless the config says
    `channel_freed`."""
    channel_factor: float | None = None
    """Gates are off, and the freed channel is multiplied by this before and after rotary positions.

    Source: arXiv 2403.09636, section 3.3 (the first stage of the official recipe).
    Differs: none.
    """
    sharing: KVLayout | None = None
    """Read keys and values as this layout says, without a cache: the result of the model converted to it with `drop`. Its
    owners are owners in the model, too; what its readers would store is worked out and not used."""

    def __post_init__(self) -> None:
        if self.gates not in ("on", "off"):
            raise UserError(f"gates '{self.gates}': a call has its gates on or off: write one of the two")


PLAIN = CallOptions()
"""Of a call that asks for nothing."""


class _InFloat32(nn.Module):
    """Weights that stay in fp32 when the model around them is moved to another dtype: rounding would move thresholds."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_InFloat32":
        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(kept, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # `assign=True` would take over the dtype that a file has.
        for name, weight in self.named_parameters():
            if (found := state_dict.get(prefix + name)) is not None:
                state_dict[prefix + name] = found.to(weight.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)


class GateNorm(_InFloat32):
    """RMS norm of the residual stream before a gate's projection, with a gain of its own."""

    def __init__(self, size: int, eps: float, *, offset: bool):
        """`offset`: the gain is 1 + weight, as the family's own norms have it."""
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((size,), 0.0 if offset else 1.0, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """fp32, same shape."""
        return rms_norm(x.float(), 1.0 + self.weight if self.offset else self.weight, self.eps)


class GateProjection(_InFloat32):
    """From the normed residual stream to one value (or several) a KV head. Starts at zero: a new adapter changes nothing."""

    def __init__(
        self, width: int, outputs: int, *, bias: bool, heads: int = 0, head_numbers: tuple[float, ...] = ()
    ) -> None:
        """`head_numbers`: what each of `heads` KV heads holds beside the projection, as a new adapter has them."""
        super().__init__()
        self.first_numbers = head_numbers
        self.weight = nn.Parameter(torch.zeros((outputs, width), dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=torch.float32)) if bias else None
        self.heads = None
        if head_numbers:
            self.heads = nn.Parameter(torch.tensor(head_numbers, dtype=torch.float32).repeat(heads, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, outputs], under autocast too in fp32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight, self.bias)


class GateSet(nn.Module):
    """Gates beside a model that are not its own: given to a cache, they decide for what that cache keeps."""

    def __init__(self, name: str, config: GateConfig, modules: dict[int, tuple[GateNorm, GateProjection]]):
        """`modules`: of each owner whose gate is an adapter."""
        super().__init__()
        self.name, self.config = name, config
        self.layers = nn.ModuleDict({str(owner): nn.ModuleList(pair) for owner, pair in modules.items()})

    def adapter(self, layer: int) -> tuple[GateNorm, GateProjection] | None:
        """Norm and projection of an owner; None where there is none."""
        return tuple(self.layers[str(layer)]) if str(layer) in self.layers else None


class GateRecord:
    """What gates decided. No dataclass on purpose: FSDP2 puts a copy in the place of any that holds tensors with gradients,
    and what a layer took down there would be lost.
    """

    def __init__(self) -> None:
        self.decisions: dict[int, Tensor] = {}
        """Of each owner that has gates, [B, T, K]: hard, straight-through where soft."""
        self.probabilities: dict[int, Tensor] = {}
        """The same before they are made hard."""

    def fields(self, owners: tuple[int, ...]) -> dict[str, tuple[Tensor | None, ...]]:
        """Those of `FoldOutput` that say what gates decided."""
        found = {"decisions": self.decisions, "gate_probs": self.probabilities}
        return {
            name: tuple(of[one].transpose(1, 2) if one in of else None for one in owners) for name, of in found.items()
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class GateTable:
    """The gates of every layer under one layout: worked out once for a cache, or for all training calls."""

    configs: tuple[GateConfig | None, ...]
    """Of each layer, a reader's those of its owner; None where nothing is learned."""
    freed: tuple[GateConfig | None, ...]
    """Of each layer whose channel carries nothing but decisions: it stays zeroed where gates are off or another method rules.
    Empty where no channel does."""
    merging: tuple[bool, ...] = ()
    """Of each layer, whether its method merges keys, which it does before they are rotated; empty = none does."""

    is_empty: bool = field(init=False, repr=False, compare=False)
    """Whether no layer has anything to do with gates, or needs its keys as they were before rotary positions."""
    masked: tuple[int | None, ...] = field(init=False, repr=False, compare=False)
    """Of each layer, the channel in which what the base weights write is masked out; None = none."""

    def __post_init__(self) -> None:
        # Once, not once a call.
        object.__setattr__(self, "is_empty", not any(self.configs) and not self.freed and not any(self.merging))
        masked = tuple(one.channel if one is not None and one.base_masked else None for one in self.configs)
        object.__setattr__(self, "masked", masked)


@lru_cache(maxsize=64)
def gate_table(given: GateConfig | None, layout: KVLayout, *, freed_owners: tuple[int, ...]) -> GateTable:
    """The gates of a layout's layers, all of which come from `given`. `freed_owners`: those in whose groups the decision
    channel was written out of the weights.

    Raises `UserError` for a learned method that `given` does not decide for.
    """
    owners = [layout.owner_of(layer) for layer in range(layout.num_layers)]
    configs = tuple(layout.time_of(owner).gates_among(given) for owner in owners)
    freed: tuple[GateConfig | None, ...] = ()
    if freed_owners and given is not None and given.form.zero_out:
        freed = tuple(given if owner in freed_owners else None for owner in owners)
    merging = tuple(layout.time_of(owner).places_at_layer for owner in owners)
    return GateTable(configs=configs, freed=freed, merging=merging)


@dataclass(slots=True)
class GateCall:
    """How gates behave during one forward call, and what they decided. Made anew for each call: modules hold nothing."""

    table: GateTable
    training: bool
    """Soft decisions with noise; else hard ones."""
    options: CallOptions = PLAIN
    """What the call asks for."""
    noise_key: Tensor | None = None
    """int64 [B]; the noise is a function of a row's key and the layer. None = no noise."""
    record: GateRecord | None = None
    """Takes down what the gates of the call decide; None = nobody asked."""
    gate_set: GateSet | None = None
    """Where decisions come from if not from the model's own gates."""
    off: bool = field(init=False)
    """Decide nothing."""

    def __post_init__(self) -> None:
        self.off = self.options.gates == "off" or self.options.channel_factor is not None

    def sees_heads(self, layer: int) -> bool:
        """Whether what a layer's gates or its method do depends on its q or k before they are rotated."""
        config = self.table.configs[layer]
        if self.table.merging and self.table.merging[layer]:
            return True
        if config is None:
            return bool(self.table.freed)
        return config.source != "adapter" or config.form.with_weights

    def soft(self, layer: int, logit_BTK: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and log(1 - alpha) of a decision in training: under noise the difference of two Gumbel draws, the same on any
        device and process, is added to its logit.
        """
        config, shape, rows = self.table.configs[layer], logit_BTK.shape[1:], []
        if self.noise_key is not None:
            for key in self.noise_key.tolist():
                source = torch.Generator().manual_seed((key * _MIX + (layer + 1) * (_MIX >> 1)) % 2**63)
                uniform = torch.rand(shape, generator=source, dtype=torch.float64).clamp_(1e-12, 1 - 1e-12)
                rows.append(torch.logit(uniform))
            noise = torch.stack(rows).float().to(logit_BTK.device)
            logit_BTK = logit_BTK + (noise if config.per == "head" else noise[..., :1])
        soft = logit_BTK / config.tau
        return soft.sigmoid(), F.logsigmoid(-soft)


def decide(
    call: GateCall, layer: int, q_BTHD: Tensor, k_BTKD: Tensor | None, adapted_BTX: Tensor | None, heads_KP: Tensor | None = None,
) -> Gates | None:  # fmt: skip
    """The gates of one layer; None where its method has none. q and k as they stand before rotary positions, k None in a
    reader; `adapted_BTX` is the adapter's output, F numbers for each KV head; `heads_KP` what it holds for each head.
    """
    config, off = call.table.configs[layer], call.off
    if config is None and call.table.freed:
        config, off = call.table.freed[layer], True
    if config is None:
        return None
    more = {} if config.source == "adapter" else _kept_channels(config, call, q_BTHD, k_BTKD)
    if off or k_BTKD is None:
        return Gates(**more)
    value = adapted_BTX
    if value is None:
        value, more["weight_BTK"] = _freed_channel(config, q_BTHD, k_BTKD)
    elif config.form.outputs > 1:
        value, more["outputs_BTKF"] = value.unflatten(2, (k_BTKD.shape[2], -1)).tensor_split([1], dim=-1)
        value = value[..., 0]
    logit = value.float() * config.scale - config.offset
    if config.per == "layer":
        logit = logit[..., :1].expand(-1, -1, k_BTKD.shape[2])
    hard = (logit > 0).float()
    alpha, log_stay = call.soft(layer, logit) if call.training else (hard, hard * STAY_NEVER)
    if call.record is not None:
        call.record.probabilities[layer] = alpha if call.training else (logit / config.tau).sigmoid()
        call.record.decisions[layer] = (alpha.detach() > 0.5) + (alpha - alpha.detach())
    return Gates(alpha_BTK=alpha, log_stay_BTK=log_stay, from_next=config.reads == "next", heads_KP=heads_KP, **more)


def _freed_channel(config: GateConfig, q_BTHD: Tensor, k_BTKD: Tensor) -> tuple[Tensor, Tensor | None]:
    """[B, T, K]: the freed channel of the keys, or of the first query head of each group; and each token's importance in a
    merge, fp32, from the channel of q, where the method knows such.
    """
    heads = k_BTKD.shape[2]
    source = k_BTKD if config.form.channel_of == "key" else q_BTHD[:, :, :: q_BTHD.shape[2] // heads]
    if not config.form.with_weights:
        return source[..., config.channel], None
    grouped = q_BTHD[..., config.channel].float().unflatten(2, (heads, -1)).mean(dim=3)
    return source[..., config.channel], (grouped * config.scale + IMPORTANCE_OFFSET).sigmoid() + IMPORTANCE_FLOOR


def _kept_channels(config: GateConfig, call: GateCall, q_BTHD: Tensor, k_BTKD: Tensor | None) -> dict[str, Tensor]:
    """Factors of the channels of q and k: 0 (or the zero-out stage's factor) where a channel was freed. One that is freed in
    keys is so in the readers' queries too.
    """
    share, first = call.options.channel_factor, config.form.frees == "first query"
    if share is None and (not call.off or call.table.freed):
        share = 0.0
    if share is None or (first and k_BTKD is None):
        return {}
    q_keep = q_BTHD.new_ones(q_BTHD.shape[2:])
    q_keep[:: q_BTHD.shape[2] // k_BTKD.shape[2] if first else 1, config.channel] = share
    if first or k_BTKD is None:
        return {"q_keep_HD": q_keep}
    k_keep = k_BTKD.new_ones(k_BTKD.shape[2:])
    k_keep[:, config.channel] = share
    return {"q_keep_HD": q_keep, "k_keep_KD": k_keep}


@dataclass
class FoldOutput(BaseModelOutputWithPast):
    """What the decoder returns, with what its gates decided where that was asked for."""

    decisions: tuple[Tensor | None, ...] | None = None
    """[B, K, T] of each owner, ascending, None where an owner has no gates: 1 = merge or mark; fp32, and in training
    straight-through on the noisy probability."""
    gate_probs: tuple[Tensor | None, ...] | None = None
    """The probabilities that were rounded to the decisions, same shapes."""


@dataclass
class FoldCausalLMOutput(CausalLMOutputWithPast):
    """What the language model returns; see `FoldOutput`."""

    decisions: tuple[Tensor | None, ...] | None = None
    gate_probs: tuple[Tensor | None, ...] | None = None


def joined(parts: list[FoldOutput]) -> FoldOutput:
    """The outputs of a call's pieces, side by side."""
    if len(parts) == 1:
        return parts[0]
    whole = FoldOutput(past_key_values=parts[-1].past_key_values)
    whole.last_hidden_state = torch.cat([part.last_hidden_state for part in parts], dim=1)
    for name, dim in (("hidden_states", 1), ("decisions", 2), ("gate_probs", 2)):
        columns = [getattr(part, name) for part in parts]
        if columns[0] is not None:
            found = zip(*columns, strict=True)
            setattr(whole, name, tuple(None if x[0] is None else torch.cat(x, dim=dim) for x in found))
    return whole


class GatedModel:
    """Mixed into the language model."""

    config: Any
    model: Any
    device: torch.device

    def set_gates(self, gates: GateConfig, time: str) -> None:
        """Put this model under a learned method: its text form, its gates, and fresh adapters where the gates are such."""
        self.config.layout = self.config.layout.with_time(time)
        self.config.gates = gates.to_json()
        # Refuses gates of another method.
        gate_table(gates, self.config.layout, freed_owners=self.config.freed_owners)
        for layer in self.model.layers:
            if layer.self_attn.k_proj is not None:
                layer.self_attn.add_adapter(gates, self.config)
                layer.self_attn.to(device=self.device)

    @torch.no_grad()
    def free_channel(self, *, write: bool = True) -> None:
        """Write DMC's zero-out into the weights: the rows of q and k, biases too, that make the freed channel become 0, in all
        layers that DMC rules. `write=False`: the weights have it already, and the config is to say so.

        Source: arXiv 2403.09636, section 3.3 (the end of the first stage).
        Differs: bias entries go with their rows; the official code knows none. Nor does it know norms on q and k: where a family
        has them, the size by which a head is divided loses this channel here at once, and not step by step.
        """
        config, layout = self.config, self.config.layout
        channel = config.gate_config.channel
        gated = [owner for owner in layout.owners if layout.time_of(owner).trained]
        config.channel_freed, config.freed_layers = True, None
        if tuple(gated) != config.freed_owners:
            config.freed_layers = gated
        for index, layer in enumerate(self.model.layers):
            freed = (
                (layer.self_attn.q_proj, layer.self_attn.k_proj) if write and layout.owner_of(index) in gated else ()
            )
            for weight in (weight for one in freed if one is not None for weight in (one.weight, one.bias)):
                if weight is not None:
                    weight.unflatten(0, (-1, config.head_dim))[:, channel] = 0
