"""Both models' residual streams at the border of one layer, for all calibration text: all that fitting keeps in memory.

Letters: W windows, B windows of one batch, T tokens, C model width, D head dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kvfold.cache.training import TrainingView
from kvfold.convert.fitted_group import GroupSums
from kvfold.convert.layer_halves import Half, attention_half, run_until
from kvfold.convert.least_squares import LeastSquares
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.rope import Rope


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
