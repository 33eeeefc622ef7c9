"""The store view: what a layer hands over goes into the store, and is attended to there.

A call of one token a row reads pages where they lie (ops/paged.py). A longer call attends over what was stored before
and its own tokens side by side (ops/attention.py), then stores those of its tokens that stay: what is dropped at once
is never written. Letters: B rows, T tokens of the call, S stored, E = S + T entries, H query heads, K kv heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.cache.bank import Bank
from kvfold.cache.steps import PlacedStep, WeighedStep
from kvfold.cache.store import Store
from kvfold.ops.attention import dense_attention, weighed_attention
from kvfold.ops.paged import DecodeLanes, decode_attention
from kvfold.ops.rotation import Rotation, rotate
from kvfold.policies.base import Entries


class StepView:
    """A call that brings one token a row."""

    def __init__(self, store: Store, rows_B: Tensor, real_BT: Tensor | None, before: list[int], scale: float,
                 softcap: float | None):  # fmt: skip
        """`before`: tokens that each row has seen before this call."""
        self._store, self._layout, self._rows_B = store, store.layout, rows_B
        self._scale, self._softcap = scale, softcap
        self._live_B = None if real_BT is None else real_BT[:, 0].contiguous()
        self._position_B = store.seen[rows_B]
        self._steps: dict[int, PlacedStep | WeighedStep] = {}
        self._lines: dict[int, tuple] = {}
        for bank in store.banks:
            stored = bank.most_kept(before)
            arguments = (bank, rows_B, self._position_B, self._live_B, stored)
            placed = bank.policy.weights is None
            head_dim = bank.pool.page_class.head_dim
            step = PlacedStep(*arguments) if placed else WeighedStep(*arguments, head_dim)
            self._steps[id(bank)] = step
            # Cut apart once a call, not once a layer.
            self._lines[id(bank)] = tuple(x.unbind() for x in (bank.table, bank.length, step.of_owners))

    def attend(
        self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor | None, v_BTKD: Tensor | None, rotation: Rotation | None
    ) -> Tensor:
        """See `KVView`."""
        owner = self._layout.owner_of(layer)
        bank, index = self._store.place_of[owner]
        step, (table, length, of_owners) = self._steps[id(bank)], self._lines[id(bank)]
        k = v = slots = received = score = oldest = None
        if owner == layer:
            k, v = rotate(rotation, k_BTKD)[:, 0], v_BTKD[:, 0]
        if isinstance(step, PlacedStep):
            slots = of_owners[index]
        else:
            if owner == layer:
                step.k_OBKD[index], step.v_OBKD[index] = k, v
            k, v = step.k_OBKD[index], step.v_OBKD[index]
            received = of_owners[index]
            score = bank.pool.score if bank.policy.weights == "sum" else None
        if bank.window is not None:
            oldest = (self._position_B - bank.window + 1).int()
        lanes = DecodeLanes(
            k_PND=bank.pool.k, v_PND=bank.pool.v, position_PN=bank.pool.position, score_PN=score,
            table_RKM=table[index], length_RK=length[index], rows_B=self._rows_B, max_length=step.longest,
            slots_BK=slots, live_B=self._live_B, oldest_B=oldest, received_BKE=received,
            received_old=received is not None and step.wants_old,
        )  # fmt: skip
        q_BHD = rotate(rotation, q_BTHD)[:, 0]
        return decode_attention(lanes, q_BHD, k, v, scale=self._scale, softcap=self._softcap).unsqueeze(1)

    def close(self) -> None:
        """All layers have attended: what a step drops, it drops now."""
        for step in self._steps.values():
            if isinstance(step, WeighedStep):
                step.close()


@dataclass(slots=True)
class _Group:
    """What one owner and its readers share during a call."""

    k_BEKD: Tensor
    v_BEKD: Tensor
    mask: Tensor | None
    position_BKE: Tensor
    stored_slots: tuple[Tensor, Tensor] | None
    received_BKE: Tensor | None = None


class CallView:
    """A call of several tokens a row."""

    def __init__(self, store: Store, rows_B: Tensor, real_BT: Tensor | None, num_tokens: int, before: list[int],
                 scale: float, softcap: float | None):  # fmt: skip
        """`before`: tokens that each row has seen before this call."""
        self._store, self._layout, self._rows_B, self._real_BT = store, store.layout, rows_B, real_BT
        self._before, self._scale, self._softcap = before, scale, softcap
        seen, batch = store.seen[rows_B], rows_B.shape[0]
        if real_BT is None:
            self._real_BT = torch.ones((batch, num_tokens), dtype=torch.bool, device=seen.device)
        self._padded = real_BT is not None
        order = self._real_BT.long().cumsum(dim=1)
        self._position_BT = (seen[:, None] + order - 1).masked_fill(~self._real_BT, -1)
        self._seen_B = seen + order[:, -1]
        self._even = len(set(before)) <= 1
        self._groups: dict[int, _Group] = {}

    def attend(
        self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor | None, v_BTKD: Tensor | None, rotation: Rotation | None
    ) -> Tensor:
        """See `KVView`."""
        owner = self._layout.owner_of(layer)
        bank, index = self._store.place_of[owner]
        if owner == layer:
            self._groups[owner] = self._open(bank, index, rotate(rotation, k_BTKD), v_BTKD)
        group, q = self._groups[owner], rotate(rotation, q_BTHD)
        common = {"scale": self._scale, "softcap": self._softcap, "mask": group.mask}
        if bank.policy.weights is None:
            out = dense_attention(q, group.k_BEKD, group.v_BEKD, **common)
        else:
            weigh = self._real_BT if bank.policy.weights == "sum" else self._newest_BT()
            out, received = weighed_attention(q, group.k_BEKD, group.v_BEKD, weigh_BT=weigh, **common)
            group.received_BKE = received if group.received_BKE is None else group.received_BKE + received
        if layer == self._layout.last_reader(owner):
            self._settle(bank, index, self._groups.pop(owner))
        return out

    def close(self) -> None:
        """Every group was settled when its last reader had attended."""

    def _newest_BT(self) -> Tensor:
        """The newest real token of each row."""
        return self._real_BT & (self._position_BT == self._seen_B[:, None] - 1)

    def _open(self, bank: Bank, index: int, k_BTKD: Tensor, v_BTKD: Tensor) -> _Group:
        batch, tokens, heads, _ = k_BTKD.shape
        stored = bank.most_kept(self._before)
        position = self._position_BT[:, None].expand(batch, heads, tokens).int()
        if stored == 0:
            return _Group(k_BTKD, v_BTKD, self._mask(bank, position[:, :1], 0), position, None)
        flat, filled = bank.stored_slots(bank.lanes(self._rows_B)[index], stored)
        whole = bool(filled.all())
        old = []
        for pool in (bank.pool.k, bank.pool.v):
            gathered = pool.view(-1, pool.shape[-1])[flat].to(k_BTKD.dtype)
            old.append((gathered if whole else gathered.masked_fill(~filled.unsqueeze(-1), 0)).transpose(1, 2))
        old_position = bank.pool.position.view(-1)[flat].masked_fill(~filled, -1)
        position = torch.cat((old_position, position), dim=-1)
        k, v = torch.cat((old[0], k_BTKD), dim=1), torch.cat((old[1], v_BTKD), dim=1)
        return _Group(k, v, self._mask(bank, position, stored), position, (flat, filled))

    def _mask(self, bank: Bank, position_BKE: Tensor, stored: int) -> Tensor | None:
        """Which entries each query sees, bool [B or 1, 1 or K, T, E]; None = plain causal. Padding sees itself."""
        query_BT, tokens = self._position_BT, self._position_BT.shape[1]
        plain = not self._padded and not bank.spec.lossy and bank.window is None and self._even
        if plain and stored == 0:
            return None
        if plain:
            index = torch.arange(stored + tokens, device=query_BT.device)
            return (index <= stored + torch.arange(tokens, device=query_BT.device)[:, None])[None, None]
        position = position_BKE.unsqueeze(2)
        seen = (position >= 0) & (position <= query_BT[:, None, :, None])
        if bank.window is not None:
            seen &= position > query_BT[:, None, :, None] - bank.window
        chosen = bank.policy.sees(query_BT, position_BKE)
        if chosen is not None:
            seen &= chosen
        if self._padded:
            own = torch.eye(tokens, dtype=torch.bool, device=seen.device)
            seen[..., stored:] |= own & ~self._real_BT[:, None, :, None]
        return seen

    def _settle(self, bank: Bank, index: int, group: _Group) -> None:
        lanes, stored = bank.lanes(self._rows_B)[index], group.position_BKE.shape[-1] - self._real_BT.shape[1]
        score, pool = group.received_BKE, bank.pool
        if bank.policy.weights == "sum" and stored:
            flat, filled = group.stored_slots
            bank.privatise(lanes)
            flat = bank.stored_slots(lanes, stored)[0]
            pool.score.view(-1).index_add_(0, flat.reshape(-1), score[..., :stored].masked_fill(~filled, 0).reshape(-1))
            score = torch.cat((pool.score.view(-1)[flat], score[..., stored:]), dim=-1)
        entries = Entries(position_BKE=group.position_BKE, score_BKE=score, seen_B=self._seen_B)
        keep = bank.policy.keep(entries)
        if keep is None:
            keep = torch.ones((), dtype=torch.bool, device=lanes.device).expand(group.position_BKE.shape)
        if group.stored_slots is not None:
            # A call of padding alone is no step for its row.
            gone = group.stored_slots[1] & ~keep[..., :stored] & self._real_BT.any(dim=1)[:, None, None]
            if bool(gone.any()):
                bank.drop(lanes, ~gone)
        chosen = keep[..., stored:] & self._real_BT[:, None]
        k, v = group.k_BEKD[:, stored:], group.v_BEKD[:, stored:]
        bank.append(lanes, chosen, k, v, self._position_BT, None if score is None else score[..., stored:])
