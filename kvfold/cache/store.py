"""The store: cache groups over pools of pages under one byte budget, and the sequences that live in them.

The store knows no batch: sequences are handles that are made, forked, continued and freed one by one, and every call names
its own. A call is a transaction: `begin` refuses before anything is written, or opens the call; `commit` ends it.
Whoever drops sequences where nothing may be freed (a finaliser, inside an allocation) queues them: whoever reads the books
frees what is queued first.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from kvfold.cache.allocator import CacheFull, pages_for
from kvfold.cache.group import CacheGroup
from kvfold.cache.pages import PagePool
from kvfold.errors import UserError
from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import (
    PAGE_OVERHEAD_BYTES,
    PAGE_SLOTS,
    PageClass,
    layout_bytes,
    most_tokens,
    page_bytes,
    page_class,
    page_classes,
    slot_arrays,
)

TABLE_BYTES = PAGE_OVERHEAD_BYTES - 8
"""Of the overhead of a page, what is for tables: all but its reference count and its entry in the free list."""
FIRST_PAGES = 64
"""Pages of a pool that has no budget, before it grows."""
LONGEST_TEXT = 2**40
"""Tokens; where even these fit, every method has a fixed budget."""


class Batch:
    """What a call brings, and how attention is scaled: made once, read by all layers."""

    def __init__(
        self, store: "Store", sequences: list[int], added: list[int], real_BT: Tensor | None, columns: int, *, scale: float,
        softcap: float | None,
    ):  # fmt: skip
        """`sequences`: handles of the store, one for each row; `added`: real tokens of each; `real_BT`: bool, False at padding,
        None = no padding.
        """
        self.sequences, self.added, self.real_BT, self.columns = sequences, added, real_BT, columns
        self.scale, self.softcap = scale, softcap
        self.before = [store.seen_tokens(one) for one in sequences]
        self.index_B = store.index(sequences)
        self.position_B = store.seen[self.index_B]

    def segment(self, store: "Store", rows: list[int]) -> "Batch":
        """Some of the rows, as a call of their own."""
        return Batch(
            store, [self.sequences[row] for row in rows], [self.added[row] for row in rows],
            None if self.real_BT is None else self.real_BT[rows], self.columns, scale=self.scale, softcap=self.softcap,
        )  # fmt: skip


class Store:
    """Keys and values of sequences of one model, as its layout says."""

    def __init__(
        self, layout: KVLayout, *, dtype: torch.dtype, device: torch.device | str = "cpu", memory_bytes: int | None = None,
        sequences: int = 1, page_slots: int = PAGE_SLOTS, pools: Mapping[PageClass, PagePool] | None = None,
        poison: bool = False,
    ):  # fmt: skip
        """`memory_bytes`: reserved at once and never exceeded; None = grow as needed. `sequences`: expected, a hint. `pools`:
        of each page class, where several stores draw from the same ones.
        """
        self.layout, self.dtype, self.device, self.page_slots = layout, dtype, torch.device(device), page_slots
        self.memory_bytes, self._poison = memory_bytes, poison
        if pools is None:
            pools = self._make_pools({} if memory_bytes is None else self._limits(sequences))
        self._pools = {one: pools[one] for one in slot_arrays(layout)}
        self.groups, self.place_of = self._make_groups(sequences)
        self.place_of_layer = [self.place_of[layer.owner] for layer in layout.layers]
        with torch.inference_mode(False):
            self.seen = torch.zeros(sequences, dtype=torch.int64, device=self.device)
        self._seen, self._free = [0] * sequences, list(range(sequences))
        self._queued = deque[int]()
        self._in_call: set[int] = set()
        if memory_bytes is not None:
            self._check_books(sequences, [{}] * len(self.groups))

    # -- making --------------------------------------------------------------------------------------------------

    @cached_property
    def _page_bytes(self) -> dict[PageClass, int]:
        """Of each page class, in the order of the pools."""
        return {
            one: page_bytes(one, self.page_slots, model_bytes=self.dtype.itemsize, slot_state_bytes=state)
            for one, state in page_classes(self.layout).items()
        }

    def _limits(self, sequences: int) -> dict[PageClass, int]:
        """Pages of each class: the budget is split by what `sequences` sequences take in each."""
        sequences = max(1, sequences)
        left = max(0, self.memory_bytes - sequences * self._sequence_bytes)
        needs = self._needs(left, sequences)
        limits = {one: left * need // sum(needs.values()) // self._page_bytes[one] for one, need in needs.items()}
        if min(limits.values()) < 1:
            raise UserError(
                f"memory_bytes={self.memory_bytes}: not one page fits beside the books of {sequences} rows: give more memory"
            )
        return limits

    def _make_pools(self, limits: Mapping[PageClass, int]) -> dict[PageClass, PagePool]:
        """`limits`: pages of each class; none where there is no budget."""
        return {
            one: PagePool(
                one, dtype=self.dtype, slot_arrays=arrays, slots=self.page_slots, device=self.device,
                pages=limits.get(one, FIRST_PAGES), limit=limits.get(one), poison=self._poison,
            )
            for one, arrays in slot_arrays(self.layout).items()
        }  # fmt: skip

    def _needs(self, memory_bytes: int, sequences: int) -> dict[PageClass, int]:
        """Bytes of pages in each class for so many sequences as long as the memory allows: the shares of the classes in it."""

        def needs(seen: int) -> dict[PageClass, int]:
            found = dict.fromkeys(self._page_bytes, 0)
            for owner in self.layout.owners:
                one, heads = page_class(self.layout, owner), self.layout.layers[owner].num_kv_heads
                pages = pages_for(self.layout.time_of(owner).max_kept(seen), self.page_slots)
                found[one] += sequences * heads * pages * self._page_bytes[one]
            return found

        seen = most_tokens(lambda tokens: sum(needs(tokens).values()) <= memory_bytes, LONGEST_TEXT)
        return needs(LONGEST_TEXT if seen is None else max(1, seen))

    def _make_groups(self, sequences: int) -> tuple[list[CacheGroup], dict[int, tuple[CacheGroup, int]]]:
        """Groups of like owners, and for each owner its group and its place there."""
        alike: dict[tuple, list[int]] = {}
        for owner, asked in zip(self.layout.owners, self.layout.time, strict=True):
            layer, method = self.layout.layers[owner], self.layout.time_of(owner)
            window = layer.window if method == asked else None  # else it is the method in force
            key = page_class(self.layout, owner), method, layer.num_kv_heads, window
            alike.setdefault(key, []).append(owner)
        groups: list[CacheGroup] = []
        place_of: dict[int, tuple[CacheGroup, int]] = {}
        for (one, method, heads, window), owners in alike.items():
            group = CacheGroup(
                owners=tuple(owners), method=method, window=window, num_kv_heads=heads, pool=self._pools[one],
                sequences=sequences, is_bounded=self.memory_bytes is not None,
            )  # fmt: skip
            groups.append(group)
            place_of |= {owner: (group, index) for index, owner in enumerate(owners)}
        return groups, place_of

    @cached_property
    def _sequence_bytes(self) -> int:
        """Books of one sequence, whatever it holds."""
        return layout_bytes(self.layout, [0], self.dtype.itemsize, self.page_slots)

    def split_anew(self, sequences: int) -> None:
        """Divide the budget between the page classes for so many sequences; only while nothing is held."""
        self.drain()
        pools = self._pools.values()
        if self.memory_bytes is None or len(pools) == 1 or any(pool.held_pages for pool in pools):
            return
        limits = self._limits(sequences)
        for pool in pools:
            pool.release()
        self._pools = self._make_pools(limits)
        for group in self.groups:
            group.pool = self._pools[page_class(self.layout, group.owners[0])]

    # -- bytes ---------------------------------------------------------------------------------------------------

    @property
    def pools(self) -> list[PagePool]:
        """One for each page class."""
        self.drain()
        return list(self._pools.values())

    @property
    def pool_bytes(self) -> int:
        """Bytes reserved from the device; room for the tables of every page is set aside even while they are smaller."""
        pages = sum(pool.book.capacity for pool in self.pools)
        tables = max(TABLE_BYTES * pages, sum(group.tables.num_bytes for group in self.groups))
        books = tables + sum(group.num_bytes for group in self.groups) + self.seen.nbytes
        reserved = books + sum(pool.num_bytes for pool in self._pools.values())
        return reserved if self.memory_bytes is None else min(reserved, self.memory_bytes)

    @property
    def allocated_bytes(self) -> int:
        """Bytes that the sequences hold: pages (whole ones, shared ones once), tables, lengths, state."""
        sizes = self._page_bytes.values()
        pages = sum(pool.held_pages * size for pool, size in zip(self.pools, sizes, strict=True))
        return pages + self.num_sequences * self._sequence_bytes

    @property
    def free_pages(self) -> int:
        """Pages that are reserved and held by nobody."""
        return sum(pool.book.exact_free() for pool in self.pools)

    @property
    def num_sequences(self) -> int:
        """Sequences alive."""
        self.drain()
        return len(self._seen) - len(self._free)

    def bytes_under(self, layout: KVLayout, sequences: Sequence[int]) -> int:
        """Bytes that the same tokens of these sequences would take under another layout."""
        return layout_bytes(layout, [self._seen[one] for one in sequences], self.dtype.itemsize, self.page_slots)

    # -- sequences -----------------------------------------------------------------------------------------------

    @property
    def free_places(self) -> int:
        """Sequences that can be made without growing tables."""
        self.drain()
        return len(self._free)

    def new_sequences(self, number: int) -> list[int]:
        """Handles of so many empty sequences."""
        self.drain()
        missing = number - len(self._free)
        if missing > 0:
            self._grow(missing)
        self._free.sort()
        taken, self._free = self._free[:number], self._free[number:]
        return taken

    def free(self, sequences: Sequence[int]) -> None:
        """End these sequences; their pages are free at once."""
        self.drain()
        self._free_now(sequences)

    def queue_free(self, sequences: Sequence[int]) -> None:
        """End these sequences before anybody looks at the books again. Safe in a finaliser: nothing is computed here."""
        self._queued.extend(sequences)

    def drain(self) -> None:
        """Free what was queued, and what is queued meanwhile."""
        while self._queued:
            # One by one out of the queue: a finaliser may run in another thread.
            self._free_now([self._queued.popleft() for _ in range(len(self._queued))])

    def _free_now(self, sequences: Sequence[int]) -> None:
        sequences = list(sequences)
        assert not set(sequences) & set(self._free), "a sequence is freed once"
        self._in_call.difference_update(sequences)
        for group in self.groups:
            group.free(sequences, compact=not self._in_call)
        self.seen[self.index(sequences)] = 0
        for one in sequences:
            self._seen[one] = 0
        self._free.extend(sequences)

    def fork(self, sequences: Sequence[int]) -> list[int]:
        """New sequences that continue from the same tokens; pages are shared until one side writes."""
        self._refuse_torn(sequences)
        copies = self.new_sequences(len(sequences))
        widths = [
            {copy: group.tables.width[one] for one, copy in zip(sequences, copies, strict=True)}
            for group in self.groups
        ]
        try:
            self._check_books(len(self._seen), widths)
        except CacheFull:
            self._free.extend(copies)
            raise
        for group in self.groups:
            group.fork(list(sequences), copies)
        self.seen[self.index(copies)] = self.seen[self.index(sequences)]
        for copy, one in zip(copies, sequences, strict=True):
            self._seen[copy] = self._seen[one]
        return copies

    def seen_tokens(self, sequence: int) -> int:
        """Real tokens that a sequence has seen."""
        return self._seen[sequence]

    @property
    def alive(self) -> list[int]:
        """Handles of all sequences, ascending."""
        self.drain()
        return sorted(set(range(len(self._seen))) - set(self._free))

    def pages_needed(self, sequences: Sequence[int], added: Sequence[int]) -> list[int]:
        """Pages that a call may take from each pool, at most."""
        self.drain()
        return self._needed(sequences, added)[0]

    def held_bytes(self, sequences: Sequence[int]) -> int:
        """Bytes that these sequences hold; a page that they share with others counts whole."""
        self.drain()
        total = len(sequences) * self._sequence_bytes
        for group in self.groups:
            size = self._page_bytes[page_class(self.layout, group.owners[0])]
            total += size * group.held_pages(group.ids(self.index(sequences)))
        return total

    def index(self, sequences: Sequence[int]) -> Tensor:
        """int64 [B], to index what lies by sequence."""
        return torch.tensor(list(sequences), dtype=torch.int64, device=self.device)

    @torch.inference_mode(False)
    def _grow(self, number: int) -> None:
        places = len(self._seen) + number
        self._check_books(places, [{}] * len(self.groups))
        for group in self.groups:
            group.resize(places)
        self._free.extend(range(len(self._seen), places))
        self._seen.extend([0] * number)
        self.seen = torch.cat((self.seen, self.seen.new_zeros(number)))

    def _check_books(self, places: int, pages: Sequence[dict[int, int]]) -> None:
        """Refuse books for so many sequences and pages a stream that the budget does not hold."""
        if self.memory_bytes is None:
            return
        books = sum(group.bytes_with(places, most) for group, most in zip(self.groups, pages, strict=True))
        total = sum(pool.num_bytes for pool in self._pools.values()) + books + places * self.seen.itemsize
        if total > self.memory_bytes:
            raise CacheFull(
                f"tables of {places} rows exceed memory_bytes={self.memory_bytes}: fewer rows or more memory"
            )

    # -- calls ---------------------------------------------------------------------------------------------------

    @property
    def may_cut_calls(self) -> bool:
        """Whether what a call needs is known only behind gates, so that it may be cut into pieces that surely fit."""
        methods = [group.method for group in self.groups]
        return all(one.chunk_invariant for one in methods) and any(one.trained for one in methods)

    def fits(self, sequences: Sequence[int], added: Sequence[int]) -> bool:
        """Whether `begin` would take this call."""
        self.drain()
        try:
            needed, _ = self._needed(sequences, added)
            for pool, pages in zip(self._pools.values(), needed, strict=True):
                pool.book.grown_capacity(pages)
        except CacheFull:
            return False
        return True

    def begin(self, sequences: Sequence[int], added: Sequence[int]) -> None:
        """Open a call that brings `added` real tokens to each sequence. Raises `CacheFull` with all as it was."""
        if self._queued:
            self.drain()
        if self._in_call.intersection(sequences):
            self._refuse_torn(sequences)
        if not self._surely_fits(sequences, added):
            self._make_room(sequences, added)
        self._in_call.update(sequences)

    def _surely_fits(self, sequences: Sequence[int], added: Sequence[int]) -> bool:
        """Whether a call of one token a sequence finds room in pages and tables at hand, without asking how full they are."""
        free = {id(pool): pool.book.free for pool in self._pools.values()}
        for group in self.groups:
            # Each stream takes a page at the most.
            free[id(group.pool)] -= len(group.owners) * group.num_kv_heads * len(sequences)
            most = (group.most_stored(one, self._seen[one] + 1, 1) for one in sequences)
            narrow = any(n > group.tables.width[one] * self.page_slots for n, one in zip(most, sequences, strict=True))
            if narrow or group.has_shared or free[id(group.pool)] < 0:
                return False
        return max(added) <= 1

    def _make_room(self, sequences: Sequence[int], added: Sequence[int]) -> None:
        """Reserve what a call may need, or raise `CacheFull` before anything is written."""
        needed, most = self._needed(sequences, added)
        for pool, pages in zip(self._pools.values(), needed, strict=True):
            pool.book.grown_capacity(pages)
        for pool, pages in zip(self._pools.values(), needed, strict=True):
            pool.reserve(pages)
        for group, longest in zip(self.groups, most, strict=True):
            group.tables.widen(longest)

    def _needed(self, sequences: Sequence[int], added: Sequence[int]) -> tuple[list[int], list[dict[int, int]]]:
        """Pages that a call may take from each pool, and of each group the pages of each sequence's longest stream after it."""
        sequences, added = list(sequences), list(added)
        after = [self._seen[one] + more for one, more in zip(sequences, added, strict=True)]
        pools, needed = list(self._pools.values()), [0] * len(self._pools)
        after_all = [group.pages_after(sequences, after, added) for group in self.groups]
        most = [longest for _, longest in after_all]
        self._check_books(len(self._seen), most)
        index = self.index(sequences)
        for group, (pages, _) in zip(self.groups, after_all, strict=True):
            ids = group.ids(index)
            needed[pools.index(group.pool)] += max(0, pages - group.held_pages(ids)) + group.copies_ahead(ids)
        return needed, most

    def commit(self, sequences: Sequence[int], added: Sequence[int]) -> None:
        """The call is done: its tokens count as seen."""
        for one, more in zip(sequences, added, strict=True):
            self._seen[one] += more
        self.seen[self.index(sequences)] = self.index([self._seen[one] for one in sequences])
        for group in self.groups:
            if group.is_gated:
                group.grown(sequences, added)
        self._in_call.difference_update(sequences)

    def _refuse_torn(self, sequences: Sequence[int]) -> None:
        torn = sorted(self._in_call.intersection(sequences))
        if torn:
            raise RuntimeError(f"rows {torn} were left half-written by a call that failed: free or reset them")
