"""Counting pages: how many a pool has, how many are free, how far it may grow. Plain numbers, no torch.

The tensors that the pages are made of live in pages.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

GROWTH = 1.5
"""A pool without a budget grows by half, so that every byte is copied a bounded number of times."""


class CacheFull(RuntimeError):
    """The cache can't hold what a call would add. Raised before anything is written: the sequences stand as they were."""


def pages_for(entries: int, page_slots: int) -> int:
    """Pages that hold so many entries of one head."""
    return -(-entries // page_slots)


@dataclass(kw_only=True, slots=True)
class PageBook:
    """The books of one pool. `limit` is the largest capacity allowed, None where only the machine's memory limits it.

    A device may free pages without telling how many: `free` is then too low until somebody asks (`count_free`).
    """

    capacity: int
    free: int
    limit: int | None = None
    is_exact: bool = True
    """Whether `free` is the true number, not only a lower bound."""
    count_free: Callable[[], int]
    """Asks the device."""

    def exact_free(self) -> int:
        """Free pages, asked of the device where the host doesn't know."""
        if not self.is_exact:
            self.free, self.is_exact = self.count_free(), True
        return self.free

    def grown_capacity(self, needed: int) -> int:
        """The capacity that leaves `needed` pages free: today's if it does already. Raises `CacheFull` past the limit."""
        if needed <= self.free or needed <= self.exact_free():
            return self.capacity
        missing = needed - self.free
        if self.limit is not None and self.capacity + missing > self.limit:
            raise CacheFull(
                f"the call needs {needed} more pages and {self.free} of {self.capacity} are free: "
                "free rows, shorten the text, or give the cache more memory_bytes"
            )
        grown = max(self.capacity + missing, int(self.capacity * GROWTH))
        return grown if self.limit is None else min(grown, self.limit)

    def allocated(self, count: int) -> None:
        """So many pages are handed out."""
        assert count <= self.free, "pages are reserved before they are allocated"
        self.free -= count

    def freed(self, count: int | None) -> None:
        """So many pages came back; None = some, and only the device knows how many."""
        if count is None:
            self.is_exact = False
            return
        self.free += count
        assert self.free <= self.capacity, "a page was freed twice"
