"""The tensors of one page class: keys, values, positions and slot state of P pages, and the list of free ones.

A page id indexes all arrays alike, so what belongs to a slot moves, forks and is freed together. Who holds which page
is the business of bank.py. Letters: P pages, N slots a page, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.cache.pages import PageBook


@dataclass(frozen=True, kw_only=True, slots=True)
class PageClass:
    """What pages of one kind hold; owners with equal classes draw from one pool."""

    head_dim: int
    dtype: torch.dtype
    scored: bool
    """Whether each slot carries an fp32 score."""


class PagePool:
    """P pages of N slots. Without `limit` it grows, which copies its arrays once."""

    @torch.inference_mode(False)
    def __init__(
        self,
        page_class: PageClass,
        *,
        slots: int,
        device: torch.device,
        pages: int,
        limit: int | None,
        poison: bool = False,
    ):
        """`poison`: fill fresh and freed pages with NaN, so that a read of what was dropped shows (tests)."""
        self.page_class, self.slots, self.device, self._poison = page_class, slots, device, poison
        self.book = PageBook(capacity=0, free=0, limit=limit)
        self.k, self.v = (self._blank(0, page_class.head_dim) for _ in range(2))
        self.position = torch.empty((0, slots), dtype=torch.int32, device=device)
        self.score = torch.empty((0, slots), dtype=torch.float32, device=device) if page_class.scored else None
        self.references = torch.empty(0, dtype=torch.int32, device=device)
        self.free_list = torch.empty(0, dtype=torch.int32, device=device)
        self._resize(pages)

    def _blank(self, pages: int, width: int) -> Tensor:
        shape = (pages, self.slots, width)
        fresh = torch.empty(shape, dtype=self.page_class.dtype, device=self.device)
        return fresh.fill_(torch.nan) if self._poison else fresh

    @property
    def num_bytes(self) -> int:
        """Bytes reserved from the device."""
        arrays = (self.k, self.v, self.position, self.score, self.references, self.free_list)
        return sum(array.nbytes for array in arrays if array is not None)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one entry with its position and score."""
        arrays = (self.k, self.v, self.position, self.score)
        return sum(array.itemsize * array.stride(0) // self.slots for array in arrays if array is not None)

    @property
    def held_pages(self) -> int:
        """Pages that some lane holds; one that several share counts once."""
        return self.book.capacity - self.book.free

    def reserve(self, pages: int) -> None:
        """Make sure that so many pages are free, growing if allowed. Raises `CacheFull` with nothing changed."""
        capacity = self.book.grown_capacity(pages)
        if capacity > self.book.capacity:
            self._resize(capacity)

    def take(self, count: int) -> Tensor:
        """Ids of `count` free pages, int32, ascending where they were never used: a contiguous run."""
        ids = self.free_list[self.book.take(count)].clone()
        self.references[ids.long()] = 1
        return ids

    def share(self, ids: Tensor) -> None:
        """One more lane holds each of these pages."""
        self.references.index_add_(0, ids.reshape(-1).long(), torch.ones_like(ids.reshape(-1), dtype=torch.int32))

    def give_back(self, ids: Tensor) -> None:
        """One lane less holds each of these pages (an id may stand several times); the ones nobody holds are free."""
        ids = ids.reshape(-1).long()
        self.references.index_add_(0, ids, ids.new_full(ids.shape, -1, dtype=torch.int32))
        free = ids[self.references[ids] == 0].unique()
        self.free_list[self.book.give_back(free.numel())] = free.int()
        if self._poison:
            self.k[free], self.v[free] = torch.nan, torch.nan

    def copy_pages(self, source: Tensor, target: Tensor) -> None:
        """Copy whole pages with all that belongs to their slots."""
        source, target = source.long(), target.long()
        for array in (self.k, self.v, self.position, self.score):
            if array is not None:
                array[target] = array[source]

    def release(self) -> None:
        """Give the arrays back to the device; the pool is of no more use."""
        assert not self.held_pages
        self.k = self.v = self.position = self.score = self.references = self.free_list = None

    # Here and wherever arrays are made: inference tensors could not be written outside inference mode later on.
    @torch.inference_mode(False)
    def _resize(self, capacity: int) -> None:
        old, book = self.book.capacity, self.book
        for name in ("k", "v", "position", "score", "references"):
            array = getattr(self, name)
            if array is None:
                continue
            grown = (
                self._blank(capacity, array.shape[-1])
                if array.ndim == 3
                else array.new_zeros((capacity, *array.shape[1:]))
            )
            grown[:old] = array
            setattr(self, name, grown)
        kept = self.free_list[: book.free]
        fresh = torch.arange(old, capacity, dtype=torch.int32, device=self.device)
        self.free_list = torch.empty(capacity, dtype=torch.int32, device=self.device)
        self.free_list[: book.free + fresh.numel()] = torch.cat((kept, fresh))
        book.capacity, book.free = capacity, book.free + fresh.numel()
