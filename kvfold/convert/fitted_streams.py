"""Both models' residual streams at the border of one layer, for all calibration text: all that fitting keeps in memory. A half of
a layer, attention or feed-forward, is run through the model's own modules, and what goes by is watched.

Letters: W windows, B windows of one batch, T tokens, C model width, D head dim, I inputs of a half's last projection.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from kvfold.cache.views import KVView, TrainingView
from kvfold.convert.fitted_group import GroupSums, LeastSquares
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.rope import Rope
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


class Streams:
    """`theirs` and `ours`, one [B, T, C] a batch, move up layer by layer as both models' layers are done."""

    def __init__(
        self, original: FoldForCausalLM, converted: FoldForCausalLM, ids_WT: Tensor, batch: int,
        start: Sequence[Tensor] | None = None,
    ):  # fmt: skip
        """`start`: both streams where the first layer that will be done begins, where that is not the lowest."""
        self.original, self.converted = original, converted
        if start is None:
            start = [original.model.opened(ids.to(original.device))[0] for ids in ids_WT.split(batch)]
        self.theirs = list(start)
        self.ours = list(self.theirs)
        rope, positions = Rope(self.config), torch.arange(ids_WT.shape[1], device=original.device)[None]
        self.rotations = rope.rotations(positions, torch.float32, continued=False)
        self.rotation_groups = rope.group_of
        self._views: dict[int, list[TrainingView]] = {}

    @property
    def config(self) -> FoldConfig:
        """The converted model's."""
        return self.converted.config

    def their_halves(self, index: int) -> list[Half]:
        """The original's attention in one layer."""
        layer, rotation = self.original.model.layers[index], self.rotations[index]
        halves = (attention_half(self.config, layer, hidden, self._their_view(), rotation) for hidden in self.theirs)
        return [half.goal() for half in halves]

    def pass_theirs(self, index: int) -> None:
        """Move the original's stream alone over a layer."""
        layer, rotation = self.original.model.layers[index], self.rotations[index]
        self.theirs = [layer(hidden, self._their_view(), rotation) for hidden in self.theirs]

    def to_the_end(self, index: int, hidden_BTC: Tensor) -> Tensor:
        """What the converted model has behind its last norm, for a stream below layer `index` on which nothing below is read."""
        view = self._view(self.config.layout)
        for place, layer in enumerate(self.converted.model.layers[index:], start=index):
            hidden_BTC = layer(hidden_BTC, view, self.rotations[place])
        return self.converted.model.norm(hidden_BTC)

    def our_halves(self, index: int) -> list[Half]:
        """The converted model's. What an owner stores stays until its last reader is done with."""
        return [self.our_half(index, place) for place in range(len(self.ours))]

    def our_half(self, index: int, place: int) -> Half:
        """Of one batch."""
        owner = self.config.layout.owner_of(index)
        if owner not in self._views:
            self._views[owner] = [self._view(self.config.layout) for _ in self.ours]
        layer = self.converted.model.layers[index]
        return attention_half(self.config, layer, self.ours[place], self._views[owner][place], self.rotations[index])

    def close(self, index: int) -> None:
        """Forget what no later layer reads."""
        owner = self.config.layout.owner_of(index)
        if self.config.layout.last_reader(owner) == index:
            self._views.pop(owner, None)

    def group_sums(self, owner: int) -> tuple[GroupSums, dict[int, Tensor]]:
        """What fitting a group's keys and values takes, gathered while the original runs from the owner to the last reader;
        and the mean squares of each layer's queries, [H * D].
        """
        group = self.config.layout.readers_of(owner)
        sums, squares = None, {}
        for theirs, ours in zip(self.theirs, self.ours, strict=True):
            source = self._owner_input(owner, ours)
            keys, values = [], []
            for index in range(owner, group[-1] + 1):
                if index in group:
                    q, k, v = self._their_projections(index, theirs)
                    squares[index] = squares.get(index, 0.0) + q.double().square().mean(dim=(0, 1)) / len(self.ours)
                    keys.append(k)
                    values.append(v)
                if index < group[-1]:
                    theirs = self.original.model.layers[index](theirs, self._their_view(), self.rotations[index])
            keys, values = torch.cat(keys, dim=-1), torch.cat(values, dim=-1)
            if sums is None:
                sums = GroupSums(keys=_sums_of(source, keys), values=_sums_of(source, values))
            sums.keys.add(source, keys)
            sums.values.add(source, values)
        return sums, squares

    def _owner_input(self, owner: int, hidden: Tensor) -> Tensor:
        """What the owner's keys and values are made of, with a channel of ones where they have biases."""
        layer = self.converted.model.layers[owner]
        run = _layer_call(layer, hidden, self._view(self.config.layout), self.rotations[owner])
        source, _ = run_until(layer.self_attn.k_proj, run, {})
        return (
            source if layer.self_attn.k_proj.bias is None else torch.cat((source, torch.ones_like(source[..., :1])), -1)
        )

    def _their_projections(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The original's q, k and v of a layer, before any norm and rotary positions."""
        layer = self.original.model.layers[index]
        own = layer.self_attn
        run = _layer_call(layer, hidden, self._their_view(), self.rotations[index])
        source, seen = run_until(own.v_proj, run, {"q": own.q_proj, "k": own.k_proj})
        return seen["q"][1], seen["k"][1], own.v_proj(source)

    def _their_view(self) -> TrainingView:
        return self._view(self.original.config.layout)

    def _view(self, layout: KVLayout) -> TrainingView:
        scale = self.config.head_dim**-0.5 if self.config.attention_scale is None else self.config.attention_scale
        return TrainingView(layout.base(), real_BT=None, scale=scale, softcap=self.config.attention_softcap)


def _layer_call(layer: nn.Module, *args: object):
    return lambda: layer(*args)


def _sums_of(inputs: Tensor, outputs: Sequence[Tensor] | Tensor) -> LeastSquares:
    return LeastSquares(inputs.shape[-1], outputs.shape[-1], inputs.device)
