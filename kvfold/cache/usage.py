"""What the bytes that a store's rows hold are used for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.cache.bank import Bank
from kvfold.cache.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Bytes held, by use; together the store's `allocated_bytes`."""

    entries: int
    """Entries that stay, each with its position."""
    waiting: int
    """Entries that a gate has let go and that are seen until their delay is over."""
    rounding: int
    """Places of pages that no entry fills: pages are held whole."""
    rings: int
    """What a learned method keeps of a lane's newest tokens beside its pages."""
    books: int
    """Tables, lengths, and what a page takes beside its entries."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.entries + self.waiting + self.rounding + self.rings + self.books


def usage_of(store: Store) -> Usage:
    """Bytes that the rows of a store hold, by use; a page that rows share counts once."""
    entries = waiting = rounding = rings = 0
    for bank in store.banks:
        held, filled = _places(bank)
        leaving = _leaving(bank)
        entries += (filled - leaving) * bank.pool.slot_bytes
        waiting += leaving * bank.pool.slot_bytes
        rounding += (held * bank.pool.slots - filled) * bank.pool.slot_bytes
        if bank.state:
            rings += bank.state.bytes_for(store.num_rows)
    books = store.allocated_bytes - entries - waiting - rounding - rings
    return Usage(entries=entries, waiting=waiting, rounding=rounding, rings=rings, books=books)


def _places(bank: Bank) -> tuple[int, int]:
    """Pages that the lanes of a bank hold, and the places filled in them; shared ones once."""
    lanes = torch.arange(bank.length.numel(), device=bank.length.device)
    lane, index, page = bank.page_ids(lanes)
    there = (bank.length.view(-1)[lane].long() - index * bank.pool.slots).clamp(max=bank.pool.slots)
    ids, holder = page.long().unique(return_inverse=True)
    filled: Tensor = torch.zeros_like(ids).scatter_reduce(0, holder, there, "amax")
    return ids.numel(), int(filled.sum())


def _leaving(bank: Bank) -> int:
    """Places of entries that are flagged, those in shared pages once."""
    if not bank.state:
        return 0
    lane, slot = bank.state.flagged()
    page = bank.table_flat()[lane, slot // bank.pool.slots].long()
    return (page * bank.pool.slots + slot % bank.pool.slots).unique().numel()
