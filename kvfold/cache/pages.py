"""The tensors of one page class, and the block tables that say which pages each KV stream holds.

Every array of a pool is declared once, in `array_forms`: a page id indexes all of them alike, so what belongs to a slot is
copied, counted, poisoned and freed together. All tables of a cache group lie in one flat array; a sequence owns a block of it,
`width` entries for each of its streams, so that one long sequence costs the others nothing.
Letters: P pages, N slots a page, D head dim, X any number of slots, R places for sequences.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from kvfold.cache.allocator import PageBook
from kvfold.layout.planner import PageClass
from kvfold.ops.native import huge_pages
from kvfold.ops.quantised import dequantise, indexable, page_arrays, quantise, turned

HUGE_PAGE_BYTES = 2**21
"""A large memory page of the machine; a smaller array can't lie in one."""


def array_forms(
    one: PageClass, dtype: torch.dtype, slot_arrays: Mapping[str, str]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Every array of a page class: its shape within a slot, and its dtype. `dtype`: the model's; `slot_arrays`: what methods
    keep with each slot, name -> dtype.
    """
    forms: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"position": ((), torch.int32)}
    for name, storage in (("k", one.k), ("v", one.v)):
        stored = {name: ((one.head_dim,), dtype)} if storage == "model" else page_arrays(name, storage, one.head_dim)
        forms |= stored
    return forms | {name: ((), getattr(torch, number)) for name, number in slot_arrays.items()}


class PagePool:
    """P pages of N slots. Without `limit` it grows, which copies its arrays once."""

    @torch.inference_mode(False)
    def __init__(
        self, page_class: PageClass, *, dtype: torch.dtype, slot_arrays: Mapping[str, str], slots: int, device: torch.device,
        pages: int, limit: int | None, poison: bool = False,
    ):  # fmt: skip
        """`dtype`: the model's, what `model` storage means and what is read back. `slot_arrays`: see `array_forms`. `poison`:
        fill fresh and freed pages with NaN, so that a read of what was evicted shows (tests).
        """
        self.page_class, self.dtype, self.slot_arrays = page_class, dtype, slot_arrays
        self.slots, self.device, self._poison = slots, device, poison
        self.book = PageBook(capacity=pages, free=pages, limit=limit, count_free=lambda: int(self._top))
        forms = array_forms(page_class, dtype, slot_arrays)
        self.arrays = {name: self._new_array(pages, *form) for name, form in forms.items()}
        self.references = torch.zeros(pages, dtype=torch.int32, device=device)
        # A stack; one place more than there are pages takes what a masked write must not touch.
        self.free_list = torch.arange(pages + 1, dtype=torch.int32, device=device)
        self._top = torch.full((), pages, dtype=torch.int64, device=device)

    @property
    def position(self) -> Tensor:
        """int32 [P, N]."""
        return self.arrays["position"]

    @property
    def num_bytes(self) -> int:
        """Bytes reserved from the device."""
        books = self.references.nbytes + self.free_list.nbytes + self._top.nbytes
        return sum(array.nbytes for array in self.arrays.values()) + books

    @property
    def slot_bytes(self) -> int:
        """Bytes of one entry with everything that is kept for it."""
        return sum(array.itemsize * array.stride(0) // self.slots for array in self.arrays.values())

    @property
    def held_pages(self) -> int:
        """Pages that some stream holds; one that several share counts once."""
        return self.book.capacity - self.book.exact_free()

    # -- pages ---------------------------------------------------------------------------------------------------

    def reserve(self, pages: int) -> None:
        """Make sure that so many pages are free, growing if allowed. Raises `CacheFull` with nothing changed."""
        capacity = self.book.grown_capacity(pages)
        if capacity > self.book.capacity:
            self._resize(capacity)

    def allocate(self, count: int) -> Tensor:
        """Ids of `count` free pages, int32, ascending where they were never used: a contiguous run."""
        self.book.allocated(count)
        self._top -= count
        ids = self.free_list[self._top + torch.arange(count, device=self.device)]
        self.references[ids.long()] = 1
        return ids

    def unused(self, ids_X: Tensor, unused_X: Tensor) -> None:
        """Of pages that were allocated ahead, those marked were not needed: free again, without asking how many."""
        order = unused_X.cumsum(0)
        place = torch.where(unused_X, self._top + order - 1, self.free_list.shape[0] - 1)
        self.free_list[place] = ids_X
        self.references.index_add_(0, ids_X.long(), -unused_X.int())
        if ids_X.numel():
            self._top += order[-1]
            self.book.freed(None)

    def share(self, ids: Tensor) -> None:
        """One more stream holds each of these pages."""
        self.references.index_add_(0, ids.reshape(-1).long(), torch.ones_like(ids.reshape(-1), dtype=torch.int32))

    def free(self, ids: Tensor) -> None:
        """One stream less holds each of these pages (an id may stand several times); the ones nobody holds are free."""
        ids = ids.reshape(-1).long()
        self.references.index_add_(0, ids, ids.new_full(ids.shape, -1, dtype=torch.int32))
        free = ids[self.references[ids] == 0].unique()
        self.free_list[self._top + torch.arange(free.numel(), device=self.device)] = free.int()
        self._top += free.numel()
        self.book.freed(free.numel())
        if self._poison:
            for array in self.arrays.values():
                if array.is_floating_point():
                    indexable(array)[free] = indexable(array.new_full((), torch.nan))

    def copy_pages(self, source: Tensor, target: Tensor) -> None:
        """Copy whole pages with all that belongs to their slots."""
        source, target = source.long(), target.long()
        for array in map(indexable, self.arrays.values()):
            array[target] = array[source]

    # -- slots ---------------------------------------------------------------------------------------------------

    def write(self, slot_X: Tensor, k_XD: Tensor, v_XD: Tensor) -> None:
        """Store keys and values at flat slots (page * N + slot)."""
        for name, new in (("k", k_XD), ("v", v_XD)):
            self._write_one(name, slot_X, new)

    def _write_one(self, name: str, slot_X: Tensor, new_XD: Tensor) -> None:
        codes, scales = self._coded(name, new_XD)
        indexable(self.arrays[name]).flatten(0, 1).index_copy_(0, slot_X, indexable(codes))
        if scales is not None:
            self.arrays[f"{name}_scale"].flatten(0, 1).index_copy_(0, slot_X, scales)

    def read(self, name: str, slot: Tensor) -> Tensor:
        """Keys (`k`) or values (`v`) at flat slots of any shape, [..., D] in the model's dtype."""
        array, scales = self.arrays[name], self.arrays.get(f"{name}_scale")
        codes = indexable(array).flatten(0, 1)[slot].view(array.dtype)
        return self._decoded(name, codes, None if scales is None else scales.flatten(0, 1)[slot])

    def as_stored(self, x: Tensor, name: str) -> Tensor:
        """Keys (`k`) or values (`v`) [..., D] as they would be read back, in their own dtype."""
        return self._decoded(name, *self._coded(name, x)).to(x.dtype)

    def _coded(self, name: str, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x, storage = x.to(self.dtype), getattr(self.page_class, name)
        return quantise(turned(x, storage) if name == "k" else x, storage)

    def _decoded(self, name: str, codes: Tensor, scales: Tensor | None) -> Tensor:
        storage, head_dim = getattr(self.page_class, name), self.page_class.head_dim
        if storage == "model" or name == "v":
            return dequantise(codes, scales, storage, head_dim, self.dtype)
        return turned(dequantise(codes, scales, storage, head_dim, torch.float32), storage).to(self.dtype)

    def rewrite(self, slot_X: Tensor, v_XD: Tensor, values: Mapping[str, Tensor]) -> None:
        """Other values at flat slots, and other slot state under these names; keys and positions stay."""
        self._write_one("v", slot_X, v_XD)
        for name, new in values.items():
            array = self.arrays[name].view(-1)
            array.index_copy_(0, slot_X, new.to(array.dtype))

    def write_state(self, slot_X: Tensor, values: Mapping[str, Tensor]) -> None:
        """Store slot state at flat slots; arrays that are not named become 0."""
        for name in self.slot_arrays:
            array = self.arrays[name].view(-1)
            new = values.get(name)
            new = torch.zeros_like(slot_X, dtype=array.dtype) if new is None else new.to(array.dtype)
            array.index_copy_(0, slot_X, new)

    def move(self, source_X: Tensor, target_X: Tensor) -> None:
        """Copy entries from flat slots to others, with all that belongs to them."""
        for array in map(indexable, self.arrays.values()):
            flat = array.flatten(0, 1)
            flat.index_copy_(0, target_X, flat[source_X])

    def release(self) -> None:
        """Give the arrays back to the device; the pool is of no more use."""
        assert not self.held_pages
        self.arrays, self.references, self.free_list = {}, None, None

    def _new_array(self, pages: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        array = torch.empty((pages, self.slots, *shape), dtype=dtype, device=self.device)
        array = huge_pages(array) if array.nbytes >= HUGE_PAGE_BYTES else array
        if not dtype.is_floating_point:
            return array.zero_()
        return array.fill_(torch.nan) if self._poison else array

    # Here and wherever arrays are made: inference tensors could not be written outside inference mode later on.
    @torch.inference_mode(False)
    def _resize(self, capacity: int) -> None:
        book = self.book
        old, free = book.capacity, book.exact_free()
        for name, array in self.arrays.items():
            self.arrays[name] = self._new_array(capacity, array.shape[2:], array.dtype)
            self.arrays[name][:old] = array
        references = self.references.new_zeros(capacity)
        references[:old] = self.references
        fresh = torch.arange(old, capacity, dtype=torch.int32, device=self.device)
        free_list = self.free_list.new_zeros(capacity + 1)
        free_list[: free + fresh.numel()] = torch.cat((self.free_list[:free], fresh))
        self.references, self.free_list = references, free_list
        self._top = self._top + fresh.numel()
        book.capacity, book.free = capacity, free + fresh.numel()


WIDTH_STEP = 8
"""Widths grow by whole steps, so that a block is not moved for every page."""


class BlockTables:
    """The tables of a group's sequences. A width is what the host knows; what is filled the lengths say."""

    @torch.inference_mode(False)
    def __init__(self, streams: int, sequences: int, device: torch.device, *, is_bounded: bool):
        """`streams`: of one sequence. `sequences`: places for them. `is_bounded`: no room is kept for later growth."""
        self._streams, self._device, self._is_bounded = streams, device, is_bounded
        # The last entry takes what a masked write must not touch.
        self.flat = torch.zeros(1, dtype=torch.int32, device=device)
        self._base, self.width = [0] * sequences, [0] * sequences
        """Entries of each stream, by sequence."""
        self._end = 0
        self.place_R2 = torch.zeros((sequences, 2), dtype=torch.int64, device=device)
        """Base and width of each sequence's block: its table number z starts at base + z * width."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tables and of where they lie."""
        return self.flat.nbytes + self.place_R2.nbytes

    def bytes_with(self, sequences: int, widths: Mapping[int, int]) -> int:
        """`num_bytes` once there are places for so many sequences, and some of them have tables at least so wide."""
        live = sum(max(width, widths.get(one, 0)) for one, width in enumerate(self.width))
        new = sum(width for one, width in widths.items() if one >= len(self.width))
        places = max(sequences, len(self.width))
        return 4 * (self._streams * (live + new) + 1) + 16 * places

    @torch.inference_mode(False)
    def resize(self, sequences: int) -> None:
        """Places for so many sequences."""
        missing = sequences - len(self.width)
        if missing > 0:
            self._base += [0] * missing
            self.width += [0] * missing
            self.place_R2 = torch.cat((self.place_R2, self.place_R2.new_zeros((missing, 2))))

    def widen(self, widths: Mapping[int, int]) -> None:
        """Tables at least so wide for these sequences."""
        grown = {one: width for one, width in widths.items() if width > self.width[one]}
        if not grown:
            return
        if not self._is_bounded:
            grown = {one: -(-width // WIDTH_STEP) * WIDTH_STEP for one, width in grown.items()}
        size = self._streams * sum(grown.values())
        if self._end + size > self.flat.shape[0] - 1:
            self._compact(grown)
            return
        for one, width in grown.items():
            self._end = self._move(self.flat, one, self._end, width)
        self._tell()

    def clear(self, sequences: list[int], *, compact: bool) -> None:
        """These sequences hold nothing any more; `compact`: what is left may be moved."""
        for one in sequences:
            self._base[one] = self.width[one] = 0
        if compact and 2 * self._streams * sum(self.width) < self.flat.shape[0] - 1:
            self._compact({})
        else:
            self._tell()

    def copy(self, source: int, target: int) -> None:
        """The target's table is the source's; widths are equal already."""
        size = self._streams * self.width[source]
        start, end = self._base[source], self._base[target]
        self.flat[end : end + size] = self.flat[start : start + size]

    @torch.inference_mode(False)
    def _compact(self, grown: Mapping[int, int]) -> None:
        """Lay all blocks side by side in a new array, some of them wider."""
        widths = [grown.get(one, width) for one, width in enumerate(self.width)]
        live = self._streams * sum(widths)
        capacity = live if self._is_bounded else live + live // 2
        flat, end = self.flat.new_zeros(capacity + 1), 0
        for one, width in enumerate(widths):
            if width:
                end = self._move(flat, one, end, width)
        self.flat, self._end = flat, end
        self._tell()

    def _move(self, flat: Tensor, one: int, to: int, width: int) -> int:
        """Copy a sequence's block to `to`, each stream's table widened; gives the end of the block."""
        streams, old, base = self._streams, self.width[one], self._base[one]
        block = flat[to : to + streams * width].view(streams, width)
        block[:, :old] = self.flat[base : base + streams * old].view(streams, old)
        block[:, old:] = 0
        self._base[one], self.width[one] = to, width
        return to + streams * width

    def _tell(self) -> None:
        places = torch.tensor([self._base, self.width], dtype=torch.int64).t()
        self.place_R2.copy_(places.to(self._device))
