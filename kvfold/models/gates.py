"""The gates of DMC and DMS: where a layer's decisions come from, as data and as code.

A decision is read from a freed channel of k (DMC) or of q (DMS), or from an adapter on the residual stream (DMS). What a
decision does to keys and values is the views' business. All in fp32.
Letters: B rows, T tokens of this call, H query heads, K kv heads, G = H // K, D head dim, C model width.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvfold.layout.kvlayout import KVLayout
from kvfold.ops.gating import Gates, hard_alpha, soft_alpha
from kvfold.specs.base import TimeSpec

IMPORTANCE_FLOOR = 2.0**-7
"""Added to every importance: the epsilon of bf16, whatever the dtype, as the official inference has it."""
IMPORTANCE_OFFSET = 5.0
"""Added to the channel of q before the sigmoid that gives the importance."""
_MIX = 0x9E3779B97F4A7C15
"""An odd 64-bit number without structure (from the golden ratio) that keeps the layers' noise apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """Where the decisions of one method come from.

    Source: arXiv 2403.09636, section 3 (DMC); arXiv 2506.05345, section 3 (DMS).
    Differs: decisions are taken in fp32 (official: the model's dtype, or a kernel's rounding of it); DMS may read the
    token's own decision (`reads="own"`) instead of the next token's.
    """

    method: Literal["dmc", "dms"]
    """The method that the gates decide for."""
    source: Literal["channel", "adapter"] = "channel"
    """A freed channel, or a small module beside the layer (DMS alone)."""
    reads: Literal["own", "next"] = "own"
    """Which token's decision governs a token: its own, or that of the one after it (DMS; DMC's is always its own)."""
    per: Literal["head", "layer"] = "head"
    """Every KV head decides, or head 0 for all heads of its layer."""
    channel: int = -1
    """The freed channel."""
    scale: float = 1.0
    """Factor of the channels or of the adapter's output: the larger, the faster a gate learns beside other weights."""
    offset: float = 5.0
    """Subtracted from the scaled value, so that an untrained gate stays shut; calibration moves it."""
    tau: float = 0.1
    """Temperature of soft decisions in training."""
    bias: bool = False
    """The adapter has a bias for each head (always where the family's q, k, v have one)."""
    base_masked: bool = False
    """Trained as LoRA: what the base weights write into the freed channel is masked out; theirs stay as they are."""

    def __post_init__(self) -> None:
        if self.method == "dmc" and (self.source, self.reads) != ("channel", "own"):
            raise ValueError(f"gates of dmc from {self.source}, {self.reads}: DMC reads its own channel: give these up")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"gates: {name} '{getattr(self, name)}' is not known: use {' or '.join(known)}")
        if not self.tau > 0:
            raise ValueError(f"gates: tau {self.tau}: a temperature is above 0: write e.g. 0.1")

    @classmethod
    def official(cls, method: str) -> Self:
        """The published channel form, for a model that says nothing of its gates."""
        return cls(method="dmc") if method == "dmc" else cls(method="dms", reads="next", scale=100.0)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """From config.json; raises `ValueError` at a key that is not known."""
        unknown = sorted(set(values) - {one.name for one in fields(cls)})
        if unknown or "method" not in values:
            raise ValueError(
                f"gates: {f'unknown key {unknown[0]}' if unknown else 'no method'}: "
                "they were written by another version: fetch the checkpoint again"
            )
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


_CHOICES = {
    "method": ("dmc", "dms"),
    "source": ("channel", "adapter"),
    "reads": ("own", "next"),
    "per": ("head", "layer"),
}


class GateProjection(nn.Linear):
    """From the normed residual stream to one value a KV head. Starts at zero: a new adapter changes nothing."""

    def reset_parameters(self) -> None:
        """Zero weight and bias."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """In fp32 whatever the dtype, under autocast too: a decision is a threshold."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class GateRecord:
    """What gates said. No dataclass on purpose: FSDP2 puts a copy in the place of any that holds tensors with gradients,
    and what a layer took down there would be lost.
    """

    def __init__(self):
        self.decisions: dict[int, Tensor] = {}
        """Of each owner that has gates, [B, T, K]: hard, straight-through where soft."""
        self.probabilities: dict[int, Tensor] = {}
        """The same before they are made hard."""


@dataclass(kw_only=True, slots=True)
class GateCall:
    """How gates behave during one forward call, and what they said. Made anew for each call: modules hold nothing."""

    configs: tuple[GateConfig | None, ...]
    """The gates of each layer, a reader's those of its owner."""
    training: bool
    """Soft decisions with noise; else hard ones."""
    off: bool = False
    """Decide nothing."""
    factor: float | None = None
    """Of the freed channel in DMC's zero-out stage; None = 0 where gates decide."""
    freed: tuple[GateConfig | None, ...] = ()
    """The gates of each layer whose channel carries nothing but decisions: it stays zeroed where gates are off or another
    method rules. Empty where no channel does."""
    tells: bool = True
    """Take down what gates say."""
    noise_key: Tensor | None = None
    """int64 [B]; the noise is a function of a row's key and the layer. None = no noise."""
    said: GateRecord = field(default_factory=GateRecord)
    """What the gates of the call have said so far."""

    @property
    def kept_share(self) -> float | None:
        """Factor of a freed channel in this call; None where it is left alone."""
        if self.factor is not None:
            return self.factor
        return 0.0 if not self.off or self.freed else None

    def masks_base(self, layer: int) -> bool:
        """Whether what the base weights write into the freed channel is masked out in this layer."""
        config = self.configs[layer]
        return config is not None and config.base_masked and not self.off

    def noise(self, layer: int, shape: tuple[int, int, int], device: torch.device) -> Tensor | float:
        """Difference of two Gumbel draws for each decision [B, T, K], the same on any device and process."""
        if self.noise_key is None:
            return 0.0
        rows = []
        for key in self.noise_key.tolist():
            source = torch.Generator().manual_seed((key * _MIX + (layer + 1) * (_MIX >> 1)) % 2**63)
            uniform = torch.rand(shape[1:], generator=source, dtype=torch.float64).clamp_(1e-12, 1 - 1e-12)
            rows.append(torch.logit(uniform))
        return torch.stack(rows).float().to(device)


def gate_config(given: GateConfig | None, spec: TimeSpec) -> GateConfig | None:
    """The gates of an owner under a method; None where the method has none."""
    if spec.name not in _CHOICES["method"]:
        return None
    return given if given is not None and given.method == spec.name else GateConfig.official(spec.name)


def freed_configs(given: GateConfig | None, layout: KVLayout, *, channel_freed: bool) -> tuple[GateConfig | None, ...]:
    """The gates of each layer whose channel DMC has freed: all but those with a sliding window of their own, which it does not
    rule; empty where no channel is.
    """
    if not channel_freed or given is None or given.method != "dmc":
        return ()
    owners = (layout.owner_of(layer) for layer in range(layout.num_layers))
    return tuple(given if layout.layers[owner].window is None else None for owner in owners)


def gate_configs(given: GateConfig | None, layout: KVLayout) -> tuple[GateConfig | None, ...]:
    """`gate_config` of every layer's owner."""
    return tuple(gate_config(given, layout.time_of(layout.owner_of(layer))) for layer in range(layout.num_layers))


def decide(
    call: GateCall, layer: int, q_BTHD: Tensor, k_BTKD: Tensor | None, adapted_BTK: Tensor | None
) -> Gates | None:
    """The gates of one layer; None where its method has none. q and k as they stand before rotary positions, k None in a
    reader; `adapted_BTK` is the adapter's output.
    """
    config, off = call.configs[layer], call.off
    if config is None and call.freed:
        config, off = call.freed[layer], True
    if config is None:
        return None
    keep = _kept_channels(config, call, q_BTHD, k_BTKD)
    if off or k_BTKD is None:
        return Gates(**keep)
    logit = _logit(config, q_BTHD, k_BTKD, adapted_BTK)
    if call.training:
        noise = call.noise(layer, tuple(logit.shape), logit.device)
        if config.per == "layer" and isinstance(noise, Tensor):
            noise = noise[..., :1]
        alpha, log_stay = soft_alpha((logit + noise) / config.tau)
    else:
        alpha, log_stay = hard_alpha(logit)
    if call.tells:
        call.said.probabilities[layer] = alpha if call.training else (logit / config.tau).sigmoid()
        call.said.decisions[layer] = (alpha.detach() > 0.5) + (alpha - alpha.detach())
    weight = None
    if config.method == "dmc":
        grouped = q_BTHD[..., config.channel].float().unflatten(2, (k_BTKD.shape[2], -1))
        weight = (grouped.mean(dim=3) * config.scale + IMPORTANCE_OFFSET).sigmoid() + IMPORTANCE_FLOOR
    return Gates(alpha_BTK=alpha, log_stay_BTK=log_stay, weight_BTK=weight, from_next=config.reads == "next", **keep)


def _logit(config: GateConfig, q_BTHD: Tensor, k_BTKD: Tensor, adapted_BTK: Tensor | None) -> Tensor:
    """The decision before its sigmoid, fp32 [B, T, K]."""
    kv_heads = k_BTKD.shape[2]
    if adapted_BTK is None:
        source = k_BTKD if config.method == "dmc" else q_BTHD[:, :, :: q_BTHD.shape[2] // kv_heads]
        adapted_BTK = source[..., config.channel]
    logit = adapted_BTK.float() * config.scale - config.offset
    return logit if config.per == "head" else logit[..., :1].expand(-1, -1, kv_heads)


def _kept_channels(config: GateConfig, call: GateCall, q_BTHD: Tensor, k_BTKD: Tensor | None) -> dict[str, Tensor]:
    """Factors of the channels of q and k. DMC frees its channel in all heads of both, and of the readers' q; DMS that of
    the first query head of each of the owner's groups alone.
    """
    share = call.kept_share
    if config.source == "adapter" or share is None or (config.method == "dms" and k_BTKD is None):
        return {}
    q_keep = q_BTHD.new_ones(q_BTHD.shape[2:])
    if config.method == "dms":
        q_keep[:: q_BTHD.shape[2] // k_BTKD.shape[2], config.channel] = share
        return {"q_keep_HD": q_keep}
    q_keep[:, config.channel] = share
    if k_BTKD is None:
        return {"q_keep_HD": q_keep}
    k_keep = k_BTKD.new_ones(k_BTKD.shape[2:])
    k_keep[:, config.channel] = share
    return {"q_keep_HD": q_keep, "k_keep_KD": k_keep}
