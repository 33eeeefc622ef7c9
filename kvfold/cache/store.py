"""The store: banks of lanes over pools of pages under one byte budget, and the rows that live in them.

The store knows no batch: rows are handles that are made, forked, continued and freed one by one, and every call names
its rows. A call is a transaction: `begin` refuses before anything is written, or books the call; `commit` ends it.
Letters: B rows of a call, T its tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfold.cache.bank import Bank
from kvfold.cache.pages import CacheFull, pages_for
from kvfold.cache.pool import PageClass, PagePool
from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import (
    LENGTH_BYTES,
    PAGE_OVERHEAD_BYTES,
    PAGE_SLOTS,
    ROW_BYTES,
    layout_bytes,
    page_bytes,
    page_class,
    page_classes,
)
from kvfold.layout.planner import PageClass as PlannedClass

TABLE_BYTES = PAGE_OVERHEAD_BYTES - 8
"""Of the overhead of a page, what is for tables: all but its reference count and its entry in the free list."""
FIRST_PAGES = 64
"""Pages of a pool that has no budget, before it grows."""
LONGEST_TEXT = 2**40
"""Tokens; where even these fit, every method has a fixed budget."""


class Store:
    """Keys and values of rows of one model, as its layout says."""

    def __init__(
        self,
        layout: KVLayout,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        memory_bytes: int | None = None,
        rows: int = 1,
        page_slots: int = PAGE_SLOTS,
        poison: bool = False,
    ):
        """`memory_bytes`: reserved at once and never exceeded; None = grow as needed. `rows`: expected, a hint."""
        self.layout, self.dtype, self.device, self.page_slots = layout, dtype, torch.device(device), page_slots
        self.memory_bytes = memory_bytes
        self._page_bytes = {
            one: page_bytes(one, page_slots, model_bytes=dtype.itemsize, slot_state_bytes=state)
            for one, state in page_classes(layout).items()
        }
        self._poison = poison
        self._pools = self._make_pools(self._limits(rows))
        self.banks, self.place_of = self._make_banks()
        with torch.inference_mode(False):
            self.seen = torch.zeros(0, dtype=torch.int64, device=self.device)
        self._seen: list[int] = []
        self._free_rows: list[int] = []
        self._in_call: set[int] = set()
        self._grow_rows(rows)

    # -- making --------------------------------------------------------------------------------------------------

    def _limits(self, rows: int) -> list[int | None]:
        """Pages of each class: a budget is split by what `rows` rows take in each."""
        if self.memory_bytes is None:
            return [None] * len(self._page_bytes)
        left = max(0, self.memory_bytes - rows * self._row_bytes())
        needs = self._needs(left, rows)
        limits = [left * need // sum(needs.values()) // self._page_bytes[one] for one, need in needs.items()]
        if min(limits) < 1:
            raise ValueError(
                f"memory_bytes={self.memory_bytes}: not one page fits beside the books of {rows} rows: give more memory"
            )
        return limits

    def _make_pools(self, limits: list[int | None]) -> list[PagePool]:
        return [
            PagePool(
                PageClass(head_dim=one.head_dim, dtype=self.dtype, scored=state > 0), slots=self.page_slots,
                device=self.device, pages=FIRST_PAGES if limit is None else limit, limit=limit, poison=self._poison,
            )
            for (one, state), limit in zip(page_classes(self.layout).items(), limits, strict=True)
        ]  # fmt: skip

    def _needs(self, memory_bytes: int, rows: int) -> dict[PlannedClass, int]:
        """Bytes of pages in each class for `rows` rows as long as the memory allows: the shares of the classes in it."""

        def needs(seen: int) -> dict[PlannedClass, int]:
            found = dict.fromkeys(self._page_bytes, 0)
            for owner in self.layout.owners:
                one, heads = page_class(self.layout, owner), self.layout.layers[owner].num_kv_heads
                pages = pages_for(self.layout.time_of(owner).max_kept(seen), self.page_slots)
                found[one] += rows * heads * pages * self._page_bytes[one]
            return found

        seen = 1
        while seen < LONGEST_TEXT and sum(needs(2 * seen).values()) <= memory_bytes:
            seen *= 2
        step = seen
        while step := step // 2:
            if sum(needs(seen + step).values()) <= memory_bytes:
                seen += step
        return needs(seen)

    def _make_banks(self) -> tuple[list[Bank], dict[int, tuple[Bank, int]]]:
        """Banks of like owners, and for each owner its bank and its place there."""
        alike: dict[tuple, list[int]] = {}
        pools = dict(zip(self._page_bytes, self._pools, strict=True))
        for owner in self.layout.owners:
            layer, spec = self.layout.layers[owner], self.layout.time_of(owner)
            implied = layer.window is None or spec != self.layout.time[self.layout.index_of(owner)]
            key = (page_class(self.layout, owner), spec, layer.num_kv_heads, None if implied else layer.window)
            alike.setdefault(key, []).append(owner)
        banks, place_of = [], {}
        for (one, spec, heads, window), owners in alike.items():
            bank = Bank(owners=tuple(owners), spec=spec, window=window, num_kv_heads=heads, pool=pools[one])
            banks.append(bank)
            place_of.update({owner: (bank, index) for index, owner in enumerate(owners)})
        return banks, place_of

    def _row_bytes(self) -> int:
        layout, lanes = self.layout, 0
        for owner in layout.owners:
            layer = layout.layers[owner]
            lanes += layer.num_kv_heads * (LENGTH_BYTES + layout.time_of(owner).lane_state_bytes(layer.head_dim))
        return ROW_BYTES + lanes

    def split_anew(self, rows: int) -> None:
        """Divide the budget between the page classes for so many rows; only while nothing is held."""
        if self.memory_bytes is None or len(self._pools) == 1 or any(pool.held_pages for pool in self._pools):
            return
        limits = self._limits(rows)
        for pool in self._pools:
            pool.release()
        self._pools = self._make_pools(limits)
        pools = dict(zip(self._page_bytes, self._pools, strict=True))
        for bank in self.banks:
            bank.pool = pools[page_class(self.layout, bank.owners[0])]

    # -- bytes ---------------------------------------------------------------------------------------------------

    @property
    def pool_bytes(self) -> int:
        """Bytes reserved from the device; room for the tables of every page is set aside even while they are smaller."""
        pages = sum(pool.book.capacity for pool in self._pools)
        tables = max(sum(bank.table.nbytes for bank in self.banks), TABLE_BYTES * pages)
        lengths = sum(bank.num_bytes - bank.table.nbytes for bank in self.banks)
        reserved = sum(pool.num_bytes for pool in self._pools) + tables + lengths + self.seen.nbytes
        return reserved if self.memory_bytes is None else min(reserved, self.memory_bytes)

    @property
    def allocated_bytes(self) -> int:
        """Bytes that the rows hold: pages (whole ones, shared ones once), tables, lengths, state."""
        sizes = self._page_bytes.values()
        pages = sum(pool.held_pages * size for pool, size in zip(self._pools, sizes, strict=True))
        return pages + self.num_rows * self._row_bytes()

    @property
    def free_pages(self) -> int:
        """Pages that are reserved and held by nobody."""
        return sum(pool.book.free for pool in self._pools)

    @property
    def num_rows(self) -> int:
        """Rows alive."""
        return len(self._seen) - len(self._free_rows)

    def bytes_under(self, layout: KVLayout, rows: Sequence[int]) -> int:
        """Bytes that the same tokens of these rows would take under another layout."""
        return layout_bytes(layout, [self._seen[row] for row in rows], self.dtype.itemsize, self.page_slots)

    # -- rows ----------------------------------------------------------------------------------------------------

    def new_rows(self, number: int) -> list[int]:
        """Handles of so many empty rows."""
        missing = number - len(self._free_rows)
        if missing > 0:
            self._grow_rows(missing)
        self._free_rows.sort()
        taken, self._free_rows = self._free_rows[:number], self._free_rows[number:]
        return taken

    def free_rows(self, rows: Sequence[int]) -> None:
        """End these rows; their pages are free at once."""
        assert not set(rows) & set(self._free_rows), "a row is freed once"
        index = self._index(rows)
        for bank in self.banks:
            bank.free(index)
        self.seen[index] = 0
        for row in rows:
            self._seen[row] = 0
        self._in_call.difference_update(rows)
        self._free_rows.extend(rows)
        if not self._in_call:
            for bank in self.banks:
                bank.shrink()

    def fork_rows(self, rows: Sequence[int]) -> list[int]:
        """New rows that continue from the same tokens; pages are shared until one side writes."""
        self._check_usable(rows)
        copies = self.new_rows(len(rows))
        source, target = self._index(rows), self._index(copies)
        for bank in self.banks:
            bank.fork(source, target)
        self.seen[target] = self.seen[source]
        for copy, row in zip(copies, rows, strict=True):
            self._seen[copy] = self._seen[row]
        return copies

    def seen_tokens(self, row: int) -> int:
        """Real tokens that a row has seen."""
        return self._seen[row]

    def _index(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(list(rows), dtype=torch.int64, device=self.device)

    @torch.inference_mode(False)
    def _grow_rows(self, number: int) -> None:
        rows = len(self._seen) + number
        self._check_books(rows, [0] * len(self.banks))
        for bank in self.banks:
            bank.resize(rows, 0)
        self._free_rows.extend(range(len(self._seen), rows))
        self._seen.extend([0] * number)
        self.seen = torch.cat((self.seen, self.seen.new_zeros(number)))

    def _check_books(self, rows: int, pages: Sequence[int]) -> None:
        """Refuse tables for so many rows and pages a lane that the budget does not hold."""
        if self.memory_bytes is None:
            return
        books = sum(bank.resized_bytes(rows, most) for bank, most in zip(self.banks, pages, strict=True))
        total = sum(pool.num_bytes for pool in self._pools) + books + rows * self.seen.itemsize
        if total > self.memory_bytes:
            raise CacheFull(
                f"the tables of {rows} rows exceed memory_bytes={self.memory_bytes}: fewer rows, or more memory"
            )

    # -- calls ---------------------------------------------------------------------------------------------------

    @property
    def is_gated(self) -> bool:
        """Whether what a call needs is known only behind gates, so that a call may be cut into pieces that surely fit."""
        prefix = all(bank.spec.state_of == "prefix" for bank in self.banks)
        return prefix and any(bank.policy.gate is not None for bank in self.banks)

    def fits(self, rows: Sequence[int], added: Sequence[int]) -> bool:
        """Whether `begin` would take this call."""
        try:
            needed, _ = self._needed(rows, added)
            for pool, pages in zip(self._pools, needed, strict=True):
                pool.book.grown_capacity(pages)
        except CacheFull:
            return False
        return True

    def begin(self, rows: Sequence[int], added: Sequence[int]) -> None:
        """Open a call that brings `added` real tokens to each row. Raises `CacheFull` with the rows as they were."""
        self._check_usable(rows)
        needed, most = self._needed(rows, added)
        for pool, pages in zip(self._pools, needed, strict=True):
            pool.book.grown_capacity(pages)
        for pool, pages in zip(self._pools, needed, strict=True):
            pool.reserve(pages)
        for bank, pages in zip(self.banks, most, strict=True):
            bank.resize(0, pages)
        self._in_call.update(rows)

    def _needed(self, rows: Sequence[int], added: Sequence[int]) -> tuple[list[int], list[int]]:
        """Pages that a call may take from each pool, and of each bank the pages of its longest lane after it."""
        after = [self._seen[row] + more for row, more in zip(rows, added, strict=True)]
        index, needed = self._index(rows), [0] * len(self._pools)
        after_all = [bank.pages_after(index, after, list(added)) for bank in self.banks]
        # A table is never without width: a dead row's place is looked up too.
        most = [longest or 1 for _, longest in after_all]
        self._check_books(len(self._seen), most)
        for bank, (pages, _) in zip(self.banks, after_all, strict=True):
            lanes = bank.lanes(index)
            number = self._pools.index(bank.pool)
            needed[number] += max(0, pages - bank.held_pages(lanes)) + bank.copies_ahead(lanes)
        return needed, most

    def commit(self, rows: Sequence[int], added: Sequence[int]) -> None:
        """The call is done: its tokens count as seen."""
        for row, more in zip(rows, added, strict=True):
            self._seen[row] += more
        index = self._index(rows)
        self.seen[index] = self._index([self._seen[row] for row in rows])
        self._in_call.difference_update(rows)

    def _check_usable(self, rows: Sequence[int]) -> None:
        torn = self._in_call.intersection(rows)
        if torn:
            raise RuntimeError(f"rows {sorted(torn)} were left half-written by a call that failed: free or reset them")
