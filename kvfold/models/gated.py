"""What a model with learned gates offers: putting it under a learned method, DMC's zero-out written into the weights, and what
gates decided in a call.

Where decisions come from stands in gates.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from kvfold.methods.gates import GateConfig
from kvfold.models.blocks import FoldAttention
from kvfold.models.gates import GateRecord, gate_table


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


def recorded(record: GateRecord, owners: tuple[int, ...]) -> dict[str, tuple[Tensor | None, ...]]:
    """The fields of `FoldOutput` that say what gates decided."""
    found = {"decisions": record.decisions, "gate_probs": record.probabilities}
    return {
        name: tuple(of[owner].transpose(1, 2) if owner in of else None for owner in owners)
        for name, of in found.items()
    }


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

    def set_gates(self, gates: GateConfig, time: str) -> None:
        """Put this model under a learned method: its text form, its gates, and fresh adapters where the gates are such."""
        self.config.layout = self.config.layout.with_time(time)
        self.config.gates = gates.to_json()
        # Refuses gates of another method.
        gate_table(gates, self.config.layout, freed_owners=self.config.freed_owners)
        for layer in self.model.layers:
            attention: FoldAttention = layer.self_attn
            attention.fold_norm = attention.fold_proj = None
            if attention.k_proj is not None:
                attention.add_adapter(gates, self.config)
                attention.to(device=self.device)

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
            if not write or layout.owner_of(index) not in gated:
                continue
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                if projection is None:
                    continue
                projection.weight.unflatten(0, (-1, self.config.head_dim))[:, channel] = 0
                if projection.bias is not None:
                    projection.bias.unflatten(0, (-1, self.config.head_dim))[:, channel] = 0
