"""Calls of several tokens under learned gates: the training form with hard decisions over what is stored and what is new,
then only what stays is written (parallel prefill).

Letters: B rows, T tokens of the call, S stored, E = S + T entries, K kv heads, D head dim, W length of the ring.
"""

import torch
from torch import Tensor

from kvfold.cache.dense import pooled_real
from kvfold.cache.groups import Group
from kvfold.ops.gating import Gates, from_next, real_first, reordered
from kvfold.ops.pooling import open_entries
from kvfold.ops.rotation import Rotation, rotate


class FlaggedGroup(Group):
    """DMS: a flagged entry is seen from within the delay only; those that have left it are not stored."""

    def _take(self, gates: Gates | None, k_BTKD: Tensor, v_BTKD: Tensor, rotation: Rotation | None) -> None:
        self._lay_out(rotate(rotation, k_BTKD), v_BTKD)
        fires = torch.zeros(k_BTKD.shape[:3], dtype=torch.bool, device=k_BTKD.device)
        if gates is not None and gates.alpha_BTK is not None:
            fires = gates.alpha_BTK > 0.5
        own, later = fires, gates is not None and gates.from_next
        if later:
            own = from_next(fires.float(), self.call.real_BT, 0.0) > 0.5
        self.flagged_BKE = own.transpose(1, 2)
        if self.stored:
            old = self._stored_flags()
            if later:
                # The newest stored token is governed by the first real one of this call.
                newest = self.position_BKE[..., : self.stored] == (self.call.before_B - 1)[:, None, None]
                old |= newest & (fires & self.call.first_BT[..., None]).any(dim=1)[..., None]
            self.flagged_BKE = torch.cat((old, self.flagged_BKE), dim=-1)
        query, position = self.call.position_BT[:, None, :, None], self.position_BKE.unsqueeze(2)
        stays = self.bank.policy.outlives(query, position, self.flagged_BKE.unsqueeze(2))
        self.mask = self.with_padding(self.causal(self.position_BKE) & stays)

    def _stored_flags(self) -> Tensor:
        """bool [B, K, S], read from the ring."""
        ring = self.bank.state.ring.flatten(0, 2)[self.lanes_BK]
        inside = torch.arange(ring.shape[-1], device=ring.device) < self.call.before_B[:, None, None]
        flagged = (ring < 0) & inside
        counts = torch.zeros(self.filled_BKS.shape, dtype=torch.int32, device=ring.device)
        slot = torch.where(flagged, ~ring, 0).long()
        return counts.scatter_add_(2, slot, flagged.int()) > 0

    def settle(self) -> None:
        """See `Group.settle`. A flagged token is there until the first token beyond its delay has come."""
        last = (self.call.seen_B - 1)[:, None, None]
        self.store(self.bank.policy.outlives(last, self.position_BKE, self.flagged_BKE), None)
        self._write_ring()

    def _write_ring(self) -> None:
        """Slots and flags of the newest tokens, anew."""
        bank, lanes = self.bank, self.lanes_BK
        ring = bank.state.ring.flatten(0, 2)
        width, edge = ring.shape[-1], (self.call.seen_B - ring.shape[-1])[:, None, None]
        flat, filled = bank.stored_slots(lanes, int(bank.length.view(-1)[lanes].max()))
        position = bank.pool.position.view(-1)[flat].masked_fill(~filled, -1).long()
        slot = torch.arange(flat.shape[-1], device=flat.device).expand_as(flat)
        flagged = self._by_column(self.position_BKE.long(), self.flagged_BKE.long(), edge, width) > 0
        slots = self._by_column(position, slot, edge, width).int()
        ring[lanes] = torch.where(flagged, ~slots, slots)

    @staticmethod
    def _by_column(position: Tensor, value: Tensor, edge: Tensor, width: int) -> Tensor:
        """Values of the entries from position `edge` on, each at its position's column of the ring; 0 elsewhere."""
        recent = (position >= edge) & (position >= 0)
        columns = torch.where(recent, position % width, width)
        found = value.new_zeros((*position.shape[:2], width + 1))
        return found.scatter_(2, columns, value)[..., :width]


class MergedGroup(Group):
    """DMC: all partial means lie side by side, each seen by its own query; later queries see those that were closed."""

    def _take(self, gates: Gates | None, k_BTKD: Tensor, v_BTKD: Tensor, rotation: Rotation | None) -> None:
        real, tokens = self.call.real_BT, torch.cat((k_BTKD, v_BTKD), dim=-1)
        weight = k_BTKD.new_ones(k_BTKD.shape[:3], dtype=torch.float32)
        alpha, keep = torch.zeros_like(weight), None
        if gates is not None and gates.alpha_BTK is not None:
            opens = self.call.position_BT == 0
            alpha, weight = gates.alpha_BTK.masked_fill(opens[..., None], 0.0), gates.weight_BTK
        if gates is not None:
            keep = gates.k_keep_KD
        self.merges_BKT = ((alpha > 0.5) & real[..., None]).transpose(1, 2)
        self.merged, past = (tokens, weight, alpha), self._past()
        means = pooled_real(*self.merged, self.bank.spec.window, real if self.call.padded else None, past)
        k, v = means.split((k_BTKD.shape[-1], v_BTKD.shape[-1]), dim=-1)
        self._lay_out(rotate(rotation, k, keep), v)
        self.mask = self._seen()

    def _past(self) -> tuple[Tensor, Tensor] | None:
        """The open entry's weighted tokens, oldest first: sums [B, W, K, 2D] and weights [B, W, K]."""
        if not any(self.call.before):
            return None
        ring = self.bank.state.ring[self.index][self.call.rows_B]
        width = ring.shape[2]
        column = self._columns(self.call.before_B, width)
        ring = ring.gather(2, column.expand(ring.shape)).transpose(1, 2)
        return ring[..., :-1], ring[..., -1]

    @staticmethod
    def _columns(seen_B: Tensor, width: int) -> Tensor:
        """Columns of the ring from its oldest token on, once so many have been seen: int64 [B, 1, W, 1]."""
        return ((seen_B[:, None] + torch.arange(width, device=seen_B.device)) % width)[:, None, :, None]

    def _closed(self) -> Tensor:
        """bool [B, K, T]: entries that no later token of the call is merged into."""
        after = from_next(self.merges_BKT.transpose(1, 2).float(), self.call.real_BT, 0.0)
        return (after < 0.5).transpose(1, 2) & self.call.real_BT[:, None]

    def _continued(self) -> Tensor:
        """bool [B, K]: the call's first real token is merged into the stored open entry."""
        return (self.merges_BKT & self.call.first_BT[:, None]).any(dim=2)

    def _seen(self) -> Tensor:
        seen, tokens = self.causal(self.position_BKE), self.call.real_BT.shape[1]
        own = torch.eye(tokens, dtype=torch.bool, device=seen.device)
        seen[..., self.stored :] &= own | self._closed().unsqueeze(2)
        if self.stored:
            seen[..., : self.stored] &= ~self._open_entry().unsqueeze(2)
        return self.with_padding(seen)

    def _open_entry(self) -> Tensor:
        """bool [B, K, S]: the last entry of a lane, where the call goes on with it."""
        last = self.bank.length.view(-1)[self.lanes_BK].long().unsqueeze(-1) - 1
        slot = torch.arange(self.stored, device=last.device)
        return (slot == last) & self._continued().unsqueeze(-1)

    def settle(self) -> None:
        """See `Group.settle`. Of each entry its last mean is stored; the open one's takes the place of the stored."""
        closed = self._closed()
        if self.stored:
            self.bank.privatise(self.lanes_BK)
            self.bank.drop_last(self.lanes_BK, self._continued())
        k, v = self.k_BEKD[:, self.stored :], self.v_BEKD[:, self.stored :]
        self.bank.append(self.lanes_BK, closed, k, v, self.call.position_BT, None)
        self._write_ring()

    def _write_ring(self) -> None:
        """The weighted tokens of the entry that is open now."""
        call, ring, past = self.call, self.bank.state.ring[self.index], self._past()
        order, _ = real_first(call.real_BT)
        tokens = (reordered(one, order) for one in self.merged)
        sums, weights = open_entries(*tokens, self.bank.spec.window, past, call.real_BT.sum(dim=1))
        held = torch.cat((sums, weights.unsqueeze(-1)), dim=-1).transpose(1, 2)
        column = self._columns(call.seen_B, held.shape[2]).expand(held.shape)
        ring[call.rows_B] = torch.zeros_like(held).scatter(2, column, held)
