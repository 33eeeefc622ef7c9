"""What learned methods keep with each lane beside its pages: a ring that the newest tokens write in turn.

A token at position p writes at column p modulo the ring's length, so nothing ever moves.
Letters: O owners of a bank, R row slots, K kv heads, W length of the ring, D head dim.
"""

import torch
from torch import Tensor

from kvfold.policies.base import Policy


class LaneRing:
    """One ring a lane, [O, R, K, W] or, with a width, [O, R, K, W, width]."""

    @torch.inference_mode(False)
    def __init__(self, owners: int, heads: int, policy: Policy, head_dim: int, device: torch.device):
        """DMS: the slot of each of the newest tokens, ~slot once it is flagged, int32. DMC: the weighted k and v of the tokens
        in the open entry and their weights, fp32.
        """
        flags = policy.gate == "flag"
        shape = (policy.reach,) if flags else (policy.reach, 2 * head_dim + 1)
        self.flags = flags
        self.ring = torch.zeros(
            (owners, 0, heads, *shape), dtype=torch.int32 if flags else torch.float32, device=device
        )

    def flagged(self) -> tuple[Tensor, Tensor]:
        """Entries that are flagged and still there: lane, slot of the lane; flat."""
        if not self.flags:
            return torch.zeros((2, 0), dtype=torch.int64, device=self.ring.device).unbind()
        ring = self.ring.flatten(0, 2)
        lane, column = (ring < 0).nonzero(as_tuple=True)
        return lane, ~ring[lane, column].long()

    def bytes_for(self, rows: int) -> int:
        """Bytes with room for so many rows."""
        owners, _, *rest = self.ring.shape
        return owners * rows * torch.Size(rest).numel() * self.ring.itemsize

    @torch.inference_mode(False)
    def resize(self, rows: int) -> None:
        """Room for so many rows."""
        grown = self.ring.new_zeros((self.ring.shape[0], rows, *self.ring.shape[2:]))
        grown[:, : self.ring.shape[1]] = self.ring
        self.ring = grown

    def fork(self, source_B: Tensor, target_B: Tensor) -> None:
        """Rows `target` go on from what rows `source` hold."""
        self.ring[:, target_B] = self.ring[:, source_B]

    def clear(self, rows_B: Tensor) -> None:
        """Forget these rows."""
        self.ring[:, rows_B] = 0
