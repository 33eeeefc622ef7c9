"""The store view: what a layer hands over goes into the store, and is attended to there.

A call of one token a row reads pages where they lie (ops/paged.py). A longer call attends over what was stored before
and its own tokens side by side (ops/attention.py), then stores those of its tokens that stay: what is dropped at once
is never written. Letters: B rows, T tokens of the call, H query heads, K kv heads.
"""

import torch
from torch import Tensor

from kvfold.cache.bank import Bank
from kvfold.cache.gated_groups import FlaggedGroup, MergedGroup
from kvfold.cache.gated_steps import FlaggedStep, MergedStep
from kvfold.cache.groups import Call, Group
from kvfold.cache.steps import PlacedStep, WeighedStep
from kvfold.cache.store import Store
from kvfold.ops.attention import dense_attention, weighed_attention
from kvfold.ops.gating import Gates
from kvfold.ops.paged import DecodeLanes, decode_attention
from kvfold.ops.rotation import Rotation, rotate, rotate_queries

_GROUPS = {None: Group, "flag": FlaggedGroup, "merge": MergedGroup}
_STEPS = {None: PlacedStep, "flag": FlaggedStep, "merge": MergedStep}
"""By what gates decide."""


class StepView:
    """A call that brings one token a row."""

    def __init__(self, store: Store, rows_B: Tensor, real_BT: Tensor | None, before: list[int], scale: float,
                 softcap: float | None):  # fmt: skip
        """`before`: tokens that each row has seen before this call."""
        self._store, self._layout, self._rows_B = store, store.layout, rows_B
        self._scale, self._softcap = scale, softcap
        self._live_B = None if real_BT is None else real_BT[:, 0].contiguous()
        self._position_B = store.seen[rows_B]
        self._steps: dict[int, PlacedStep | WeighedStep | MergedStep] = {}
        self._lines: dict[int, tuple] = {}
        for bank in store.banks:
            step = self._step(bank, bank.most_kept(rows_B, before))
            self._steps[id(bank)] = step
            # Cut apart once a call, not once a layer.
            self._lines[id(bank)] = tuple(x.unbind() for x in (bank.table, bank.length, step.of_owners))

    def _step(self, bank: Bank, stored: int) -> PlacedStep | WeighedStep | MergedStep:
        arguments = (bank, self._rows_B, self._position_B, self._live_B, stored)
        if bank.policy.weights is not None:
            return WeighedStep(*arguments, bank.pool.page_class.head_dim)
        return _STEPS[bank.policy.gate](*arguments)

    def attend(
        self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor | None, v_BTKD: Tensor | None, rotation: Rotation | None,
        gates: Gates | None = None,
    ) -> Tensor:  # fmt: skip
        """See `KVView`."""
        owner = self._layout.owner_of(layer)
        bank, index = self._store.place_of[owner]
        step, (table, length, of_owners) = self._steps[id(bank)], self._lines[id(bank)]
        k = v = slots = received = score = oldest = None
        if isinstance(step, MergedStep):
            if owner == layer:
                k, v, slots = step.merge(index, gates, k_BTKD[:, 0], v_BTKD[:, 0])
                k = rotate(rotation, k.unsqueeze(1), None if gates is None else gates.k_keep_KD)[:, 0]
        elif owner == layer:
            k, v = rotate(rotation, k_BTKD, None if gates is None else gates.k_keep_KD)[:, 0], v_BTKD[:, 0]
        if isinstance(step, PlacedStep):
            slots = of_owners[index]
            if isinstance(step, FlaggedStep) and owner == layer:
                step.flag(index, gates)
        elif isinstance(step, WeighedStep):
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
        q_BHD = rotate_queries(rotation, q_BTHD, None if gates is None else gates.q_keep_HD)[:, 0]
        return decode_attention(lanes, q_BHD, k, v, scale=self._scale, softcap=self._softcap).unsqueeze(1)

    def close(self) -> None:
        """All layers have attended: what a step drops, it drops now."""
        for step in self._steps.values():
            if isinstance(step, WeighedStep):
                step.close()


class CallView:
    """A call of several tokens a row."""

    def __init__(self, store: Store, rows_B: Tensor, real_BT: Tensor | None, num_tokens: int, before: list[int],
                 scale: float, softcap: float | None):  # fmt: skip
        """`before`: tokens that each row has seen before this call."""
        self._store, self._layout, self._scale, self._softcap = store, store.layout, scale, softcap
        seen, padded = store.seen[rows_B], real_BT is not None
        if real_BT is None:
            real_BT = torch.ones((rows_B.shape[0], num_tokens), dtype=torch.bool, device=seen.device)
        order = real_BT.long().cumsum(dim=1)
        self._call = Call(
            rows_B=rows_B, before=before, real_BT=real_BT, padded=padded, seen_B=seen + order[:, -1],
            position_BT=(seen[:, None] + order - 1).masked_fill(~real_BT, -1),
        )  # fmt: skip
        self._groups: dict[int, Group] = {}

    def attend(
        self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor | None, v_BTKD: Tensor | None, rotation: Rotation | None,
        gates: Gates | None = None,
    ) -> Tensor:  # fmt: skip
        """See `KVView`."""
        owner = self._layout.owner_of(layer)
        bank, index = self._store.place_of[owner]
        if owner == layer:
            self._groups[owner] = _GROUPS[bank.policy.gate](bank, index, self._call, k_BTKD, v_BTKD, rotation, gates)
        group = self._groups[owner]
        q = rotate_queries(rotation, q_BTHD, None if gates is None else gates.q_keep_HD)
        common = {"scale": self._scale, "softcap": self._softcap, "mask": group.mask}
        if bank.policy.weights is None:
            out = dense_attention(q, group.k_BEKD, group.v_BEKD, **common)
        else:
            weigh = self._call.real_BT if bank.policy.weights == "sum" else self._call.newest_BT
            out, received = weighed_attention(q, group.k_BEKD, group.v_BEKD, weigh_BT=weigh, **common)
            group.received_BKE = received if group.received_BKE is None else group.received_BKE + received
        if layer == self._layout.last_reader(owner):
            self._groups.pop(owner).settle()
        return out

    def close(self) -> None:
        """Every group was settled when its last reader had attended."""
