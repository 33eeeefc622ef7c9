"""What the bytes that a store's sequences hold are used for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.cache.group import CacheGroup
from kvfold.cache.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Bytes held, by use; together the store's `allocated_bytes`."""

    entries: int
    """Entries that stay, each with its position."""
    waiting: int
    """Entries that a gate has marked and that are seen until their delay is over."""
    rounding: int
    """Places of pages that no entry fills: pages are held whole."""
    rings: int
    """What a learned method keeps of a KV stream's newest tokens beside its pages."""
    books: int
    """Tables, lengths, and what a page takes beside its entries."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.entries + self.waiting + self.rounding + self.rings + self.books


def usage_of(store: Store) -> Usage:
    """Bytes that the sequences of a store hold, by use; a page that they share counts once."""
    entries = waiting = rounding = rings = 0
    held_bytes = store.allocated_bytes
    for group in store.groups:
        held, filled = _places(group)
        leaving, slot_bytes = _leaving(group), group.pool.slot_bytes
        entries += (filled - leaving) * slot_bytes
        waiting += leaving * slot_bytes
        rounding += (held * group.pool.slots - filled) * slot_bytes
        rings += group.state_bytes(store.num_sequences)
    books = held_bytes - entries - waiting - rounding - rings
    return Usage(entries=entries, waiting=waiting, rounding=rounding, rings=rings, books=books)


def _places(group: CacheGroup) -> tuple[int, int]:
    """Pages that the streams of a group hold, and the places filled in them; shared ones once."""
    streams = torch.arange(group.length.numel(), device=group.length.device)
    stream, index, page = group.page_ids(streams)
    there = (group.lengths(stream).long() - index * group.pool.slots).clamp(max=group.pool.slots)
    ids, holder = page.long().unique(return_inverse=True)
    filled: Tensor = torch.zeros_like(ids).scatter_reduce(0, holder, there, "amax")
    return ids.numel(), int(filled.sum())


def _leaving(group: CacheGroup) -> int:
    """Places of entries that are marked and still there, those in shared pages once."""
    if group.method.mark_array is not None:
        return _marked_places(group, group.pool.arrays[group.method.mark_array])
    found = group.method.marked(group.flat_state)
    if found is None:
        return 0
    stream, slot = found
    slots = group.pool.slots
    page = group.tables.flat[group.starts(stream) + slot // slots].long()
    return (page * slots + slot % slots).unique().numel()


def _marked_places(group: CacheGroup, mark_PN: Tensor) -> int:
    """The same where a slot array says which entries are marked."""
    streams = torch.arange(group.length.numel(), device=group.length.device)
    stream, index, page = group.page_ids(streams)
    slot = index[:, None] * group.pool.slots + torch.arange(group.pool.slots, device=index.device)
    marked = (mark_PN[page.long()] > 0) & (slot < group.lengths(stream)[:, None])
    place = page.long()[:, None] * group.pool.slots + torch.arange(group.pool.slots, device=index.device)
    return place[marked].unique().numel()
