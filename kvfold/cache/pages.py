"""Counting pages: how many a pool has, how many are free, how far it may grow. Plain numbers, no torch.

The tensors that the pages are made of live in pool.py.
"""

from dataclasses import dataclass

GROWTH = 1.5
"""A pool without a budget grows by half, so that every byte is copied a bounded number of times."""


class CacheFull(RuntimeError):
    """The cache can't hold what a call would add. Raised before anything is written: the rows stand as they were."""


def pages_for(entries: int, page_slots: int) -> int:
    """Pages that hold so many entries of one head."""
    return -(-entries // page_slots)


@dataclass(kw_only=True, slots=True)
class PageBook:
    """The books of one pool. `limit` is the largest capacity allowed, None where only the machine's memory limits it."""

    capacity: int
    free: int
    limit: int | None = None

    def grown_capacity(self, needed: int) -> int:
        """The capacity that leaves `needed` pages free: today's if it does already. Raises `CacheFull` past the limit."""
        missing = needed - self.free
        if missing <= 0:
            return self.capacity
        if self.limit is not None and self.capacity + missing > self.limit:
            raise CacheFull(
                f"the call needs {needed} more pages and {self.free} of {self.capacity} are free: "
                "free rows, shorten the text, or give the cache more memory_bytes"
            )
        grown = max(self.capacity + missing, int(self.capacity * GROWTH))
        return grown if self.limit is None else min(grown, self.limit)

    def take(self, count: int) -> slice:
        """The places of the free list that hand out `count` pages."""
        assert count <= self.free, "pages are reserved before they are taken"
        self.free -= count
        return slice(self.free, self.free + count)

    def give_back(self, count: int) -> slice:
        """The places of the free list that take `count` pages in."""
        assert self.free + count <= self.capacity, "a page was given back twice"
        self.free += count
        return slice(self.free - count, self.free)
