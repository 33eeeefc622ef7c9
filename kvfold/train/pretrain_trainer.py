"""What a model from scratch minimises, and held-out text measured on the way.

Letters: N sequences, B rows, T tokens.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kvfold.eval.scoring import next_token_logits
from kvfold.models.decoder import FoldForCausalLM
from kvfold.train.loop import DivergedError
from kvfold.train.losses import next_token_loss
from kvfold.train.objectives import NextToken
from kvfold.train.pretrain_settings import PretrainSettings
from kvfold.train.processes import place, sum_over_processes


class FromScratch(NextToken):
    """All weights learn the next token's loss."""

    def __init__(self, model: FoldForCausalLM, held_out_NT: Tensor, settings: PretrainSettings):
        """`validated` has the held-out loss of each sequence, fp32 [N], once it was measured."""
        super().__init__(model)
        self._held_out_NT, self._settings, self.validated = held_out_NT, settings, None

    def figures(self, done: int, sums: dict[str, Any]) -> dict[str, Any]:
        """The held-out loss, where it is due."""
        if done % self._settings.validate_steps and done < self._settings.total_steps:
            return {}
        self.validated = self._validate()
        loss = self.validated.mean().item()
        if not math.isfinite(loss):
            raise DivergedError(f"step {done}: the held-out loss is {loss}: use a lower learning rate")
        return {"validation_loss": loss, "validation_perplexity": perplexity(loss)}

    @torch.no_grad()
    def _validate(self) -> Tensor:
        """Mean loss of each held-out sequence, fp32 [N] on the CPU; processes share the sequences."""
        (rank, processes), rows, number = place(), self._settings.sequences_at_once, len(self._held_out_NT)
        losses_N = torch.zeros(number, device=self.model.device)
        for start in range(rank * rows, number + rank * rows, processes * rows):
            # Each process calls the model as often as the others: weights that are spread are gathered together.
            mine = [index for index in range(start, start + rows) if index < number]
            ids_BT = self._held_out_NT[mine or [0]].long().to(self.model.device)
            states = self._decoder(ids_BT, use_cache=False).last_hidden_state
            for index, states_TC, ids_T in zip(mine, states, ids_BT, strict=False):
                losses_N[index] = next_token_loss(next_token_logits(self.model, states_TC[:-1]), ids_T[1:]).mean()
        sum_over_processes([losses_N])
        return losses_N.cpu()


def perplexity(loss: float) -> float:
    """Of a loss in nats a token; infinite where that has no number."""
    return math.exp(loss) if loss < 700 else math.inf
