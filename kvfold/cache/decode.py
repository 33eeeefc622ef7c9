"""The decoding segment of a call: one real token for each of its sequences, attended over pages where they lie.

Where a method knows from the tokens alone what leaves, or learned it tokens ago, all owners of a group place their tokens
at once, before any layer (`EvictBeforeStep`). A method that merges places at its layer (`MergeStep`); pages that it may need are
allocated ahead, and what was not needed is free again when the step ends. One whose entries leave at the borders of a grid
appends, and merges and evicts at its layer (`GridStep`). One that scores by attention keeps the token beside the store until
the last reader is done (`EvictAfterStep`). No layer asks the host anything, but at a border.
Letters: O owners of a group, B sequences, K kv heads, D head dim, N slots a page, S stored entries, E = S + 1.
"""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from kvfold.cache.group import CacheGroup
from kvfold.cache.store import Batch, Store
from kvfold.methods.base import Method
from kvfold.methods.plans import Entries, Streams
from kvfold.ops.gating import Gates
from kvfold.ops.paged import DecodeBatch, decode_attention
from kvfold.ops.rotation import Rotation, rotate, rotate_queries


class DecodeSegment:
    """Sequences that bring one token each."""

    def __init__(self, store: Store, batch: Batch):
        self._batch, self._layers = batch, store.place_of_layer
        self._steps = {id(group): step_of(group.method)(group, batch) for group in store.groups}

    def attend(
        self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor | None, v_BTKD: Tensor | None, rotation: Rotation | None,
        gates: Gates | None = None,
    ) -> Tensor:  # fmt: skip
        """See `KVView`."""
        group, index = self._layers[layer]
        step = self._steps[id(group)]
        k_BKD, v_BKD = step.new_token(index, k_BTKD, v_BTKD, rotation, gates)
        q_BHD = rotate_queries(rotation, q_BTHD, None if gates is None else gates.q_keep_HD)[:, 0]
        batch = step.described(index)
        out = decode_attention(batch, q_BHD, k_BKD, v_BKD, scale=self._batch.scale, softcap=self._batch.softcap)
        return out.unsqueeze(1)

    def close(self) -> None:
        """All layers have attended."""
        for step in self._steps.values():
            step.close()

    def abandon(self) -> None:
        """The call has failed."""
        for step in self._steps.values():
            step.return_unused()


class EvictBeforeStep:
    """One decoding step of a cache group whose tokens find their places before any layer has run."""

    def __init__(self, group: CacheGroup, batch: Batch):
        self.group, self.batch, ids = group, batch, group.ids(batch.index_B)
        # No stream holds more entries before this step.
        self.stored = max(map(group.most_stored, batch.sequences, batch.before))
        self.streams = Streams(
            position_B=batch.position_B, length_OBK=group.lengths(ids).long(), id_OBK=ids, state_X=group.flat_state,
            stored_positions=lambda: group.stored_positions(ids, self.stored),
        )  # fmt: skip
        self.start_OBK, self.plan = group.starts(ids), group.method.open_step(self.streams)
        self.oldest_B = None if group.window is None else (batch.position_B - group.window + 1).int()
        self._place()

    def _place(self) -> None:
        """Every new token has its slot, all owners at once."""
        place = self.plan.overwritten()
        if place is None:
            place = self._room(self.plan.evicted() if self.stored else None)
        if self.group.has_shared:
            self.group.copy_for_slot(self.streams.id_OBK, place)
        grows, length = place == self.streams.length_OBK, self.streams.length_OBK
        border = grows & (length % self.group.pool.slots == 0)
        number = int(border.sum())
        if number:
            self._extend(border, length, number)
        self.plan.placed(place)
        self.lengths_OBK = (length + grows).int()
        self.slot_OBK = self._note(slice(None), place, self.lengths_OBK)

    def _extend(self, border: Tensor, length: Tensor, number: int) -> None:
        """A page for each stream that crosses a page border."""
        table = self.start_OBK[border] + length[border] // self.group.pool.slots
        self.group.tables.flat[table] = self.group.pool.allocate(number)

    def _note(self, owners: slice | int, place: Tensor, length: Tensor) -> Tensor:
        """Note positions and lengths of the new tokens; gives their flat slots, int64."""
        pool, slots = self.group.pool, self.group.pool.slots
        slot = self.group.tables.flat[self.start_OBK[owners] + place // slots].long() * slots + place % slots
        pool.arrays["position"].view(-1)[slot] = self.batch.position_B.int()[:, None].expand_as(slot)
        if pool.slot_arrays:
            pool.write_state(slot.reshape(-1), {})
        self.group.length.view(-1)[self.streams.id_OBK[owners]] = length
        return slot

    def _room(self, gone_OBKS: Tensor | None, stays_OBK: Tensor | int = 1) -> Tensor:
        """Where the new token of each stream goes. One entry gone and one come: it takes that slot, and nothing else moves.
        Any other number gone: the stream is closed up, and the token goes behind. `stays_OBK`: streams that store theirs.
        """
        if gone_OBKS is None or gone_OBKS.shape[-1] == 0:
            return self.streams.length_OBK
        number = gone_OBKS.sum(dim=-1)
        uneven = number > stays_OBK
        if bool(uneven.any()):
            self._close_up(uneven, gone_OBKS)
            number = number.masked_fill(uneven, 0)
        return torch.where(number == 1, gone_OBKS.to(torch.uint8).argmax(dim=-1), self.streams.length_OBK)

    def _close_up(self, uneven_OBK: Tensor, gone_OBKS: Tensor) -> None:
        """Evict what does not make room one for one."""
        ids = self.streams.id_OBK
        self.group.evict(ids[uneven_OBK], ~gone_OBKS[uneven_OBK])
        self.streams = replace(self.streams, length_OBK=self.group.lengths(ids).long())

    def new_token(
        self, index: int, k_B1KD: Tensor | None, v_B1KD: Tensor | None, rotation: Rotation | None, gates: Gates | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Key (rotated) and value [B, K, D] of an owner's new token; None in a reader, whose owner has stored it."""
        if k_B1KD is None:
            return None, None
        k_B1KD, v_B1KD = self._entered(index, k_B1KD, v_B1KD, gates)
        return rotate(rotation, k_B1KD, None if gates is None else gates.k_keep_KD)[:, 0], v_B1KD[:, 0]

    def _entered(self, index: int, k_B1KD: Tensor, v_B1KD: Tensor, gates: Gates | None) -> tuple[Tensor, Tensor]:
        """What takes the new token's place in the attention of an owner's layer, before it is rotated."""
        self.plan.enter(index, gates, k_B1KD[:, 0], v_B1KD[:, 0])
        return k_B1KD, v_B1KD

    def described(self, index: int) -> DecodeBatch:
        """What attention needs to know of one owner's streams."""
        pool, arrays = self.group.pool, self.group.pool.arrays
        return DecodeBatch(
            k_PND=arrays["k"], v_PND=arrays["v"], k_scale_PNS=arrays.get("k_scale"), v_scale_PNS=arrays.get("v_scale"),
            position_PN=arrays["position"], bias_PN=arrays.get(self.group.method.bias_array), oldest_B=self.oldest_B,
            table_T=self.group.tables.flat, start_BK=self.start_OBK[index], length_BK=self.lengths_OBK[index],
            max_length=self.stored + 1, head_dim=pool.page_class.head_dim, slots_BK=self.slot_OBK[index],
        )  # fmt: skip

    def close(self) -> None:
        """All layers have attended."""
        self.plan.close()

    def return_unused(self) -> None:
        """Nothing was allocated ahead."""


class GridStep(EvictBeforeStep):
    """Tokens are appended; where a sequence comes to a border of the method's grid, entries are merged and leave once the
    owner's layer is reached, since its gates say how.
    """

    def _place(self) -> None:
        super()._place()
        grid = self.group.method.grid
        self._rows = [row for row, before in enumerate(self.batch.before) if before and before % grid == 0]

    def _entered(self, index: int, k_B1KD: Tensor, v_B1KD: Tensor, gates: Gates | None) -> tuple[Tensor, Tensor]:
        noted = self.group.method.noted(gates, None)
        if noted:
            slot = self.slot_OBK[index].reshape(-1)
            self.group.pool.write_state(slot, {name: one[:, 0].reshape(-1) for name, one in noted.items()})
        before = self.group.method.noted_before(gates)
        if before:
            self.group.note_before(self.streams.id_OBK[index], self.streams.length_OBK[index], before)
        if self._rows:
            self._cross(index, gates)
        return k_B1KD, v_B1KD

    def _cross(self, index: int, gates: Gates | None) -> None:
        """The new token is the last of its stream before and after."""
        row = torch.tensor(self._rows, device=self.slot_OBK.device)
        group, ids = self.group, self.streams.id_OBK[index, row]
        group.cross(ids, self.batch.position_B[row], gates)
        length = group.lengths(ids)
        self.lengths_OBK[index, row] = length
        self.slot_OBK[index, row] = group.slots_at(ids, length.long() - 1)


class MergeStep(EvictBeforeStep):
    """The new token's place is known when its owner's layer is reached."""

    def _place(self) -> None:
        self.group.copy_on_write(self.streams.id_OBK)
        length = self.streams.length_OBK
        self.slot_OBK, self.lengths_OBK = torch.zeros_like(length), length.int()
        # A page for each stream that may cross a page border, by how many stand before it; of no meaning elsewhere.
        self._border_OBK = length % self.group.pool.slots == 0
        self._ahead = self.group.pool.allocate(int(self._border_OBK.sum()))
        self._order_OBK = (self._border_OBK.view(-1).cumsum(0) - 1).clamp(min=0).view_as(length)
        self._used = torch.zeros_like(self._ahead)

    def _entered(self, index: int, k_B1KD: Tensor, v_B1KD: Tensor, gates: Gates | None) -> tuple[Tensor, Tensor]:
        entered = self.plan.enter(index, gates, k_B1KD[:, 0], v_B1KD[:, 0])
        length = self.streams.length_OBK[index]
        grows = entered.place_BK == length
        if self._ahead.numel():
            used, order, table = grows & self._border_OBK[index], self._order_OBK[index], self.group.tables.flat
            # A stream that needs no page writes where nobody reads.
            where = torch.where(used, self.start_OBK[index] + length // self.group.pool.slots, table.shape[0] - 1)
            table[where] = self._ahead[order]
            self._used.index_add_(0, order.view(-1), used.view(-1).int())
        self.lengths_OBK[index] = (length + grows).int()
        self.slot_OBK[index] = self._note(index, entered.place_BK, self.lengths_OBK[index])
        return entered.k_BKD.unsqueeze(1), entered.v_BKD.unsqueeze(1)

    def return_unused(self) -> None:
        """Pages that were allocated ahead and not needed are free again."""
        self.group.pool.unused(self._ahead, self._used == 0)
        self._ahead, self._used = self._ahead[:0], self._used[:0]

    close = return_unused


class EvictAfterStep(EvictBeforeStep):
    """The new token waits beside the store; what its attention tells decides what stays."""

    def _place(self) -> None:
        self.group.copy_on_write(self.streams.id_OBK)
        pool, shape = self.group.pool, self.streams.id_OBK.shape
        self._kv = [
            torch.empty((*shape, pool.page_class.head_dim), dtype=pool.dtype, device=pool.device) for _ in range(2)
        ]
        self._wants_old = self.group.method.attention_scores == "last"
        columns = self.stored + 1 if self._wants_old else 1
        self._received = torch.zeros((*shape, columns), dtype=torch.float32, device=self.start_OBK.device)
        self.lengths_OBK, self.slot_OBK = self.streams.length_OBK.int(), (None,) * shape[0]

    def new_token(
        self, index: int, k_B1KD: Tensor | None, v_B1KD: Tensor | None, rotation: Rotation | None, gates: Gates | None
    ) -> tuple[Tensor, Tensor]:
        """See `EvictBeforeStep.new_token`; readers see the waiting token too."""
        k, v = (one[index] for one in self._kv)
        if k_B1KD is not None:
            keep = None if gates is None else gates.k_keep_KD
            k[:], v[:] = rotate(rotation, k_B1KD, keep)[:, 0], v_B1KD[:, 0]
        return k, v

    def described(self, index: int) -> DecodeBatch:
        """See `EvictBeforeStep.described`; the waiting token has no slot, and what entries receive is asked for."""
        score = None if self._wants_old else self.group.pool.arrays["score"]
        return replace(
            super().described(index), max_length=self.stored, score_PN=score, received_BKE=self._received[index],
            received_old=self._wants_old,
        )  # fmt: skip

    def close(self) -> None:
        """Ask the method, then store the new tokens (or not) and evict what must leave."""
        group, method, ids = self.group, self.group.method, self.streams.id_OBK
        slot, filled = group.stored_slots(ids, self.stored)
        position = group.pool.position.view(-1)[slot].masked_fill(~filled, -1)
        new = self.batch.position_B.int()[:, None].expand(ids.shape).unsqueeze(-1)
        position, score, owners = torch.cat((position, new), dim=-1), self._received, ids.shape[0]
        if not self._wants_old:
            score = torch.cat((group.pool.arrays["score"].view(-1)[slot], score), dim=-1)
        seen_B = (self.batch.position_B + 1).repeat(owners)
        keep = method.retain(Entries(position_BKE=position.flatten(0, 1), score_BKE=score.flatten(0, 1), seen_B=seen_B))
        keep = torch.ones_like(position, dtype=torch.bool) if keep is None else keep.view(owners, -1, *keep.shape[1:])
        stays = keep[..., -1]
        self._store_waiting(self._room(filled & ~keep[..., :-1], stays.long()), stays)

    def _store_waiting(self, place: Tensor, stays: Tensor) -> None:
        """Write the tokens that waited."""
        group, pool, length = self.group, self.group.pool, self.streams.length_OBK
        grows = stays & (place == length)
        border = grows & (length % pool.slots == 0)
        number = int(border.sum())
        if number:
            self._extend(border, length, number)
        # At once, so that pages just allocated are freed with the sequence should the call die below.
        group.length.view(-1)[self.streams.id_OBK] = (length + grows).int()
        place = place.masked_fill(~stays, 0)
        slot = group.tables.flat[self.start_OBK + place // pool.slots].long() * pool.slots + place % pool.slots
        chosen = slice(None) if bool(stays.all()) else stays.reshape(-1)
        slot = slot.reshape(-1)[chosen]
        pool.write(slot, *(x.flatten(0, 2)[chosen] for x in self._kv))
        position = self.batch.position_B.int()[:, None].expand_as(stays).reshape(-1)
        pool.position.view(-1).index_copy_(0, slot, position[chosen])
        pool.write_state(slot, {"score": self._received[..., -1].reshape(-1)[chosen]})


@lru_cache
def step_of(method: Method) -> type[EvictBeforeStep]:
    """How a method finds the places of new tokens."""
    if method.attention_scores is not None:
        return EvictAfterStep
    if method.grid is not None:
        return GridStep
    return MergeStep if method.places_at_layer else EvictBeforeStep
