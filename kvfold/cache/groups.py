"""What one owner and its readers attend to during a call of several tokens, and what of it goes into the store.

Stored entries and the call's own tokens lie side by side: `Group` for methods without gates; the gated ones are in
gated_groups.py. Letters: B rows, T tokens of the call, S stored, E = S + T entries, K kv heads, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.cache.bank import Bank
from kvfold.ops.gating import Gates
from kvfold.ops.rotation import Rotation, rotate
from kvfold.policies.base import Entries


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """The rows and tokens of a call."""

    rows_B: Tensor
    before: list[int]
    """Tokens that each row has seen before."""
    real_BT: Tensor
    """False at padding."""
    padded: bool
    """Whether there is any."""
    position_BT: Tensor
    """Real tokens before each token, -1 at padding."""
    seen_B: Tensor
    """Real tokens seen once the call is done."""

    @property
    def even(self) -> bool:
        """Whether all rows have seen equally many tokens before."""
        return len(set(self.before)) <= 1

    @property
    def before_B(self) -> Tensor:
        """`before` as a tensor, int64."""
        return self.seen_B - self.real_BT.sum(dim=1)

    @property
    def first_BT(self) -> Tensor:
        """The first real token of each row in this call."""
        return self.real_BT & (self.position_BT == self.before_B[:, None])

    @property
    def newest_BT(self) -> Tensor:
        """The newest real token of each row."""
        return self.real_BT & (self.position_BT == self.seen_B[:, None] - 1)


class Group:
    """Keys and values of stored entries and of the call, and the mask over them."""

    def __init__(self, bank: Bank, index: int, call: Call, k_BTKD: Tensor, v_BTKD: Tensor, rotation: Rotation | None,
                 gates: Gates | None):  # fmt: skip
        """k before rotary positions, as the view gets it."""
        self.bank, self.index, self.call = bank, index, call
        self.lanes_BK = bank.lanes(call.rows_B)[index]
        self.received_BKE: Tensor | None = None
        self._take(gates, k_BTKD, v_BTKD, rotation)

    def _take(self, gates: Gates | None, k_BTKD: Tensor, v_BTKD: Tensor, rotation: Rotation | None) -> None:
        self._lay_out(rotate(rotation, k_BTKD, None if gates is None else gates.k_keep_KD), v_BTKD)
        self.mask = self._mask()

    def _lay_out(self, k_BTKD: Tensor, v_BTKD: Tensor) -> None:
        """Stored entries first, then the call's."""
        bank, call = self.bank, self.call
        batch, tokens, heads, _ = k_BTKD.shape
        self.stored = stored = bank.most_kept(call.rows_B, call.before)
        own = call.position_BT[:, None].expand(batch, heads, tokens).int()
        self.k_BEKD, self.v_BEKD, self.position_BKE = k_BTKD, v_BTKD, own
        if stored == 0:
            self.flat_BKS = self.filled_BKS = None
            return
        self.flat_BKS, filled = bank.stored_slots(self.lanes_BK, stored)
        self.filled_BKS, whole = filled, bool(filled.all())
        old = []
        for pool in (bank.pool.k, bank.pool.v):
            gathered = pool.view(-1, pool.shape[-1])[self.flat_BKS].to(k_BTKD.dtype)
            old.append((gathered if whole else gathered.masked_fill(~filled.unsqueeze(-1), 0)).transpose(1, 2))
        position = bank.pool.position.view(-1)[self.flat_BKS].masked_fill(~filled, -1)
        self.position_BKE = torch.cat((position, own), dim=-1)
        self.k_BEKD, self.v_BEKD = torch.cat((old[0], k_BTKD), dim=1), torch.cat((old[1], v_BTKD), dim=1)

    def _mask(self) -> Tensor | None:
        """Which entries each query sees, bool [B or 1, 1 or K, T, E]; None = plain causal."""
        bank, call, stored = self.bank, self.call, self.stored
        query_BT, tokens = call.position_BT, call.position_BT.shape[1]
        plain = not call.padded and not bank.spec.lossy and bank.window is None and call.even
        if plain and stored == 0:
            return None
        if plain:
            index = torch.arange(stored + tokens, device=query_BT.device)
            return (index <= stored + torch.arange(tokens, device=query_BT.device)[:, None])[None, None]
        # With nothing stored all heads see alike.
        position = self.position_BKE if stored else self.position_BKE[:, :1]
        seen = self.causal(position)
        chosen = bank.policy.sees(query_BT, position)
        return self.with_padding(seen if chosen is None else seen & chosen)

    def causal(self, position_BKE: Tensor) -> Tensor:
        """Entries that are there, no later than the query, and within the architecture's window: bool [B, K, T, E]."""
        position, query = position_BKE.unsqueeze(2), self.call.position_BT[:, None, :, None]
        seen = (position >= 0) & (position <= query)
        return seen if self.bank.window is None else seen & (position > query - self.bank.window)

    def with_padding(self, seen_BKTE: Tensor) -> Tensor:
        """Padding sees itself, so that no softmax is empty."""
        if self.call.padded:
            own = torch.eye(self.call.real_BT.shape[1], dtype=torch.bool, device=seen_BKTE.device)
            seen_BKTE[..., self.stored :] |= own & ~self.call.real_BT[:, None, :, None]
        return seen_BKTE

    def settle(self) -> None:
        """All readers have attended: drop what must go, and store what stays."""
        bank, call, stored = self.bank, self.call, self.stored
        score = self.received_BKE
        if bank.policy.weights == "sum" and stored:
            bank.privatise(self.lanes_BK)
            flat, pool = bank.stored_slots(self.lanes_BK, stored)[0], bank.pool
            new = score[..., :stored].masked_fill(~self.filled_BKS, 0)
            pool.score.view(-1).index_add_(0, flat.reshape(-1), new.reshape(-1))
            score = torch.cat((pool.score.view(-1)[flat], score[..., stored:]), dim=-1)
        entries = Entries(position_BKE=self.position_BKE, score_BKE=score, seen_B=call.seen_B)
        keep = bank.policy.keep(entries)
        if keep is None:
            keep = torch.ones((), dtype=torch.bool, device=self.lanes_BK.device).expand(self.position_BKE.shape)
        self.store(keep, None if score is None else score[..., stored:])

    def store(self, keep_BKE: Tensor, score_BKT: Tensor | None) -> None:
        """Drop the stored entries that don't stay, and append the call's that do."""
        stored, real, bank = self.stored, self.call.real_BT, self.bank
        if stored:
            # A call of padding alone is no step for its row.
            gone = self.filled_BKS & ~keep_BKE[..., :stored] & real.any(dim=1)[:, None, None]
            if bool(gone.any()):
                bank.drop(self.lanes_BK, ~gone)
        chosen = keep_BKE[..., stored:] & real[:, None]
        k, v = self.k_BEKD[:, stored:], self.v_BEKD[:, stored:]
        bank.append(self.lanes_BK, chosen, k, v, self.call.position_BT, score_BKT)
