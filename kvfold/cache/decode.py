"""The decoding segment of a call: one real token for each of its sequences, attended over pages where they lie.

Where a method knows from the tokens alone what leaves, or learned it tokens ago, all owners of a group place their tokens
at once, before any layer (`_Step`). A method that merges places at its layer; one that scores by attention keeps the token
beside the store until the last reader is done. Pages that a step may need are allocated ahead, one for each stream that
stands at a page border; what was not needed is free again when the step ends, and no layer asks the host anything.
Letters: O owners of a group, B sequences, K kv heads, D head dim, N slots a page, S stored entries, E = S + 1.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfold.cache.group import CacheGroup
from kvfold.cache.store import Store
from kvfold.methods.plans import Entries, Streams
from kvfold.ops.gating import Gates
from kvfold.ops.paged import DecodeBatch, decode_attention
from kvfold.ops.rotation import Rotation, rotate, rotate_queries

if TYPE_CHECKING:
    from kvfold.cache.call import Batch


class DecodeSegment:
    """Sequences that bring one token each."""

    def __init__(self, store: Store, batch: "Batch"):
        self._layout, self._place_of, self._batch = store.layout, store.place_of, batch
        index_B = torch.tensor(batch.sequences, dtype=torch.int64, device=store.device)
        self._position_B = store.seen[index_B]
        # Where each sequence's real token stands among the columns.
        self._column_B = None
        if batch.columns > 1:
            self._column_B = batch.real_BT.to(torch.uint8).argmax(dim=1)
        before = [store.seen_tokens(one) for one in batch.sequences]
        self._steps = {
            id(group): _Step(group, index_B, self._position_B, group.most_stored(batch.sequences, before))
            for group in store.groups
        }

    def attend(
        self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor | None, v_BTKD: Tensor | None, rotation: Rotation | None,
        gates: Gates | None = None,
    ) -> Tensor:  # fmt: skip
        """See `KVView`."""
        columns = q_BTHD.shape[1]
        if self._column_B is not None:
            index = self._column_B
            q_BTHD, k_BTKD, v_BTKD = (None if x is None else _column(x, index) for x in (q_BTHD, k_BTKD, v_BTKD))
            rotation = None if rotation is None else rotation.column(index)
            gates = None if gates is None else gates.column(index)
        out = self._attended(layer, q_BTHD, k_BTKD, v_BTKD, rotation, gates)
        if self._column_B is None:
            return out.unsqueeze(1)
        spread = out.new_zeros((out.shape[0], columns, *out.shape[1:]))
        return spread.index_put_((torch.arange(out.shape[0], device=out.device), self._column_B), out)

    def _attended(
        self, layer: int, q_B1HD: Tensor, k_B1KD: Tensor | None, v_B1KD: Tensor | None, rotation: Rotation | None,
        gates: Gates | None,
    ) -> Tensor:  # fmt: skip
        """[B, H, D]."""
        owner = self._layout.owner_of(layer)
        group, index = self._place_of[owner]
        step = self._steps[id(group)]
        k_BKD = v_BKD = None
        if owner == layer:
            k_BKD, v_BKD = step.enter(index, k_B1KD, v_B1KD, rotation, gates)
        elif step.waits:
            k_BKD, v_BKD = step.k_OBKD[index], step.v_OBKD[index]
        q_BHD = rotate_queries(rotation, q_B1HD, None if gates is None else gates.q_keep_HD)[:, 0]
        batch = step.described(index)
        return decode_attention(batch, q_BHD, k_BKD, v_BKD, scale=self._batch.scale, softcap=self._batch.softcap)

    def close(self) -> None:
        """All layers have attended."""
        for step in self._steps.values():
            step.close()

    def abandon(self) -> None:
        """The call has failed."""
        for step in self._steps.values():
            step.return_unused()


class _Step:
    """One decoding step of a cache group."""

    def __init__(self, group: CacheGroup, index_B: Tensor, position_B: Tensor, stored: int):
        """`stored`: no stream holds more entries before this step."""
        self._group, self._position_B, self._stored = group, position_B, stored
        method, self._pool = group.method, group.pool
        self._id_OBK = group.ids(index_B)
        self.waits = method.attention_scores is not None
        if group.has_shared:
            group.copy_on_write(self._id_OBK, open_only=not method.lossy)
        self._start_OBK = group.starts(self._id_OBK)
        self._length_OBK = group.lengths(self._id_OBK).long()
        self._ahead: Tensor | None = None
        self._plan = method.open_step(
            Streams(
                position_B=position_B, length_OBK=self._length_OBK, id_OBK=self._id_OBK, state_X=group.flat_state,
                stored_positions=lambda: group.stored_positions(self._id_OBK, stored),
            )
        )  # fmt: skip
        self._oldest_B = None if group.window is None else (position_B - group.window + 1).int()
        self._slot_OBK: Tensor | None = None
        if self.waits:
            shape = (*self._id_OBK.shape, self._pool.page_class.head_dim)
            self.k_OBKD, self.v_OBKD = (
                torch.empty(shape, dtype=self._pool.page_class.dtype, device=position_B.device) for _ in range(2)
            )
            self._wants_old = method.attention_scores == "last"
            columns = stored + 1 if self._wants_old else 1
            self._received = torch.zeros((*self._id_OBK.shape, columns), dtype=torch.float32, device=position_B.device)
        else:
            place = None if self._plan.at_layer else self._placed_before()
            self._allocate_ahead(place)
            self._lengths_OBK = self._length_OBK.int()
            if place is None:
                self._slot_OBK = torch.empty_like(self._id_OBK)
            else:
                self._plan.placed(place)
                self._slot_OBK = self._store_at(slice(None), place)

    # -- where tokens go -----------------------------------------------------------------------------------------

    def _placed_before(self) -> Tensor:
        """int64 [O, B, K]: the entry that each new token overwrites, the stream's length where it is appended."""
        place = self._plan.overwritten()
        if place is not None:
            return place
        gone = self._plan.evicted() if self._stored else None
        return self._length_OBK if gone is None else self._room(gone)

    def _room(self, gone_OBKS: Tensor, stays_OBK: Tensor | None = None) -> Tensor:
        """Where the new token of each stream goes. One entry gone and one come: it takes that slot, and nothing else moves.
        Any other number gone: the stream is closed up, and the token goes behind.
        """
        group = self._group
        if gone_OBKS.shape[-1] == 0:
            return self._length_OBK
        number = gone_OBKS.sum(dim=-1)
        uneven = number > 1 if stays_OBK is None else number > stays_OBK.long()
        if bool(uneven.any()):
            group.evict(self._id_OBK[uneven], ~gone_OBKS[uneven])
            number = number.masked_fill(uneven, 0)
            self._length_OBK = group.lengths(self._id_OBK).long()
        return torch.where(number == 1, gone_OBKS.to(torch.uint8).argmax(dim=-1), self._length_OBK)

    def _allocate_ahead(self, place: Tensor | None) -> None:
        """A page for each stream that will cross a page border in this step; where places are not known yet, that may."""
        at_border = self._length_OBK % self._pool.slots == 0
        if place is not None:
            at_border &= place == self._length_OBK
        number = int(at_border.sum())
        if number == 0:
            return
        self._ahead, self._at_border = self._pool.allocate(number), at_border
        # Each such stream's own page, by how many stand before it; of no meaning elsewhere.
        self._order_OBK = (at_border.view(-1).cumsum(0) - 1).clamp(min=0).view_as(at_border)
        self._spare_OBK = self._ahead[self._order_OBK]
        self._used_OBK = torch.zeros_like(at_border)

    def _store_at(self, owners: slice | int, place: Tensor) -> Tensor:
        """Take down pages, positions and lengths of the new tokens; gives their flat slots, int64."""
        group, slots = self._group, self._pool.slots
        start, length = self._start_OBK[owners], self._length_OBK[owners]
        grows, table = place == length, group.tables.flat
        if self._ahead is not None:
            used = grows & self._at_border[owners]
            # A stream that needs no page writes where nobody reads.
            where = torch.where(used, start + length // slots, table.shape[0] - 1)
            table[where] = self._spare_OBK[owners]
            self._used_OBK[owners] = used
        slot = table[start + place // slots].long() * slots + place % slots
        position = self._position_B.int()[:, None].expand_as(slot)
        self._pool.position.view(-1)[slot] = position
        if self._pool.page_class.slot_arrays:
            self._pool.write_state(slot.reshape(-1), {})
        length = (length + grows).int()
        group.length.view(-1)[self._id_OBK[owners]] = length
        self._lengths_OBK[owners] = length
        return slot

    # -- one owner -----------------------------------------------------------------------------------------------

    def enter(
        self, index: int, k_B1KD: Tensor, v_B1KD: Tensor, rotation: Rotation | None, gates: Gates | None
    ) -> tuple[Tensor, Tensor]:
        """Key (rotated) and value [B, K, D] that the owner's new token is attended to with."""
        keep = None if gates is None else gates.k_keep_KD
        entered = self._plan.enter(index, gates, k_B1KD[:, 0], v_B1KD[:, 0])
        if entered is not None:
            self._slot_OBK[index] = self._store_at(index, entered.place_BK)
            return rotate(rotation, entered.k_BKD.unsqueeze(1), keep)[:, 0], entered.v_BKD
        k, v = rotate(rotation, k_B1KD, keep)[:, 0], v_B1KD[:, 0]
        if self.waits:
            self.k_OBKD[index], self.v_OBKD[index] = k, v
        return k, v

    def described(self, index: int) -> DecodeBatch:
        """What attention needs to know of one owner's streams."""
        pool, method, waits = self._pool, self._group.method, self.waits
        lengths = self._length_OBK[index].int() if waits else self._lengths_OBK[index]
        return DecodeBatch(
            k_PND=pool.k, v_PND=pool.v, k_scale_PNS=pool.slot_array("k_scale"), v_scale_PNS=pool.slot_array("v_scale"),
            position_PN=pool.position, score_PN=pool.slot_array("score") if method.attention_scores == "cumulative" else None,
            bias_PN=pool.slot_array(method.bias_array), table_T=self._group.tables.flat, start_BK=self._start_OBK[index],
            length_BK=lengths, max_length=self._stored + (0 if waits else 1), head_dim=pool.page_class.head_dim,
            slots_BK=None if waits else self._slot_OBK[index], oldest_B=self._oldest_B,
            received_BKE=self._received[index] if waits else None, received_old=waits and self._wants_old,
        )  # fmt: skip

    def close(self) -> None:
        """All layers have attended; under scores, the method says what stays."""
        self.return_unused()
        if self.waits:
            self._evict_by_score()

    def return_unused(self) -> None:
        """Pages that were allocated ahead and not needed are free again."""
        if self._ahead is not None and self._plan.at_layer:
            used = torch.zeros_like(self._ahead).index_add_(0, self._order_OBK.view(-1), self._used_OBK.view(-1).int())
            self._pool.unused(self._ahead, used == 0)
            self._ahead = None

    def _evict_by_score(self) -> None:
        """Ask the method, then store the new tokens (or not) and evict what must leave."""
        group, stored, method = self._group, self._stored, self._group.method
        slot, filled = group.stored_slots(self._id_OBK, stored)
        position = self._pool.position.view(-1)[slot].masked_fill(~filled, -1)
        new = self._position_B.int()[:, None, None].expand(*self._id_OBK.shape, 1)
        score = self._received
        if not self._wants_old:
            score = torch.cat((self._pool.slot_array("score").view(-1)[slot], score), dim=-1)
        position = torch.cat((position, new), dim=-1)
        owners = position.shape[0]
        keep = method.retain(
            Entries(
                position_BKE=position.flatten(0, 1), score_BKE=score.flatten(0, 1),
                seen_B=(self._position_B + 1).repeat(owners),
            )
        )  # fmt: skip
        keep = torch.ones_like(position, dtype=torch.bool) if keep is None else keep.view(owners, -1, *keep.shape[1:])
        stays = keep[..., -1]
        self._store_waiting(self._room(filled & ~keep[..., :-1], stays), stays)

    def _store_waiting(self, place: Tensor, stays: Tensor) -> None:
        """Write the tokens that waited beside the store."""
        group, slots, pool = self._group, self._pool.slots, self._pool
        length = self._length_OBK
        grows = stays & (place == length)
        border = grows & (length % slots == 0)
        number = int(border.sum())
        table = group.tables.flat
        if number:
            table[self._start_OBK[border] + length[border] // slots] = pool.allocate(number)
        # At once, so that pages just allocated are freed with the sequence should the call die below.
        group.length.view(-1)[self._id_OBK] = (length + grows).int()
        page = table[self._start_OBK + place.masked_fill(~stays, 0) // slots]
        slot = (page.long() * slots + place % slots).reshape(-1)
        stored = slice(None) if bool(stays.all()) else stays.reshape(-1)
        slot = slot[stored]
        pool.write(slot, *(x.flatten(0, 2)[stored] for x in (self.k_OBKD, self.v_OBKD)))
        position = self._position_B.int()[:, None].expand_as(stays).reshape(-1)
        pool.position.view(-1).index_copy_(0, slot, position[stored])
        pool.write_state(slot, {"score": self._received[..., -1].reshape(-1)[stored]})


def _column(x_BTHD: Tensor, column_B: Tensor) -> Tensor:
    """One column of each row, [B, 1, H, D]."""
    return x_BTHD[torch.arange(x_BTHD.shape[0], device=x_BTHD.device), column_B].unsqueeze(1)
