"""The store as transformers sees it: a `Cache` that `generate` carries from step to step, and what its bytes are used for.

Columns fed (padding included) are what transformers counts; tokens seen are the real ones; tokens kept are what the
store holds. Letters: B rows, T columns of a call.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from kvfold.cache.chunk import view_of
from kvfold.cache.decode import DecodeSegment
from kvfold.cache.store import Batch, Store
from kvfold.cache.views import KVView
from kvfold.errors import UserError
from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import PAGE_SLOTS


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
        pool, streams = group.pool, torch.arange(group.length.numel(), device=group.length.device)
        line, index, page = group.page_ids(streams)
        there = (group.lengths(line).long() - index * pool.slots).clamp(max=pool.slots)
        page, holder = page.long().unique(return_inverse=True)
        filled: Tensor = torch.zeros_like(page).scatter_reduce(0, holder, there, "amax")
        leaving, marked = 0, group.method.marked(group.flat_state)
        if group.method.mark_array is not None:
            is_there = torch.arange(pool.slots, device=page.device) < filled[:, None]
            leaving = int(((pool.arrays[group.method.mark_array][page] > 0) & is_there).sum())
        elif marked is not None:
            leaving = group.slots_at(*marked).unique().numel()
        entries += (int(filled.sum()) - leaving) * pool.slot_bytes
        waiting += leaving * pool.slot_bytes
        rounding += (page.numel() * pool.slots - int(filled.sum())) * pool.slot_bytes
        rings += group.state_bytes(store.num_sequences)
    books = held_bytes - entries - waiting - rounding - rings
    return Usage(entries=entries, waiting=waiting, rounding=rounding, rings=rings, books=books)


class _LayerFace(CacheLayerMixin):
    """One decoder layer as transformers asks after it; nothing is held here."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, columns: int):
        super().__init__()
        self._columns = columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the store is ready from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Refused: a model of another library would not say which tokens are padding, nor attend as the methods need."""
        raise UserError("a kvfold cache is filled by a kvfold model only: load this one with kvfold.load")

    def get_seq_length(self) -> int:
        """Columns fed so far."""
        return self._columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a mask spans, and where they begin."""
        return self._columns + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


class FoldCache(Cache):
    """Keys and values of B rows, folded as the layout says. Made by `model.new_cache`."""

    is_compileable = False
    """Lengths change from step to step."""
    is_croppable = False
    """See `crop`."""
    is_initialized = True
    """The store is ready from the start."""

    def __init__(
        self, layout: KVLayout, *, dtype: torch.dtype, device: torch.device | str = "cpu", rows: int = 1,
        memory_bytes: int | None = None, page_slots: int = PAGE_SLOTS, base_layout: KVLayout | None = None,
        gates: Any = None, poison: bool = False,
    ):  # fmt: skip
        """`rows`: expected; the first call may bring another number. `memory_bytes`: reserved once, never exceeded.
        `gates`: whatever the model that fills this cache takes its decisions from; None = the model's own.
        """
        super().__init__(layers=[])
        if rows < 0:
            raise UserError(f"rows {rows}: there are none or more: say how many, or 0 where the first call brings them")
        self.layout, self._base_layout, self.gates = layout, base_layout, gates
        self.gate_table: Any = None
        """What the model worked out from them for this layout."""
        self.store = Store(
            layout, dtype=dtype, device=device, memory_bytes=memory_bytes, sequences=rows, page_slots=page_slots, poison=poison
        )  # fmt: skip
        self.rows: list[int] = self.store.new_sequences(rows)
        """Handles of the store, one for each row."""
        self.columns = 0
        self.padding_B: Tensor | None = None
        """Of the present `generate`: rows that have ended and are fed padding, bool [B]."""

    def __del__(self):
        # A copy shares its store with others: its pages are free when it goes. A finaliser may run inside anything, so
        # here they are only queued.
        rows, store = self.__dict__.get("rows"), self.__dict__.get("store")
        if rows and store is not None:
            store.queue_free(rows)

    # -- what users ask ------------------------------------------------------------------------------------------

    @property
    def seen_tokens(self) -> Tensor:
        """Real tokens seen, int64 [B]."""
        return self.store.seen[self.store.index(self.rows)]

    @property
    def kept_tokens(self) -> Tensor:
        """Entries held, int64 [owners ascending, B, most KV heads]; -1 where an owner has fewer heads."""
        owners, index = self.layout.owners, self.store.index(self.rows)
        most = max(self.layout.layers[owner].num_kv_heads for owner in owners)
        kept = torch.full((len(owners), len(self.rows), most), -1, dtype=torch.int64, device=self.store.device)
        for number, owner in enumerate(owners):
            group, place = self.store.place_of[owner]
            kept[number, :, : group.num_kv_heads] = group.length[place][index].long()
        return kept

    @property
    def kept_positions(self) -> list[list[list[list[int]]]]:
        """Positions held, ascending: `[owner][row][kv head]`, for pictures and tests."""
        held = []
        for owner in self.layout.owners:
            group, place = self.store.place_of[owner]
            ids = group.ids(self.store.index(self.rows))[place]
            position = group.stored_positions(ids, int(group.length.max()) if group.length.numel() else 0)
            held.append([[sorted(head[head >= 0].tolist()) for head in row] for row in position])
        return held

    @property
    def allocated_bytes(self) -> int:
        """Bytes that the rows hold: pages, tables, lengths, state."""
        return self.store.allocated_bytes

    @property
    def usage(self) -> Usage:
        """What `allocated_bytes` are used for: entries, the rounding to pages, rings, books."""
        return usage_of(self.store)

    @property
    def pool_bytes(self) -> int:
        """Bytes reserved from the device."""
        return self.store.pool_bytes

    @property
    def full_bytes(self) -> int:
        """Bytes that the same tokens take under the same sharing of layers and heads with nothing evicted or quantised."""
        return self.store.bytes_under(self.layout.base(), self.rows)

    @property
    def base_bytes(self) -> int:
        """Bytes that the same tokens take in the model as it was before conversion."""
        return self.store.bytes_under(self._base_layout or self.layout.base(), self.rows)

    @property
    def free_pages(self) -> int:
        """Pages that are reserved and held by nobody."""
        return self.store.free_pages

    # -- what the decoder asks -----------------------------------------------------------------------------------

    def pieces(self, real_BT: Tensor | None, *, num_rows: int, num_tokens: int) -> Iterator[tuple[int, int]]:
        """Column ranges of a call, to be run one by one as they come: one, but under learned gates as many as it takes for
        each to fit whatever the gates decide. The last may still meet `CacheFull`; the rows then stand where it begins.
        """
        if num_rows != len(self.rows):
            self._fit_rows(num_rows, num_tokens)
        start = 0
        while start < num_tokens:
            end = num_tokens
            while self.store.may_cut_calls and end - start > 1 and not self._fits(real_BT, start, end):
                end = start + (end - start) // 2
            yield start, end
            start = end

    def _fits(self, real_BT: Tensor | None, start: int, end: int) -> bool:
        added = [end - start] * len(self.rows) if real_BT is None else real_BT[:, start:end].sum(dim=1).tolist()
        return self.store.fits(self.rows, added)

    @contextmanager
    def call(self, real_BT: Tensor | None, *, num_rows: int, num_tokens: int, scale: float,
             softcap: float | None = None) -> Iterator[KVView]:  # fmt: skip
        """One forward call as a transaction: gives the view that all its layers attend through.

        `real_BT`: bool, False at padding; None = no padding. An error inside leaves the rows unusable until `reset`.
        """
        if num_rows != len(self.rows) or num_tokens < 1:
            self._fit_rows(num_rows, num_tokens)
        added = [num_tokens] * num_rows if real_BT is None else real_BT.sum(dim=1).tolist()
        self.store.begin(self.rows, added)
        batch = Batch(self.store, self.rows, added, real_BT, num_tokens, scale=scale, softcap=softcap)
        view = DecodeSegment(self.store, batch) if num_tokens == 1 == min(added) else view_of(self.store, batch)
        try:
            yield view
            view.close()
        except BaseException:
            view.abandon()
            raise
        self.store.commit(self.rows, added)
        self.columns += num_tokens

    def _fit_rows(self, num_rows: int, num_tokens: int) -> None:
        if num_tokens < 1 or num_rows < 1:
            raise UserError(
                f"a call of {num_rows} rows and {num_tokens} tokens: it brings 1 or more of each: feed some"
            )
        if self.columns:
            raise UserError(f"the cache holds {len(self.rows)} rows, the call brings {num_rows}: give it as many")
        self.store.split_anew(num_rows)
        surplus, self.rows = self.rows[num_rows:], self.rows[:num_rows]
        self.store.free(surplus)
        self.rows = self.rows + self.store.new_sequences(num_rows - len(self.rows))

    # -- what transformers asks ----------------------------------------------------------------------------------

    @property
    def layers(self) -> list[_LayerFace]:
        """One face per decoder layer, made when asked for: held, they would keep the cache alive in a circle."""
        return [_LayerFace(self.columns) for _ in range(self.layout.num_layers)]

    @layers.setter
    def layers(self, layers: list) -> None:
        assert not layers, "transformers sets the list once, empty"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far, padding included: what was evicted has been fed all the same."""
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns that a mask spans, and where they begin."""
        return self.columns + query_length, 0

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.rows)

    def select_rows(self, rows: list[int]) -> None:
        """Go on with these rows of the present ones, in this order; one may stand several times or not at all."""
        copies = self.store.fork([self.rows[row] for row in rows])
        self.store.free(self.rows)
        self.rows = copies

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i goes on from row beam_idx[i]."""
        if beam_idx.tolist() != list(range(len(self.rows))):
            self.select_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows, side by side."""
        self.select_rows([row for row in range(len(self.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these rows only."""
        self.select_rows(torch.arange(len(self.rows))[indices.cpu()].tolist())

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: pages are written in place, and a lossy method could not bring back what it evicted."""
        raise UserError("a kvfold cache can't be cut back: keep a copy with copy(), or start again from a new cache")

    def copy(self) -> "FoldCache":
        """A second cache that continues from the same tokens in the same store; pages are shared until one side writes."""
        twin = object.__new__(FoldCache)
        twin.__dict__.update(self.__dict__ | {"rows": []})
        twin.rows = self.store.fork(self.rows)
        return twin

    __copy__ = copy

    def free(self) -> None:
        """Free all pages now; the cache is empty and has no rows."""
        self.store.free(self.rows)
        self.rows, self.columns = [], 0

    def reset(self) -> None:
        """Forget all tokens; the pages are free again."""
        number = len(self.rows)
        self.free()
        self.rows = self.store.new_sequences(number)
