"""Ridge regression whose equations are gathered batch by batch, in float64, and whose strength held-out batches choose.

Letters: N tokens, I inputs, O outputs.
"""

from typing import Self

import torch
from torch import Tensor

STRENGTHS = tuple(10.0**power for power in (-4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3))
"""Ridges that are tried, as shares of the inputs' mean energy."""


class LeastSquares:
    """The W that makes the sum over tokens of weight * |W x - y|^2 least, from the sums that it needs."""

    def __init__(self, num_inputs: int, num_outputs: int, device: torch.device):
        options = {"dtype": torch.float64, "device": device}
        self.xx_II, self.xy_IO = (
            torch.zeros(num_inputs, num_inputs, **options),
            torch.zeros(num_inputs, num_outputs, **options),
        )
        self.x_I, self.num_tokens = torch.zeros(num_inputs, **options), 0

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """x [..., I], y [..., O], weight [...] of a batch; products of one batch are taken in fp32."""
        x, y = x.flatten(0, -2).float(), y.flatten(0, -2).float()
        weighted = x if weight is None else x * weight.reshape(-1, 1)
        self.xx_II += weighted.T @ x
        self.xy_IO += weighted.T @ y
        self.x_I += weighted.sum(dim=0)
        self.num_tokens += len(x)

    def absorb(self, other: Self) -> None:
        """Take another's tokens in."""
        self.xx_II += other.xx_II
        self.xy_IO += other.xy_IO
        self.x_I += other.x_I
        self.num_tokens += other.num_tokens

    def solve(self, strength: float) -> Tensor:
        """W transposed, float64 [I, O]; `strength` is the ridge as a share of the inputs' mean energy."""
        ridge = strength * self._energy()
        return torch.linalg.solve(self.xx_II + ridge * torch.eye(len(self.xx_II)).to(self.xx_II), self.xy_IO)

    def best_strength(self, held: Self) -> float:
        """Of `STRENGTHS` the one whose solution here has the least error on the tokens of `held`."""
        values, vectors = torch.linalg.eigh(self.xx_II)
        turned_xy = vectors.T @ self.xy_IO
        held_xx, held_xy = vectors.T @ held.xx_II @ vectors, vectors.T @ held.xy_IO
        errors = {}
        for strength in STRENGTHS:
            solution = turned_xy / (values + strength * self._energy())[:, None]
            errors[strength] = float(((held_xx @ solution - 2.0 * held_xy) * solution).sum())
        return min(errors, key=errors.get)

    def _energy(self) -> float:
        return max(float(self.xx_II.diagonal().mean()), 1e-30)
