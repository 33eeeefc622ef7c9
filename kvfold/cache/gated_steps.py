"""One decoding step of a bank whose tokens are flagged or merged by the model's gates.

A flag takes effect `delay` tokens later, so the place of a new token is known before its gate speaks: the step is booked
for all owners at once (`FlaggedStep`). A merge is known only when the owner's layer is reached (`MergedStep`).
Letters: O owners of the bank, B rows, K kv heads, D head dim, W length of the ring.
"""

import torch
from torch import Tensor

from kvfold.cache.bank import Bank
from kvfold.cache.steps import PlacedStep
from kvfold.ops.gating import Gates


class FlaggedStep(PlacedStep):
    """The token goes into the slot of the one that leaves the window flagged, or behind the others."""

    def _displaced(self, position_B: Tensor, stored: int) -> Tensor:
        ring = self._bank.state.ring.flatten(0, 2)
        self._column_B = position_B % ring.shape[-1]
        length = self._bank.length.view(-1)[self._lanes_OBK].long()
        oldest = ring[self._lanes_OBK, self._column_B[:, None]]
        leaves = (oldest < 0) & (position_B >= ring.shape[-1])[:, None]
        return torch.where(leaves, ~oldest.long(), length)

    def _placed(self, place_OBK: Tensor) -> None:
        """The new token is in its slot, and not flagged yet."""
        ring = self._bank.state.ring.flatten(0, 2)
        old = ring[self._lanes_OBK, self._column_B[:, None]]
        new = place_OBK.int() if self._live_B is None else torch.where(self._live_B[:, None], place_OBK.int(), old)
        ring[self._lanes_OBK, self._column_B[:, None]] = new

    def flag(self, index: int, gates: Gates | None) -> None:
        """Take down what the gate of one owner decided at this token."""
        if gates is None or gates.alpha_BTK is None:
            return
        ring, lanes = self._bank.state.ring.flatten(0, 2), self._lanes_OBK[index]
        fires, column = gates.alpha_BTK[:, 0] > 0.5, self._column_B
        if gates.from_next:
            fires, column = fires & (self._position_B > 0)[:, None], (self._position_B - 1) % ring.shape[-1]
        if self._live_B is not None:
            fires = fires & self._live_B[:, None]
        slot = ring[lanes, column[:, None]]
        ring[lanes, column[:, None]] = torch.where(fires & (slot >= 0), ~slot, slot)


class MergedStep:
    """The token is merged into its lane's last entry, or goes behind it, as its gate decides."""

    def __init__(self, bank: Bank, rows_B: Tensor, position_B: Tensor, live_B: Tensor | None, stored: int):
        """See `PlacedStep`. Nothing is booked yet."""
        self._bank, self._rows_B, self._position_B, self._live_B = bank, rows_B, position_B, live_B
        self._lanes_OBK, self.longest = bank.lanes(rows_B), stored + 1
        self.of_owners = self._lanes_OBK
        if bank.has_shared:
            bank.privatise(self._lanes_OBK)

    def merge(self, index: int, gates: Gates | None, k_BKD: Tensor, v_BKD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The entry's k (before rotary positions) and v with the new token in it, and its flat slot [B, K], -1 for a dead
        row. Books the page, the position and the length.
        """
        bank, lanes, slots = self._bank, self._lanes_OBK[index], self._bank.pool.slots
        live = torch.ones_like(lanes, dtype=torch.bool)
        if self._live_B is not None:
            live &= self._live_B[:, None]
        merges = torch.zeros_like(live)
        if gates is not None and gates.alpha_BTK is not None:
            merges = live & (gates.alpha_BTK[:, 0] > 0.5) & (self._position_B > 0)[:, None]
        k, v = self._summed(index, gates, k_BKD, v_BKD, merges, live)
        length = bank.length.view(-1)[lanes].long()
        place, grows = torch.where(merges, length - 1, length), live & ~merges
        border = grows & (length % slots == 0)
        bank.extend(lanes[border], length[border] // slots, torch.ones_like(length[border]))
        place = place.masked_fill(~live, 0)
        flat = bank.table_flat()[lanes, place // slots].long() * slots + place % slots
        bank.pool.position.view(-1)[flat[live]] = self._position_B.int()[:, None].expand_as(flat)[live]
        bank.length.view(-1)[lanes] = (length + grows).int()
        return k, v, flat.masked_fill(~live, -1)

    def _summed(
        self, index: int, gates: Gates | None, k: Tensor, v: Tensor, merges: Tensor, live: Tensor
    ) -> tuple[Tensor, Tensor]:
        policy, width = self._bank.policy, k.shape[-1]
        ring = self._bank.state.ring[index]
        weight = k.new_ones(k.shape[:2], dtype=torch.float32)
        if gates is not None and gates.weight_BTK is not None:
            weight = gates.weight_BTK[:, 0]
        new = weighted(k, v, weight)
        old = ring[self._rows_B]
        held = torch.where(merges[..., None, None], old, 0.0)
        if policy.sums_all:
            held[:, :, 0] += new
        else:
            column = (self._position_B % policy.reach)[:, None, None, None].expand(*new.shape[:2], 1, new.shape[-1])
            held.scatter_(2, column, new.unsqueeze(2))
        ring[self._rows_B] = torch.where(live[..., None, None], held, old)
        total = held.sum(dim=2)
        mean = total[..., :-1] / total[..., -1:]
        return mean[..., :width].to(k.dtype), mean[..., width:].to(v.dtype)


def weighted(k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """weight * k, weight * v and the weight itself side by side, fp32 [..., 2D + 1]."""
    both = torch.cat((k, v), dim=-1).float() * weight.unsqueeze(-1)
    return torch.cat((both, weight.unsqueeze(-1)), dim=-1)
