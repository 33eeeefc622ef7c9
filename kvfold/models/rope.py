"""Rotary angles of a model, computed from its config whenever they are needed: nothing of them is a buffer, so no loader
can spoil them. Which rule gives the frequencies is transformers' knowledge (`ROPE_INIT_FUNCTIONS`).

Letters: B rows, T tokens of this call, R rotated dims.
"""

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvfold.errors import UserError
from kvfold.models.config import FoldConfig
from kvfold.ops.rotation import Rotation

Frequencies = tuple[Tensor, float]
"""Radians a position, fp32 [R/2], and the factor of cosine and sine."""

_ALL = ""
"""The name of the only group, where every attention type is rotated alike."""


class RopeGroup:
    """One set of rope parameters, in the form that transformers' frequency functions read: a tiny config."""

    def __init__(self, config: FoldConfig, parameters: dict):
        self.rope_parameters, self.kind = dict(parameters), parameters["rope_type"]
        self.hidden_size, self.num_attention_heads = config.hidden_size, config.num_attention_heads
        self.head_dim, self.max_position_embeddings = config.head_dim, config.max_position_embeddings
        self._kept: dict[tuple, Frequencies] = {}
        self.fixed: dict[torch.device, Frequencies] = {}
        """By device, where they are the same for every text."""

    def standardize_rope_params(self) -> None:
        """The functions call it; the parameters come standardised."""

    def frequencies(self, position_BT: Tensor, continued: bool) -> Frequencies:
        """Frequencies for these positions. Only `dynamic` and `longrope` look at how long the text is."""
        device = position_BT.device
        with torch.inference_mode(False):
            if self.kind not in ("dynamic", "longrope"):
                self.fixed[device] = self._compute(device, None)
                return self.fixed[device]
            length = self._scaled_length(position_BT, continued)
            if (device, length) not in self._kept:
                self._kept = {old: kept for old, kept in self._kept.items() if old[1] is None}
                self._kept[device, length] = self._compute(device, length)
            return self._kept[device, length]

    def _compute(self, device: torch.device, length: int | None) -> Frequencies:
        if self.kind != "default":
            return ROPE_INIT_FUNCTIONS[self.kind](self, device, seq_len=length)
        width = int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0))
        steps = torch.arange(0, width, 2, dtype=torch.float32, device=device)
        return 1.0 / (self.rope_parameters["rope_theta"] ** (steps / width)), 1.0

    def _scaled_length(self, position_BT: Tensor, continued: bool) -> int | None:
        """The text length that the frequencies depend on; None where they are the plain ones."""
        length = int(position_BT.max()) + 1
        if self.kind == "dynamic":
            return length if length > self.max_position_embeddings else None
        border = self.rope_parameters["original_max_position_embeddings"]
        if continued and length > border and int(position_BT[:, 0].max()) <= border:
            raise UserError(
                f"a text of {length} tokens that was begun in an earlier call: beyond {border} tokens this model turns all keys "
                "otherwise, those already stored included: feed the whole text in one call"
            )
        return border + 1 if length > border else None


class Rope:
    """The rotations of one call for each group of layers that turn alike."""

    def __init__(self, config: FoldConfig):
        parameters = config.rope_parameters
        nested = all(isinstance(value, dict) for value in parameters.values())
        kinds = config.layer_types if nested else [_ALL] * config.num_hidden_layers
        self.group_of = [None if layer in config.nope_layers else kind for layer, kind in enumerate(kinds)]
        self._groups = {
            kind: RopeGroup(config, parameters[kind] if nested else parameters) for kind in set(self.group_of) - {None}
        }

    def rotations(self, position_BT: Tensor, dtype: torch.dtype, *, continued: bool) -> list[Rotation | None]:
        """One for each layer, None for a layer without rotary positions. `continued`: earlier tokens lie in a cache.

        Angles are fp32 whatever the dtype: positions beyond 256 have no exact form in bf16.
        """
        rotations: dict[str | None, Rotation | None] = {None: None}
        for name, group in self._groups.items():
            frequencies, factor = group.fixed.get(position_BT.device) or group.frequencies(position_BT, continued)
            angles = (position_BT.unsqueeze(-1).float() * frequencies).repeat(1, 1, 2)
            cos, sin = angles.cos() * factor, angles.sin() * factor
            rotations[name] = Rotation(cos_BTR=cos.to(dtype), sin_BTR=sin.to(dtype))
        return [rotations[name] for name in self.group_of]
