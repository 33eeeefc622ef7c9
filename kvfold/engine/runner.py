"""Forward calls on stored sequences, and the store as the scheduler sees it: sequences are handles, memory is bytes.

Methods of one engine have a store each, and all of them draw pages from the same pools: the KV budget is one. Each store
also has a fixed number of places for sequences, whose tables and per-sequence state are set aside from the budget.
Letters: B sequences, T tokens of a call, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvfold.cache.group import CacheGroup
from kvfold.cache.hf import FoldCache
from kvfold.cache.pages import PagePool
from kvfold.cache.store import Store
from kvfold.engine.budget import SequenceCost
from kvfold.errors import UserError
from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import PAGE_SLOTS, page_bytes, page_class, slot_arrays
from kvfold.methods.base import DTYPE_BYTES
from kvfold.models.decoder import FoldForCausalLM

STATE_SHARE = 8
"""Per-sequence state takes at most one part in so many of the budget."""


class SequenceView(FoldCache):
    """Some sequences of a store, as a call of the model takes them. They stay the store's."""

    def __init__(self, store: Store, handles: Sequence[int]):
        self.layout, self._base_layout, self.store = store.layout, None, store
        self.gates = self.gate_table = None
        self.rows, self.columns, self.padding_B = list(handles), 1, None

    def __del__(self):
        """Nothing is freed: sequences end when the scheduler says so."""


class Runner:
    """One model, one budget of bytes, a store for each method."""

    def __init__(
        self, model: FoldForCausalLM, layouts: Mapping[str, KVLayout], memory_bytes: int, *, max_sequences: int,
        page_slots: int = PAGE_SLOTS, ratios: Mapping[str, Mapping] | None = None, poison: bool = False,
    ):  # fmt: skip
        """`layouts` by method. `max_sequences`: running ones and snapshots, of each method. `ratios` as calibrated."""
        self.model, self.layouts, self._poison = model, dict(layouts), poison
        self._itemsize, self._slots = model.dtype.itemsize, page_slots
        self._arrays: dict = {}
        for layout in layouts.values():
            for one, arrays in slot_arrays(layout).items():
                self._arrays[one] = self._arrays.get(one, {}) | arrays
        states = {one: sum(DTYPE_BYTES[dtype] for dtype in arrays.values()) for one, arrays in self._arrays.items()}
        self.costs = {
            name: SequenceCost(
                layout, model_bytes=self._itemsize, page_slots=page_slots, slot_state=states,
                ratios=(ratios or {}).get(name),
            )
            for name, layout in layouts.items()
        }  # fmt: skip
        state_bytes = sum(cost.state_bytes for cost in self.costs.values())
        self.max_sequences = max(2, min(max_sequences, memory_bytes // STATE_SHARE // state_bytes))
        self._pools = self._make_pools(states, memory_bytes - self.max_sequences * state_bytes)
        self._page_bytes = {id(pool): size for pool, size in self._pools.values()}
        pools = {one: pool for one, (pool, _) in self._pools.items()}
        self.stores = {
            name: Store(
                layout, dtype=model.dtype, device=model.device, page_slots=page_slots, sequences=self.max_sequences, pools=pools
            )
            for name, layout in layouts.items()
        }  # fmt: skip
        self._sizes: dict[str, dict[int, tuple[int, int]]] = {}

    def _make_pools(self, states: Mapping, memory_bytes: int) -> dict:
        """By page class: the pool, and the bytes of a page. The budget is shared out by the bytes of one token in each class."""
        sizes = {
            one: page_bytes(one, self._slots, model_bytes=self._itemsize, slot_state_bytes=state)
            for one, state in states.items()
        }
        shares = dict.fromkeys(sizes, 0)
        layout = next(iter(self.layouts.values()))
        for owner in layout.owners:
            shares[page_class(layout, owner)] += layout.layers[owner].num_kv_heads * sizes[page_class(layout, owner)]
        pools = {}
        for one, size in sizes.items():
            pages = max(0, memory_bytes) * shares[one] // sum(shares.values()) // size
            if pages < 1:
                raise UserError(
                    f"kv_memory must hold a page beside {self.max_sequences} sequences, got {memory_bytes} bytes for pages: "
                    "give more (for example '2GB')"
                )
            pool = PagePool(
                one, dtype=self.model.dtype, slot_arrays=self._arrays[one], slots=self._slots, device=self.model.device,
                pages=pages, limit=pages, poison=self._poison,
            )  # fmt: skip
            pools[one] = pool, size
        return pools

    @property
    def pool_bytes(self) -> int:
        """Bytes of all pages."""
        return sum(pool.book.capacity * size for pool, size in self._pools.values())

    @property
    def free_bytes(self) -> int:
        """Bytes of the pages that nobody holds."""
        return sum(pool.book.exact_free() * size for pool, size in self._pools.values())

    def new(self, method: str) -> int | None:
        """An empty sequence; None where there is no place for one more."""
        self._sizes.clear()
        store = self.stores[method]
        return store.new_sequences(1)[0] if store.free_places else None

    def fork(self, method: str, handle: int) -> int | None:
        """A sequence that continues from the same tokens; pages are shared until one side writes."""
        self._sizes.clear()
        store = self.stores[method]
        return store.fork([handle])[0] if store.free_places else None

    def free(self, method: str, handle: int) -> None:
        """End a sequence; its pages are free at once."""
        self._sizes.clear()
        self.stores[method].free([handle])

    def seen(self, method: str, handle: int) -> int:
        """Tokens that a sequence has seen."""
        return self.stores[method].seen_tokens(handle)

    def kept(self, method: str, handle: int) -> list[int]:
        """Entries that each KV stream holds, owners ascending, then heads."""
        store = self.stores[method]
        places = [store.place_of[owner] for owner in store.layout.owners]
        return torch.cat([group.length[place, handle] for group, place in places]).tolist()

    def held_bytes(self, method: str, handle: int) -> int:
        """Bytes of the pages that the sequence holds, shared ones included."""
        return self._sizes_of(method)[handle][0]

    def owed_bytes(self, method: str, handle: int) -> int:
        """Bytes of shared pages that the sequence will have to copy when it goes on, as its method rewrites what it holds."""
        return self._sizes_of(method)[handle][1]

    def _sizes_of(self, method: str) -> dict[int, tuple[int, int]]:
        """Bytes held and owed by handle, of all sequences of a method at once; remembered until something changes."""
        if method not in self._sizes:
            store = self.stores[method]
            rows = store.alive
            held = torch.full((len(rows),), self.costs[method].state_bytes, dtype=torch.int64)
            owed = torch.zeros_like(held)
            for group in store.groups:
                page = self._page_bytes[id(group.pool)]
                held += group.pages_of(rows).cpu() * page
                if group.has_shared and group.method.lossy:
                    owed += self._shared_pages(group, rows).cpu() * page
            self._sizes[method] = dict(zip(rows, zip(held.tolist(), owed.tolist(), strict=True), strict=True))
        return self._sizes[method]

    @staticmethod
    def _shared_pages(group: CacheGroup, rows: Sequence[int]) -> Tensor:
        """Pages of each sequence that others hold too, int64."""
        ids = group.ids(torch.tensor(rows, device=group.length.device))
        line, _, page = group.page_ids(ids)
        row = line[group.pool.references[page.long()] > 1] // group.num_kv_heads % len(rows)
        return torch.bincount(row, minlength=len(rows))

    def freeable_bytes(self, handles: Sequence[tuple[str, int]]) -> int:
        """Bytes that ending all of these (method, handle) would free."""
        pages: dict[int, list[Tensor]] = {id(pool): [] for pool, _ in self._pools.values()}
        for method, store in self.stores.items():
            rows = [handle for name, handle in handles if name == method]
            for group in store.groups if rows else ():
                ids = group.ids(torch.tensor(rows, device=group.length.device))
                pages[id(group.pool)].append(group.page_ids(ids)[2].long())
        total = 0
        for pool, size in self._pools.values():
            if pages[id(pool)]:
                ids, count = torch.cat(pages[id(pool)]).unique(return_counts=True)
                total += size * int((pool.references[ids] == count).sum())
        return total

    def fits(self, calls: Sequence[tuple[str, int, int]]) -> bool:
        """Whether these calls (method, handle, tokens), all of them, surely fit into the free pages."""
        needed = dict.fromkeys(self._page_bytes, 0)
        for method, store in self.stores.items():
            mine = [(handle, tokens) for name, handle, tokens in calls if name == method]
            if mine:
                pages = store.pages_needed(*map(list, zip(*mine, strict=True)))
                for pool, number in zip(store.pools, pages, strict=True):
                    needed[id(pool)] += number
        return all(needed[id(pool)] <= pool.book.exact_free() for pool, _ in self._pools.values())

    def forward(
        self, method: str, handles: Sequence[int], tokens: Sequence[Sequence[int]], *, every: bool = False
    ) -> Tensor:
        """One call: the next tokens of some sequences. Logits [B, 1, V] of each one's last token; `every`: [B, T, V] of all,
        shorter ones at the right. Raises `CacheFull` where the pages don't last; `seen` says how far each has come.
        """
        self._sizes.clear()
        store, device = self.stores[method], self.model.device
        longest = max(map(len, tokens))
        ids_BT = torch.tensor([[0] * (longest - len(row)) + list(row) for row in tokens], device=device)
        length_B = torch.tensor([len(row) for row in tokens], device=device)
        mask_BT = torch.arange(longest, device=device) >= (longest - length_B)[:, None]
        with torch.inference_mode():
            return self.model(
                ids_BT, attention_mask=None if min(map(len, tokens)) == longest else mask_BT.long(),
                past_key_values=SequenceView(store, handles), logits_to_keep=0 if every else 1,
            ).logits  # fmt: skip
