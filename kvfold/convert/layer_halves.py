"""Running one half of a layer, attention or feed-forward, through the model's own modules, and watching what goes by.

Letters: B rows, T tokens, C model width, I inputs of a half's last projection.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from kvfold.cache.views import KVView
from kvfold.models.config import FoldConfig
from kvfold.ops.rotation import Rotation

_MIDDLE = {"pre": "post_attention_layernorm", "post": "mlp", "sandwich": "pre_feedforward_layernorm"}
"""The module whose input is the residual stream between attention and feed-forward, by where the norms stand."""
_FEED_NORM = {"pre": "post_attention_layernorm", "post": None, "sandwich": "pre_feedforward_layernorm"}
"""The norm before the feed-forward block."""
_TINY = 1e-6
"""A gain below this share of the largest lets nothing through, so nothing is asked of what stands before it."""


class _ReachedError(Exception):
    """The module that was waited for is about to run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Half:
    """One half of a layer at work."""

    inputs: Tensor
    """What its last projection takes, [B, T, I]."""
    raw: Tensor
    """What that projection gives, [B, T, C]."""
    stream: Tensor
    """The residual stream behind the half, [B, T, C]."""

    def goal(self) -> Self:
        """The same without the inputs, which are large and which a target has no use for."""
        return replace(self, inputs=self.inputs.new_empty(0))


def run_until(
    module: nn.Module, run: Callable[[], object], watched: Mapping[str, nn.Module]
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Call `run` until `module` is about to run. Gives what that would have taken, and of each watched module what it
    took and gave.
    """
    taken: list[Tensor] = []
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        taken.append(args[0])
        raise _ReachedError

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = args[0], output

        return hook

    hooks = [one.register_forward_hook(note(name)) for name, one in watched.items()]
    hooks.append(module.register_forward_pre_hook(stop))
    try:
        run()
    except _ReachedError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return taken[0], seen


def attention_half(
    config: FoldConfig, layer: nn.Module, hidden_BTC: Tensor, view: KVView, rotation: Rotation | None
) -> Half:
    """The layer's attention on its residual stream."""
    middle = getattr(layer, _MIDDLE[config.norm_placement])
    stream, seen = run_until(middle, lambda: layer(hidden_BTC, view, rotation), {"o_proj": layer.self_attn.o_proj})
    return Half(inputs=seen["o_proj"][0], raw=seen["o_proj"][1], stream=stream)


def feed_half(config: FoldConfig, layer: nn.Module, middle_BTC: Tensor) -> Half:
    """The layer's feed-forward block on the residual stream behind its attention."""
    name, projection = _FEED_NORM[config.norm_placement], layer.mlp.down_proj
    normed = middle_BTC if name is None else getattr(layer, name)(middle_BTC)
    inputs, _ = run_until(projection, lambda: layer.mlp(normed), {})
    raw = projection(inputs)
    return Half(inputs=inputs, raw=raw, stream=stream_behind(config, layer, projection, middle_BTC, raw))


def stream_behind(
    config: FoldConfig, layer: nn.Module, projection: nn.Module, before_BTC: Tensor, raw_BTC: Tensor
) -> Tensor:
    """The residual stream behind the block that ends in `projection`, where that gave `raw`."""
    norm = _output_norm(config, layer, projection)
    return before_BTC + (raw_BTC if norm is None else norm(raw_BTC)) * config.residual_multiplier


def wanted_raw(
    config: FoldConfig, layer: nn.Module, projection: nn.Module, change_BTC: Tensor, original_raw_BTC: Tensor
) -> Tensor:
    """What `projection` should give so that its block moves the residual stream by `change`. A norm behind it takes no
    notice of the size, so the original's is asked for.
    """
    norm, change = _output_norm(config, layer, projection), change_BTC / config.residual_multiplier
    if norm is None:
        return change
    gain = norm.weight + 1.0 if norm.offset else norm.weight
    usable = gain.abs() > _TINY * gain.abs().max()
    size = original_raw_BTC.square().mean(dim=-1, keepdim=True).add(norm.eps).sqrt()
    return torch.where(usable, change / torch.where(usable, gain, 1.0) * size, original_raw_BTC)


def _output_norm(config: FoldConfig, layer: nn.Module, projection: nn.Module) -> nn.Module | None:
    """The norm through which a block's output reaches the residual stream."""
    if config.norm_placement == "pre":
        return None
    ends_attention = projection is layer.self_attn.o_proj
    return layer.post_attention_layernorm if ends_attention else layer.post_feedforward_layernorm
