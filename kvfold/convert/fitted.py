"""Refitting what is left of a converted model, layer after layer from the bottom up, so that every block gives what the
original's gives there. Closed forms on calibration text; at most one layer's attention is ever differentiated.

The converted model's own stream goes in, and the original's stream is the target, so that what went wrong below is made
good above as far as it can be. In each layer: keys and values of a group (fitted_group.py) at its owner, then W_o, then the
feed-forward block's last projection, both by ridge regression towards what they were. Each token's error counts relative to
the size of the original's stream, as every norm above will see it: a few tokens with massive activations would rule
everything else. How strong a ridge is, held-out calibration text decides: in sample weak ones always look better, and on any
other text they are far worse. Queries are turned towards their new keys by a few gradient steps on their projection. Each
finished layer is a file of weights in a folder, so that fitting goes on where it was.

Source: ours.
Differs: none.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kvfold.cache.views import KVView, TrainingView
from kvfold.convert.fitted_group import (
    LeastSquares,
    Part,
    fit_keys,
    fit_values,
    matching_order,
    put_in_order,
)
from kvfold.errors import UserError
from kvfold.eval.progress import Report, silent
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.rope import Rope
from kvfold.ops.rotation import Rotation
from kvfold.record import write_whole_file

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


def _run_until(
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


def _attention_half(
    config: FoldConfig, layer: nn.Module, hidden_BTC: Tensor, view: KVView, rotation: Rotation | None
) -> Half:
    """The layer's attention on its residual stream."""
    middle = getattr(layer, _MIDDLE[config.norm_placement])
    stream, seen = _run_until(middle, lambda: layer(hidden_BTC, view, rotation), {"o_proj": layer.self_attn.o_proj})
    return Half(inputs=seen["o_proj"][0], raw=seen["o_proj"][1], stream=stream)


def _feed_half(config: FoldConfig, layer: nn.Module, middle_BTC: Tensor) -> Half:
    """The layer's feed-forward block on the residual stream behind its attention."""
    name, projection = _FEED_NORM[config.norm_placement], layer.mlp.down_proj
    normed = middle_BTC if name is None else getattr(layer, name)(middle_BTC)
    inputs, _ = _run_until(projection, lambda: layer.mlp(normed), {})
    raw = projection(inputs)
    return Half(inputs=inputs, raw=raw, stream=_stream_behind(config, layer, projection, middle_BTC, raw))


def _stream_behind(
    config: FoldConfig, layer: nn.Module, projection: nn.Module, before_BTC: Tensor, raw_BTC: Tensor
) -> Tensor:
    """The residual stream behind the block that ends in `projection`, where that gave `raw`."""
    norm = _output_norm(config, layer, projection)
    return before_BTC + (raw_BTC if norm is None else norm(raw_BTC)) * config.residual_multiplier


def _wanted_raw(
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
        self._views: dict[tuple[bool, int], list[TrainingView]] = {}

    @property
    def config(self) -> FoldConfig:
        """The converted model's."""
        return self.converted.config

    def their_halves(self, index: int) -> list[Half]:
        """The original's attention in one layer."""
        layer, rotation = self.original.model.layers[index], self.rotations[index]
        views = self._kept_views(self.original, index)
        halves = (
            _attention_half(self.config, layer, hidden, view, rotation)
            for hidden, view in zip(self.theirs, views, strict=True)
        )
        return [half.goal() for half in halves]

    def pass_theirs(self, index: int) -> None:
        """Move the original's stream alone over a layer."""
        layer, rotation = self.original.model.layers[index], self.rotations[index]
        views = self._kept_views(self.original, index)
        self.theirs = [layer(hidden, view, rotation) for hidden, view in zip(self.theirs, views, strict=True)]

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
        layer, view = self.converted.model.layers[index], self._kept_views(self.converted, index)[place]
        return _attention_half(self.config, layer, self.ours[place], view, self.rotations[index])

    def _kept_views(self, model: FoldForCausalLM, index: int) -> list[TrainingView]:
        """A view for each batch, the same for all layers of a group."""
        layout = model.config.layout
        key = model is self.converted, layout.owner_of(index)
        if key not in self._views:
            self._views[key] = [self._view(layout) for _ in self.ours]
        return self._views[key]

    def close(self, index: int) -> None:
        """Forget what no later layer reads."""
        for model in (self.original, self.converted):
            owner = model.config.layout.owner_of(index)
            if model.config.layout.last_reader(owner) == index:
                self._views.pop((model is self.converted, owner), None)

    def group_sums(self, owner: int) -> tuple[LeastSquares, LeastSquares, dict[int, Tensor]]:
        """Gathered while the original runs from the owner to the last reader: from the owner's input to the keys of all parts,
        side by side, the same for values, and the mean squares of each layer's queries, [H * D]. Where there are biases a last
        input is of ones.
        """
        group = self.config.layout.readers_of(owner)
        sums, squares = None, {}
        for place, (theirs, ours) in enumerate(zip(self.theirs, self.ours, strict=True)):
            source = self._owner_input(owner, ours)
            keys, values = [], []
            for index in range(owner, group[-1] + 1):
                if index in group:
                    q, k, v = self._their_projections(index, place, theirs)
                    squares[index] = squares.get(index, 0.0) + q.double().square().mean(dim=(0, 1)) / len(self.ours)
                    keys.append(k)
                    values.append(v)
                if index < group[-1]:
                    view = self._kept_views(self.original, index)[place]
                    theirs = self.original.model.layers[index](theirs, view, self.rotations[index])
            keys, values = torch.cat(keys, dim=-1), torch.cat(values, dim=-1)
            if sums is None:
                shape = source.shape[-1], keys.shape[-1], source.device
                sums = LeastSquares(*shape), LeastSquares(*shape)
            for some, wanted in zip(sums, (keys, values), strict=True):
                some.add(source, wanted)
        return *sums, squares

    def _owner_input(self, owner: int, hidden: Tensor) -> Tensor:
        """What the owner's keys and values are made of, with a channel of ones where they have biases."""
        layer = self.converted.model.layers[owner]
        run = partial(layer, hidden, self._view(self.config.layout), self.rotations[owner])
        source, _ = _run_until(layer.self_attn.k_proj, run, {})
        biased = layer.self_attn.k_proj.bias is not None
        return torch.cat((source, torch.ones_like(source[..., :1])), -1) if biased else source

    def _their_projections(self, index: int, place: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The original's q, k and v of a layer, before any norm and rotary positions."""
        layer, own = self.original.model.layers[index], self.original.model.layers[index].self_attn
        run = partial(layer, hidden, self._kept_views(self.original, index)[place], self.rotations[index])
        source, seen = _run_until(own.v_proj, run, {"q": own.q_proj, "k": own.k_proj})
        return seen["q"][1], seen["k"][1], own.v_proj(source)

    def _view(self, layout: KVLayout) -> TrainingView:
        return TrainingView(layout.base(), real_BT=None, **self.converted.model.attention_options)


class _FitState:
    """The finished layers of one fit. A folder of another model, text or setting is begun anew. `None`: nothing is kept."""

    def __init__(self, folder: Path | None, fingerprint: str):
        self._folder, self._about = folder, {"fingerprint": fingerprint}

    def read(self, layer: int) -> dict[str, Tensor] | None:
        """The weights that this layer's turn changed; None where it isn't finished, or was for something else."""
        if self._folder is None:
            return None
        try:
            with safe_open(self._path(layer), framework="pt") as file:
                names = file.keys() if file.metadata() == self._about else None
                return names and {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError):
            return None

    def write(self, layer: int, weights: Mapping[str, Tensor]) -> None:
        """Keep what this layer's turn changed; found whole or not at all."""
        if self._folder is not None:
            tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
            write_whole_file(self._path(layer), save(tensors, self._about))

    def _path(self, layer: int) -> Path:
        return self._folder / f"layer-{layer:04d}.safetensors"


def fingerprint_of(original: FoldForCausalLM, converted: FoldForCausalLM, ids_WT: Tensor, options: object) -> str:
    """What decides a fit's result: weights (by their sums), both layouts, the text, the options."""
    digest = hashlib.sha256(ids_WT.to(torch.int64).cpu().numpy().tobytes())
    for model in (original, converted):
        digest.update(repr(model.config.layout.to_json()).encode())
        for name, weight in model.state_dict().items():
            digest.update(f"{name} {weight.double().sum().item()!r}".encode())
    digest.update(repr(options).encode())
    return digest.hexdigest()


_HELD_OUT = 4
"""Every so many batches, one chooses the strength of the ridge."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What is fitted, and how."""

    ridge: float | None = None
    """Pull of a projection towards what it was, as a share of its inputs' mean energy; None: as held-out text asks."""
    group: bool = True
    """Give owners the keys and values that serve their group, where keys are linear (no norm on them)."""
    feed_forward: bool = True
    """Refit the feed-forward blocks too."""
    query_steps: int = 0
    """Adam steps on the query projection of a layer that attends to other keys than its own."""
    query_rate: float = 0.01
    """Size of such a step as a share of the weights' own."""
    batch: int = 2
    """Windows read side by side."""

    def __post_init__(self) -> None:
        for name in ("ridge", "query_steps", "query_rate"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"{name} {getattr(self, name)}: it is 0 or more: correct it")
        if self.batch < 1:
            raise UserError(f"batch {self.batch}: 1 window or more are read at once: correct it")


@torch.no_grad()
def fit(
    original: FoldForCausalLM, converted: FoldForCausalLM, ids_WT: Tensor, *, options: Fit | None = None,
    folder: Path | None = None, report: Report = silent,
) -> None:  # fmt: skip
    """Refit `converted` in place. `ids_WT`: calibration windows. `folder`: where finished layers wait for a second start,
    for the caller to remove once the result is written. An original that shares layers already keeps its groups: raises
    `UserError` where one of them grows.
    """
    options, layout, before = options or Fit(), converted.config.layout, original.config.layout
    grown = [
        one for one in before.owners if len(group := before.readers_of(one)) > 1 and group != _group_of(layout, one)
    ]
    if grown:
        raise UserError(
            f"init 'fitted' from a model with layers '{before.layers_text()}': layers {', '.join(map(str, grown))} are read by "
            "others already: keep these groups as they are, convert the model it was made from, or use 'mean' or 'drop'"
        )
    if len(ids_WT) < 2:
        raise UserError(
            "init 'fitted' on 1 window of text: one fits and another says how strongly: give more calibration text, or shorter "
            "windows"
        )
    options = replace(options, batch=max(1, min(options.batch, len(ids_WT) // _HELD_OUT)))
    state = _FitState(folder, fingerprint_of(original, converted, ids_WT, options))
    streams, goes_on = Streams(original, converted, ids_WT, options.batch), True
    # Below the first changed layer both streams are one, and there is nothing to make good.
    first = next((index for index in range(layout.num_layers) if _reads_other_keys(streams, index)), layout.num_layers)
    for index in range(layout.num_layers):
        report("fitting layer by layer", index, layout.num_layers)
        found = state.read(index) if goes_on else None
        goes_on = found is not None
        before = dict(converted.named_parameters())
        for name, weight in (found or {}).items():
            stem, _, kind = name.rpartition(".")
            setattr(converted.get_submodule(stem), kind, nn.Parameter(weight.to(converted.device)))
        do_layer(streams, index, options, fitting=not goes_on and index >= first)
        if not goes_on:
            after = dict(converted.named_parameters())
            state.write(index, {name: one for name, one in after.items() if one is not before[name]})
        streams.close(index)
    report("fitting layer by layer", layout.num_layers, layout.num_layers)


def do_layer(streams: Streams, index: int, options: Fit, *, fitting: bool = True) -> None:
    """Fit one layer, or where it was fitted before only move both streams over it. Without gradients; `ridge` None asks for
    two batches or more.
    """
    config, ours, theirs = streams.config, streams.converted.model.layers[index], streams.original.model.layers[index]
    changed = _reads_other_keys(streams, index)
    if fitting and options.group and changed and config.layout.is_owner(index):
        _fit_group(streams, index)
    goals, halves = streams.their_halves(index), streams.our_halves(index)
    if fitting:
        middle = _refit(streams, ours, ours.self_attn.o_proj, halves, goals, streams.ours, options)
        if options.query_steps and changed:
            _refit_queries(streams, index, goals, options)
            middle = _refit(
                streams, ours, ours.self_attn.o_proj, streams.our_halves(index), goals, streams.ours, options
            )
    else:
        middle = [half.stream for half in halves]
    goals = [_feed_half(config, theirs, half.stream).goal() for half in goals]
    halves = [_feed_half(config, ours, stream) for stream in middle]
    if fitting and options.feed_forward:
        streams.ours = _refit(streams, ours, ours.mlp.down_proj, halves, goals, middle, options)
    else:
        streams.ours = [half.stream for half in halves]
    streams.theirs = [half.stream for half in goals]


def _reads_other_keys(streams: Streams, index: int) -> bool:
    """Whether a layer's group is larger than it was: other layers share it, or heads were merged."""
    new, old = streams.config.layout, streams.original.config.layout
    same = _group_of(new, index) == _group_of(old, index)
    return not same or new.layers[index].num_kv_heads != old.layers[index].num_kv_heads


def _group_of(layout: KVLayout, index: int) -> tuple[int, ...]:
    return layout.readers_of(layout.owner_of(index))


def _fit_group(streams: Streams, owner: int) -> None:
    """Keys and values of an owner; nothing where keys are normed or its layers turn differently: no factor passes there."""
    config, layers = streams.config, streams.converted.model.layers
    group = config.layout.readers_of(owner)
    if config.qk_norm != "none" or len({streams.rotation_groups[index] for index in group}) > 1:
        return
    keys, values, energy = streams.group_sums(owner)
    attention = layers[owner].self_attn
    old, new = streams.original.config.layout.layers[owner].num_kv_heads, config.layout.layers[owner].num_kv_heads
    heads = [
        [_part(streams, index, place, slot, slot, energy) for slot in range(old)] for place, index in enumerate(group)
    ]
    for place, index in enumerate(group[1:], start=1):
        order = matching_order(config, heads[0], heads[place], keys, values, streams.rotations[owner])
        put_in_order(layers[index].self_attn, order, config.num_attention_heads // old * config.head_dim)
        heads[place] = [_part(streams, index, place, slot, head, energy) for slot, head in enumerate(order)]
    for head in range(new):
        parts = [one for layer in heads for one in layer[head * old // new : (head + 1) * old // new]]
        fit_values(config, attention, head, parts, values)
        fit_keys(config, attention, head, parts, keys, streams.rotations[owner])


def _part(streams: Streams, index: int, place: int, slot: int, head: int, energy: dict[int, Tensor]) -> Part:
    """The original's KV head `head` of a layer, the `place`-th of its group, whose query heads stand at `slot`."""
    dim, original = streams.config.head_dim, streams.original.config.layout.layers[index].num_kv_heads
    queries, first = streams.config.num_attention_heads // original, (place * original + head) * dim
    return Part(
        attention=streams.converted.model.layers[index].self_attn,
        columns=slice(first, first + dim),
        queries=slice(slot * queries, (slot + 1) * queries),
        energy_D=energy[index].unflatten(0, (-1, dim))[head * queries : (head + 1) * queries].sum(dim=0),
    )


def _refit(
    streams: Streams, layer: nn.Module, projection: nn.Linear, halves: Sequence[Half], goals: Sequence[Half],
    before: Sequence[Tensor], options: Fit,
) -> list[Tensor]:  # fmt: skip
    """Refit the projection that ends a block, and give our stream behind it. `before`: our stream that the block adds to."""
    shape = projection.in_features, projection.out_features, projection.weight.device
    sums, held = LeastSquares(*shape), LeastSquares(*shape)
    for place, (half, goal, start) in enumerate(zip(halves, goals, before, strict=True)):
        wanted, weight = _wanted(streams, layer, projection, goal, start)
        (held if place in held_places(len(halves)) else sums).add(half.inputs, wanted - half.raw, weight)
    strength = sums.best_strength(held) if options.ridge is None else options.ridge
    sums.absorb(held)
    change = sums.solve(strength).to(projection.weight.dtype)
    projection.weight = nn.Parameter(projection.weight + change.T)
    # As a second start computes it, so that going on gives the very same weights.
    return [
        _stream_behind(streams.config, layer, projection, start, projection(half.inputs))
        for half, start in zip(halves, before, strict=True)
    ]


def held_places(batches: int) -> range:
    """Which of so many batches choose the strength of a ridge: every fourth, of fewer the last."""
    every = min(_HELD_OUT, batches)
    return range(every - 1, batches, every)


def _wanted(
    streams: Streams, layer: nn.Module, projection: nn.Linear, goal: Half, start: Tensor
) -> tuple[Tensor, Tensor]:
    """What a projection should give, and how much each token's squared error counts."""
    wanted = _wanted_raw(streams.config, layer, projection, goal.stream - start, goal.raw)
    return wanted, 1.0 / goal.stream.square().sum(dim=-1).clamp(min=1e-12)


def _refit_queries(streams: Streams, index: int, goals: Sequence[Half], options: Fit) -> None:
    """Adam steps on W_q, one batch each, so that the attention block gives what is wanted of it. The rate is the first step's
    size as a share of the weights' own; it falls to zero along a cosine.
    """
    layer, steps = streams.converted.model.layers[index], options.query_steps
    projection, asked = layer.self_attn.q_proj, [one for one in layer.parameters() if one.requires_grad]
    wanted = [
        _wanted(streams, layer, layer.self_attn.o_proj, goal, start)
        for goal, start in zip(goals, streams.ours, strict=True)
    ]
    for one in asked:
        one.requires_grad_(False)
    projection.weight = nn.Parameter(projection.weight.detach().clone())
    start = options.query_rate * float(projection.weight.detach().square().mean().sqrt())
    adam = torch.optim.Adam([projection.weight], lr=start, betas=(0.9, 0.95))
    with torch.enable_grad():
        for step in range(steps):
            adam.param_groups[0]["lr"] = start * 0.5 * (1.0 + math.cos(math.pi * step / steps))
            place = step % len(wanted)
            goal, weight = wanted[place]
            given = streams.our_half(index, place).raw
            loss = ((given - goal).square().sum(dim=-1) * weight).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    for one in asked:
        one.requires_grad_(True)
