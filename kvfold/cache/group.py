"""A cache group: the KV streams of owners that are alike, which pages each holds, and the four verbs on their entries.

A KV stream is what one KV head of one owner stores of one sequence. Owners with the same method, heads and page class form a
group, so that a decoding step places the tokens of all of them at once. What to evict is the method's word; here it is
carried out: append, overwrite (a slot taken by another token), evict, and copy on write before any of these.
Letters: O owners, R places for sequences, B sequences of a call, K kv heads, N slots a page, S stored entries, T tokens,
X streams in any shape, D head dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfold.cache.allocator import pages_for
from kvfold.cache.pages import BlockTables, PagePool
from kvfold.methods.base import Method
from kvfold.methods.plans import Crossed, Held
from kvfold.ops.gating import Gates
from kvfold.ops.paged import stream_slots


class CacheGroup:
    """Tables, lengths and method state of O x R x K streams over one pool."""

    @torch.inference_mode(False)
    def __init__(
        self, *, owners: tuple[int, ...], method: Method, window: int | None, num_kv_heads: int, pool: PagePool,
        sequences: int, is_bounded: bool,
    ):  # fmt: skip
        """`window`: the architecture's sliding window where the method does not imply it; queries see no further back.
        `sequences`: places for them.
        """
        self.owners, self.method, self.window, self.pool = owners, method, window, pool
        self.num_kv_heads, shape = num_kv_heads, (len(owners), sequences, num_kv_heads)
        self.length = torch.zeros(shape, dtype=torch.int32, device=pool.device)
        self.tables = BlockTables(len(owners) * num_kv_heads, sequences, pool.device, is_bounded=is_bounded)
        self.has_shared = False
        self.is_gated = method.trained
        """Whether only gates know what a call will need."""
        form = method.stream_state(pool.page_class.head_dim)
        self.state: Tensor | None = None
        """What the method keeps for each stream, [O, R, K, ...]."""
        if form is not None:
            self.state = torch.zeros((*shape, *form.shape), dtype=getattr(torch, form.dtype), device=pool.device)
        # Entries of each sequence's longest stream, at most, where gates decide: the host's own count.
        self._bound = [0] * sequences
        self._unasked_steps = 0

    @property
    def _by_sequence(self) -> list[Tensor]:
        """What lies by sequence, in the second dimension."""
        return [self.length] if self.state is None else [self.length, self.state]

    def _index(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.length.device)

    # -- bytes and places ----------------------------------------------------------------------------------------

    @property
    def num_bytes(self) -> int:
        """Bytes of lengths and stream state."""
        return sum(one.nbytes for one in self._by_sequence)

    def bytes_with(self, sequences: int, pages: dict[int, int]) -> int:
        """Bytes of all books once there is room for so many sequences, and for so many pages a stream of some of them."""
        places = max(sequences, self.length.shape[1])
        lengths = len(self.owners) * places * self.num_kv_heads * self.length.itemsize
        return self.tables.bytes_with(sequences, pages) + lengths + self.state_bytes(places)

    def state_bytes(self, sequences: int) -> int:
        """Bytes of the stream state of so many sequences."""
        form = self.method.stream_state_bytes(self.pool.page_class.head_dim)
        return len(self.owners) * sequences * self.num_kv_heads * form

    @torch.inference_mode(False)
    def resize(self, sequences: int) -> None:
        """Room for at least so many sequences."""
        old = self.length.shape[1]
        if sequences <= old:
            return
        for name in ("length", "state"):
            one = getattr(self, name)
            if one is not None:
                setattr(self, name, torch.cat((one, one.new_zeros((len(one), sequences - old, *one.shape[2:]))), dim=1))
        self.tables.resize(sequences)
        self._bound += [0] * (sequences - old)

    def ids(self, sequence_B: Tensor) -> Tensor:
        """Stream ids [O, B, K] of some sequences: lines of `length` and `state` when these are flat."""
        owners, places, heads = self.length.shape
        owner = torch.arange(owners, device=sequence_B.device)[:, None, None]
        return (owner * places + sequence_B[:, None]) * heads + torch.arange(heads, device=sequence_B.device)

    def starts(self, id_X: Tensor) -> Tensor:
        """Where the tables of these streams begin in `tables.flat`, int64."""
        _, places, heads = self.length.shape
        owner, rest = id_X // (places * heads), id_X % (places * heads)
        base, width = self.tables.place_R2[rest // heads].unbind(-1)
        return base + width * (owner * heads + rest % heads)

    def lengths(self, id_X: Tensor) -> Tensor:
        """Entries of these streams, int32."""
        return self.length.view(-1)[id_X]

    @property
    def flat_state(self) -> Tensor | None:
        """`state` with one line a stream."""
        return None if self.state is None else self.state.flatten(0, 2)

    def _pages(self, length: Tensor) -> Tensor:
        return (length.long() + self.pool.slots - 1) // self.pool.slots

    def held_pages(self, id_X: Tensor) -> int:
        """Pages that these streams hold, a shared page once for each of them."""
        return int(self._pages(self.lengths(id_X)).sum())

    def pages_of(self, sequences: list[int]) -> Tensor:
        """Pages that each of these sequences holds, shared ones too, int64."""
        return self._pages(self.length[:, sequences]).sum(dim=(0, 2))

    def page_ids(self, id_X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every page that these streams hold: the stream's place among the X, index within the stream, page id; flat."""
        ids = id_X.reshape(-1)
        count = self._pages(self.lengths(ids))
        most = int(count.max()) if count.numel() else 0
        line, index = (torch.arange(most, device=ids.device) < count[:, None]).nonzero(as_tuple=True)
        return line, index, self.tables.flat[self.starts(ids[line]) + index]

    def slots_at(self, id_X: Tensor, place_X: Tensor) -> Tensor:
        """Flat slot, int64, of one entry of each stream, by its place among the stored."""
        slots = self.pool.slots
        return self.tables.flat[self.starts(id_X) + place_X // slots].long() * slots + place_X % slots

    def stored_slots(self, id_X: Tensor, stored: int) -> tuple[Tensor, Tensor]:
        """Flat slots [..., S] of these streams' entries, and which are filled; S = `stored`, no less than any length."""
        return stream_slots(self.tables.flat, self.starts(id_X), self.lengths(id_X), stored, self.pool.slots)

    def stored_positions(self, id_X: Tensor, stored: int) -> Tensor:
        """int32 [..., S], -1 where there is no entry."""
        slot, filled = self.stored_slots(id_X, stored)
        return self.pool.arrays["position"].view(-1)[slot].masked_fill(~filled, -1)

    # -- borders of a method's grid --------------------------------------------------------------------------------

    def slot_values(self, slot: Tensor, filled: Tensor) -> dict[str, Tensor]:
        """The method's slot arrays at flat slots of any shape, 0 where there is no entry."""
        arrays = self.pool.arrays
        return {name: arrays[name].view(-1)[slot].masked_fill(~filled, 0) for name in self.method.slot_arrays}

    def note_before(self, id_BK: Tensor, length_BK: Tensor, values: dict[str, Tensor]) -> None:
        """Of one owner: write slot state [B, 1, K] of the newest of so many entries, where there is one; no one else holds it."""
        some, place = length_BK > 0, (length_BK - 1).clamp(min=0)
        slot = self.slots_at(id_BK, place)[some]
        for name, one in values.items():
            array = self.pool.arrays[name].view(-1)
            array.index_copy_(0, slot, one[:, 0][some].to(array.dtype))

    def merge(self, id_BK: Tensor, stored: int, crossed: Crossed) -> None:
        """Write what was merged into the entries of one owner's streams, and evict those that left: the first `stored` entries
        of `crossed`.
        """
        changed, stays = crossed.changed_BKE[..., :stored], crossed.stays_BKE[..., :stored]
        leaves = self.stored_slots(id_BK, stored)[1] & ~stays
        if not bool(leaves.any()):
            return
        self.copy_on_write(id_BK)
        if bool(changed.any()):
            slot = self.stored_slots(id_BK, stored)[0][changed]
            state = {name: one[..., :stored][changed] for name, one in crossed.arrays.items()}
            self.pool.rewrite(slot, crossed.v_BEKD.transpose(1, 2)[:, :, :stored][changed], state)
        self.evict(id_BK, stays)

    def cross(self, id_BK: Tensor, position_B: Tensor, gates: Gates | None) -> None:
        """Of one owner: a border that each of these sequences has come to with its token at `position`, which is stored."""
        most = int(self.lengths(id_BK).max())
        slot, filled = self.stored_slots(id_BK, most)
        position = self.stored_positions(id_BK, most)
        # The new token's key and value are not there yet.
        there = (filled & (position < position_B[:, None, None])).unsqueeze(-1)
        k, v = (self.pool.read(name, slot).masked_fill(~there, 0).transpose(1, 2) for name in ("k", "v"))
        crossed = self.method.cross(
            Held(
                k_BEKD=k, v_BEKD=v, position_BKE=position, arrays=self.slot_values(slot, filled), before_B=position_B,
                seen_B=position_B + 1, as_stored=lambda x: self.pool.as_stored(x, "v"),
            ),
            gates,
        )  # fmt: skip
        self.merge(id_BK, most, crossed)

    # -- the verbs -----------------------------------------------------------------------------------------------

    def append(
        self, id_BK: Tensor, chosen_BKT: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, position_BT: Tensor,
        state_BKT: dict[str, Tensor],
    ) -> None:  # fmt: skip
        """Store the chosen tokens of a call behind what the streams of one owner hold, in the order of the call."""
        slots, length = self.pool.slots, self.lengths(id_BK).long()
        added = chosen_BKT.sum(dim=-1)
        first = (length + slots - 1) // slots
        if self.has_shared:
            self.copy_for_slot(id_BK[added > 0], length[added > 0])
        self._extend(id_BK, first, (length + added + slots - 1) // slots - first)
        # At once, so that pages just allocated are freed with the sequence should the call die below.
        self.length.view(-1)[id_BK] = (length + added).int()
        index = length.unsqueeze(-1) + chosen_BKT.cumsum(dim=-1) - 1
        start_BKT = self.starts(id_BK).unsqueeze(-1).expand_as(chosen_BKT)
        chosen = slice(None) if bool(chosen_BKT.all()) else chosen_BKT.reshape(-1)
        index, start = index.reshape(-1)[chosen], start_BKT.reshape(-1)[chosen]
        target = self.tables.flat[start + index // slots].long() * slots + index % slots
        k, v = (x.transpose(1, 2).reshape(-1, x.shape[-1])[chosen] for x in (k_BTKD, v_BTKD))
        self.pool.write(target, k, v)
        position = position_BT[:, None].expand_as(chosen_BKT).reshape(-1)[chosen]
        self.pool.position.view(-1).index_copy_(0, target, position.int())
        self.pool.write_state(target, {name: one.reshape(-1)[chosen] for name, one in state_BKT.items()})

    def evict(self, id_X: Tensor, stay_XS: Tensor) -> None:
        """Keep only the entries marked to stay, closed up in their order; pages left empty are free at once."""
        ids, stay = id_X.reshape(-1), stay_XS.reshape(-1, stay_XS.shape[-1])
        filled_XS = self.stored_slots(ids, stay.shape[-1])[1]
        stay = stay & filled_XS
        kept = stay.sum(dim=-1)
        # What lies before the first entry that leaves is not moved, and pages left empty are only read.
        first = (stay.cumsum(dim=-1) == torch.arange(1, stay.shape[-1] + 1, device=stay.device)).sum(dim=-1)
        self.copy_on_write(ids, first // self.pool.slots, self._pages(kept))
        slot_XS = self.stored_slots(ids, stay.shape[-1])[0]
        place = stay.cumsum(dim=-1) - 1
        moved = stay & (place != torch.arange(stay.shape[-1], device=stay.device))
        target = slot_XS.gather(-1, place.clamp(min=0))
        self.pool.move(slot_XS[moved], target[moved])
        line, index, page = self.page_ids(ids)
        self.length.view(-1)[ids] = kept.int()
        self.pool.free(page[index >= self._pages(kept)[line]])

    def copy_on_write(self, id_X: Tensor, first_X: Tensor | None = None, stop_X: Tensor | None = None) -> None:
        """Copy the pages of these streams that others hold too, before they are written: all of them, or those from index
        `first` up to `stop`.
        """
        if not self.has_shared or id_X.numel() == 0:
            return
        ids = id_X.reshape(-1)
        line, index, page = self.page_ids(ids)
        written = torch.ones_like(page, dtype=torch.bool)
        if first_X is not None:
            written = (index >= first_X.reshape(-1)[line]) & (index < stop_X.reshape(-1)[line])
        mine = self._must_copy(page, written)
        copies = self.pool.allocate(int(mine.sum()))
        self.pool.copy_pages(page[mine], copies)
        self.tables.flat[self.starts(ids[line[mine]]) + index[mine]] = copies
        self.pool.free(page[mine])

    def copy_for_slot(self, id_X: Tensor, place_X: Tensor) -> None:
        """`copy_on_write` of the page in which one slot of each stream is about to be written; where anything is shared."""
        ids, index = id_X.reshape(-1), place_X.reshape(-1) // self.pool.slots
        held = index < self._pages(self.lengths(ids))
        page = self.tables.flat[(self.starts(ids) + index).masked_fill(~held, 0)].long()
        shared = held & (self.pool.references[page.masked_fill(~held, 0)] > 1)
        if bool(shared.any()):
            self.copy_on_write(ids[shared], index[shared], index[shared] + 1)

    def copies_ahead(self, id_X: Tensor) -> int:
        """Pages that `copy_on_write` may allocate for a call on these streams, at most."""
        if not self.has_shared:
            return 0
        line, index, page = self.page_ids(id_X)
        written = torch.ones_like(page, dtype=torch.bool)
        if not self.method.lossy:  # only the page that the next entry goes into
            written = index == self.lengths(id_X).reshape(-1)[line].long() // self.pool.slots
        return int(self._must_copy(page, written).sum())

    def _must_copy(self, page: Tensor, written: Tensor) -> Tensor:
        """Of the pages about to be written, those to copy first: the shared ones, but where all holders of a page write
        now, one of them keeps it.
        """
        copied = written & (self.pool.references[page.long()] > 1)
        where = copied.nonzero()[:, 0]
        ids, holder, here = page[where].long().unique(return_inverse=True, return_counts=True)
        order = torch.arange(where.numel(), device=page.device)
        first = order.new_zeros(ids.numel()).scatter_reduce(0, holder, order, "amin", include_self=False)
        copied[where[first[here == self.pool.references[ids]]]] = False
        return copied

    def _extend(self, id_X: Tensor, first_X: Tensor, count_X: Tensor) -> None:
        """Give stream X `count` new pages from index `first` on."""
        ids, first, count = (x.reshape(-1) for x in (id_X, first_X, count_X))
        total = int(count.sum())
        if total == 0:
            return
        pages = self.pool.allocate(total)
        step = torch.arange(total, device=pages.device) - (count.cumsum(0) - count).repeat_interleave(count)
        place = (self.starts(ids) + first).repeat_interleave(count) + step
        self.tables.flat[place] = pages

    # -- sequences -----------------------------------------------------------------------------------------------

    def fork(self, sources: list[int], targets: list[int]) -> None:
        """The targets go on from what the sources hold; pages are shared until one side writes."""
        self.tables.widen({target: self.tables.width[source] for source, target in zip(sources, targets, strict=True)})
        source_B, target_B = self._index(sources), self._index(targets)
        for source, target in zip(sources, targets, strict=True):
            self.tables.copy(source, target)
            self._bound[target] = self._bound[source]
        for one in self._by_sequence:
            one[:, target_B] = one[:, source_B]
        self.pool.share(self.page_ids(self.ids(target_B))[2])
        self.has_shared = self.has_shared or bool(targets)

    def free(self, sequences: list[int], *, compact: bool) -> None:
        """Free all that these sequences hold; `compact`: tables may be moved."""
        sequence_B = self._index(sequences)
        self.pool.free(self.page_ids(self.ids(sequence_B))[2])
        for one in self._by_sequence:
            one[:, sequence_B] = 0
        for one in sequences:
            self._bound[one] = 0
        self.tables.clear(sequences, compact=compact)
        if self.has_shared and not bool((self.pool.references > 1).any()):
            self.has_shared = False

    # -- what a call may need --------------------------------------------------------------------------------------

    def most_stored(self, sequence: int, seen: int, added: int = 0) -> int:
        """Entries of a sequence's longest stream, at most, where it has seen `seen` tokens, `added` of them in a call that is
        to come.
        """
        return self._bound[sequence] + added if self.is_gated else self.method.max_kept(seen)

    def grown(self, sequences: Sequence[int], added: Sequence[int]) -> None:
        """Under gates: a call brought so many tokens to each sequence. The device is asked what became of them after a chunk,
        and once per page of decoding steps.
        """
        for one, more in zip(sequences, added, strict=True):
            self._bound[one] += more
        self._unasked_steps += 1
        if self._unasked_steps >= self.pool.slots or max(added, default=0) > 1:
            self._unasked_steps = 0
            longest = self.length.amax(dim=(0, 2)).tolist()
            self._bound = [min(bound, true) for bound, true in zip(self._bound, longest, strict=True)]

    def pages_after(self, sequences: list[int], seen: list[int], added: list[int]) -> tuple[int, dict[int, int]]:
        """Pages that these sequences hold at most once sequences that have now seen `seen` tokens were given `added` of
        them, and the pages of each one's longest stream. What gates will decide is not known before: every token may stay.
        """
        slots = self.pool.slots
        if self.is_gated:
            after = self.length[:, self._index(sequences)].long() + self._index(added)[:, None]
            total = int(self._pages(after).sum())
            bounds = zip(sequences, added, strict=True)
            return total, {one: pages_for(self.most_stored(one, 0, more), slots) for one, more in bounds}
        each = [pages_for(self.method.max_kept(tokens), slots) for tokens in seen]
        return len(self.owners) * self.num_kv_heads * sum(each), dict(zip(sequences, each, strict=True))
