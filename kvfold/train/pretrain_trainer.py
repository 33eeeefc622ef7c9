"""The training loop of a model from scratch: the shared loop, and held-out text measured on the way.

Letters: N sequences, B rows, T tokens.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.eval.scoring import next_token_logits
from kvfold.train.data import TrainingOrder
from kvfold.train.loop import DivergedError, OnStep, StepTrainer
from kvfold.train.losses import next_token_loss
from kvfold.train.pretrain_settings import PretrainSettings


class PretrainTrainer(StepTrainer):
    """Trains all weights on the next token's loss."""

    _settings: PretrainSettings

    def __init__(
        self, model: nn.Module, samples: TrainingOrder, held_out_NT: Tensor, settings: PretrainSettings, folder: Path, *,
        use_cpu: bool, on_step: OnStep,
    ):  # fmt: skip
        """As in `StepTrainer`. `validated` has the held-out loss of each sequence, fp32 [N], once it was measured."""
        self._held_out_NT, self.validated = held_out_NT, None
        super().__init__(model, samples, settings, folder, use_cpu=use_cpu, on_step=on_step)

    def figures(self, done: int, parts: dict[str, Any]) -> dict[str, Any]:
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
        ranks, rank, at_once = (
            self.accelerator.num_processes,
            self.accelerator.process_index,
            self.args.train_batch_size,
        )
        number = self._held_out_NT.shape[0]
        found_N = torch.zeros(number, device=self.args.device)
        for start in range(0, number, ranks * at_once):
            # Each process calls the model as often as the others: shards of weights are gathered together.
            rows = [(start + rank * at_once + row) % number for row in range(at_once)]
            ids = self._held_out_NT[rows].long().to(self.args.device)
            with self.accelerator.autocast():
                outputs = self.forward_states(self.model_wrapped, ids)
                losses = [
                    self._loss_of(states, row) for states, row in zip(outputs.hidden_states[-1], ids, strict=True)
                ]
            mine = [start + rank * at_once + row < number for row in range(at_once)]
            for row, loss, counts in zip(rows, losses, mine, strict=True):
                if counts:
                    found_N[row] = loss
        return self.accelerator.reduce(found_N, reduction="sum").cpu()

    def _loss_of(self, states_TC: Tensor, ids_T: Tensor) -> Tensor:
        return next_token_loss(next_token_logits(self._plain, states_TC[:-1]), ids_T[1:]).mean()


def perplexity(loss: float) -> float:
    """Of a loss in nats a token; infinite where that has no number."""
    return math.exp(loss) if loss < 700 else math.inf
