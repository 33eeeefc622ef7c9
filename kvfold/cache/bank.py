"""The lanes of owners that are alike: which pages each holds, how many entries, and the moves between them.

A lane is one (owner, row, kv head). Owners with the same spec, heads and page class form a bank, so that a decoding
step books all of them at once. What to drop is the policy's word; here it is carried out.
Letters: O owners of the bank, R row slots, B rows of a call, K kv heads, M pages of a lane at most, N slots a page,
S stored entries, T tokens, X lanes in any shape, D head dim.
"""

import torch
from torch import Tensor

from kvfold.cache.lane_state import LaneRing
from kvfold.cache.pages import pages_for
from kvfold.cache.pool import PagePool
from kvfold.ops.paged import lane_slots
from kvfold.policies.base import Policy
from kvfold.policies.registry import policy_of
from kvfold.specs.base import TimeSpec


class Bank:
    """Tables and lengths of O x R x K lanes over one pool."""

    @torch.inference_mode(False)
    def __init__(
        self, *, owners: tuple[int, ...], spec: TimeSpec, window: int | None, num_kv_heads: int, pool: PagePool
    ):
        """`window`: the architecture's sliding window where the spec does not imply it; queries see no further back."""
        self.owners, self.spec, self.window, self.pool = owners, spec, window, pool
        self.policy: Policy = policy_of(spec)
        self.num_kv_heads = num_kv_heads
        self.table = torch.zeros((len(owners), 0, num_kv_heads, 0), dtype=torch.int32, device=pool.device)
        self.length = torch.zeros((len(owners), 0, num_kv_heads), dtype=torch.int32, device=pool.device)
        self.has_shared = False
        head_dim = pool.page_class.head_dim
        gated = self.policy.gate is not None
        self.state = LaneRing(len(owners), num_kv_heads, self.policy, head_dim, pool.device) if gated else None

    @property
    def num_bytes(self) -> int:
        """Bytes of tables, lengths and the state of lanes."""
        return self.table.nbytes + self.length.nbytes + (self.state.ring.nbytes if self.state else 0)

    def resized_bytes(self, rows: int, pages: int) -> int:
        """`num_bytes` once there is room for so many rows and pages a lane."""
        rows, pages = max(rows, self.table.shape[1]), max(pages, self.table.shape[3])
        state = self.state.bytes_for(rows) if self.state else 0
        return len(self.owners) * rows * self.num_kv_heads * 4 * (pages + 1) + state

    @torch.inference_mode(False)
    def resize(self, rows: int, pages: int) -> None:
        """Room for at least so many rows and pages a lane."""
        owners, old_rows, heads, old_pages = self.table.shape
        rows, pages = max(rows, old_rows), max(pages, old_pages)
        if (rows, pages) == (old_rows, old_pages):
            return
        table, length = self.table, self.length
        self.table = table.new_zeros((owners, rows, heads, pages))
        self.table[:, :old_rows, :, :old_pages] = table
        if rows != old_rows:
            self.length = length.new_zeros((owners, rows, heads))
            self.length[:, :old_rows] = length
            if self.state:
                self.state.resize(rows)

    @torch.inference_mode(False)
    def shrink(self) -> None:
        """Narrow a table that is more than twice as wide as the longest lane needs."""
        longest = int(self._pages(self.length.max())) if self.length.numel() else 0
        if longest < self.table.shape[-1] // 2:
            self.table = self.table[..., :longest].clone()

    def lanes(self, rows_B: Tensor) -> Tensor:
        """Lane ids [O, B, K] of some rows."""
        owners, rows, heads = self.length.shape
        owner = torch.arange(owners, device=rows_B.device)[:, None, None]
        return (owner * rows + rows_B[:, None]) * heads + torch.arange(heads, device=rows_B.device)

    def held_pages(self, lanes: Tensor) -> int:
        """Pages that these lanes hold, a shared page once for each lane."""
        return int(self._pages(self.length.view(-1)[lanes]).sum())

    def _pages(self, length: Tensor) -> Tensor:
        return (length.long() + self.pool.slots - 1) // self.pool.slots

    def page_ids(self, lanes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every page that these lanes hold: lane, index within the lane, page id; flat."""
        flat = lanes.reshape(-1)
        count = self._pages(self.length.view(-1)[flat])
        index = torch.arange(self.table.shape[-1], device=flat.device)
        lane, index = (index < count[:, None]).nonzero(as_tuple=True)
        lane = flat[lane]
        return lane, index, self.table_flat()[lane, index]

    def table_flat(self) -> Tensor:
        """The table with one line a lane, [O * R * K, M]."""
        owners, rows, heads, pages = self.table.shape
        return self.table.view(owners * rows * heads, pages)

    def stored_slots(self, lanes: Tensor, stored: int) -> tuple[Tensor, Tensor]:
        """Flat slots [..., S] of these lanes' entries, and which are filled; S = `stored`, no less than any length."""
        return lane_slots(self.table_flat()[lanes], self.length.view(-1)[lanes], stored, self.pool.slots)

    # -- moving entries ------------------------------------------------------------------------------------------

    def extend(self, lanes_X: Tensor, first_X: Tensor, count_X: Tensor) -> None:
        """Give lane X `count` new pages from index `first` on."""
        lanes, first, count = (x.reshape(-1) for x in (lanes_X, first_X, count_X))
        total = int(count.sum())
        if total == 0:
            return
        ids = self.pool.take(total)
        step = torch.arange(total, device=ids.device) - (count.cumsum(0) - count).repeat_interleave(count)
        self.table_flat()[lanes.repeat_interleave(count), first.repeat_interleave(count) + step] = ids

    def append(self, lanes_BK: Tensor, chosen_BKT: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, position_BT: Tensor,
               score_BKT: Tensor | None) -> None:  # fmt: skip
        """Store the chosen tokens of a call behind what the lanes of one owner hold, in the order of the call."""
        slots, length = self.pool.slots, self.length.view(-1)[lanes_BK].long()
        added = chosen_BKT.sum(dim=-1)
        first = (length + slots - 1) // slots
        self.privatise(lanes_BK[added > 0], open_only=True)
        self.extend(lanes_BK, first, (length + added + slots - 1) // slots - first)
        # At once, so that pages just taken are given back with the row should the call die below.
        self.length.view(-1)[lanes_BK] = (length + added).int()
        index = length.unsqueeze(-1) + chosen_BKT.cumsum(dim=-1) - 1
        lane_BKT, head_dim = lanes_BK.unsqueeze(-1).expand_as(chosen_BKT), k_BTKD.shape[-1]
        chosen = slice(None) if bool(chosen_BKT.all()) else chosen_BKT.reshape(-1)
        index, lane = index.reshape(-1)[chosen], lane_BKT.reshape(-1)[chosen]
        target = self.table_flat()[lane, index // slots].long() * slots + index % slots
        for pool, new_BTKD in ((self.pool.k, k_BTKD), (self.pool.v, v_BTKD)):
            new = new_BTKD.transpose(1, 2).reshape(-1, head_dim)[chosen]
            pool.view(-1, head_dim).index_copy_(0, target, new.to(pool.dtype))
        position = position_BT[:, None].expand_as(chosen_BKT).reshape(-1)[chosen]
        self.pool.position.view(-1).index_copy_(0, target, position.int())
        if self.pool.score is not None:
            score = (
                torch.zeros_like(target, dtype=torch.float32) if score_BKT is None else score_BKT.reshape(-1)[chosen]
            )
            self.pool.score.view(-1).index_copy_(0, target, score)

    def drop(self, lanes_X: Tensor, stay_XS: Tensor) -> None:
        """Keep only the entries marked to stay, closed up in their order; pages left empty are free at once."""
        lanes, stay = lanes_X.reshape(-1), stay_XS.reshape(-1, stay_XS.shape[-1])
        self.privatise(lanes)
        flat_XS, filled_XS = self.stored_slots(lanes, stay.shape[-1])
        kept = stay & filled_XS
        left = kept.sum(dim=-1)
        lane, slot = kept.nonzero(as_tuple=True)
        rank = torch.arange(lane.numel(), device=lane.device) - (left.cumsum(0) - left)[lane]
        source, target = flat_XS[lane, slot], flat_XS[lane, rank]
        for array in (self.pool.k, self.pool.v, self.pool.position, self.pool.score):
            if array is not None:
                whole = array.view(-1, *array.shape[2:])
                whole[target] = whole[source]
        held_lane, index, page = self.page_ids(lanes)
        self.length.view(-1)[lanes] = left.int()
        needed = self._pages(self.length.view(-1)[held_lane])
        self.pool.give_back(page[index >= needed])

    # -- rows ----------------------------------------------------------------------------------------------------

    def fork(self, source_B: Tensor, target_B: Tensor) -> None:
        """Rows `target` become copies of rows `source`; pages are shared until one side writes."""
        self.table[:, target_B], self.length[:, target_B] = self.table[:, source_B], self.length[:, source_B]
        self.pool.share(self.page_ids(self.lanes(target_B))[2])
        if self.state:
            self.state.fork(source_B, target_B)
        self.has_shared = True

    def free(self, rows_B: Tensor) -> None:
        """Give back all that these rows hold."""
        self.pool.give_back(self.page_ids(self.lanes(rows_B))[2])
        self.length[:, rows_B] = 0
        if self.state:
            self.state.clear(rows_B)
        if self.has_shared and not bool((self.pool.references > 1).any()):
            self.has_shared = False

    def privatise(self, lanes: Tensor, *, open_only: bool = False) -> None:
        """Copy the pages of these lanes that others hold too, before they are written; `open_only`: only a last page that
        has room.
        """
        if not self.has_shared or lanes.numel() == 0:
            return
        lane, index, page = self.page_ids(lanes)
        mine = self._must_copy(
            page, self._is_open(lane, index) if open_only else torch.ones_like(page, dtype=torch.bool)
        )
        copies = self.pool.take(int(mine.sum()))
        self.pool.copy_pages(page[mine], copies)
        self.table_flat()[lane[mine], index[mine]] = copies
        self.pool.give_back(page[mine])

    def copies_ahead(self, lanes: Tensor) -> int:
        """Pages that `privatise` may take for a call on these lanes, at most."""
        if not self.has_shared:
            return 0
        lane, index, page = self.page_ids(lanes)
        written = torch.ones_like(page, dtype=torch.bool) if self.spec.lossy else self._is_open(lane, index)
        return int(self._must_copy(page, written).sum())

    def _must_copy(self, page: Tensor, written: Tensor) -> Tensor:
        """Of the pages about to be written, those to copy first: the shared ones, but where all holders of a page write
        now, one of them keeps it.
        """
        copied = written & (self.pool.references[page.long()] > 1)
        where = copied.nonzero()[:, 0]
        ids, holder, here = page[where].long().unique(return_inverse=True, return_counts=True)
        order = torch.arange(where.numel(), device=page.device)
        first = order.new_zeros(ids.numel()).scatter_reduce(0, holder, order, "amin", include_self=False)
        copied[where[first[here == self.pool.references[ids]]]] = False
        return copied

    def _is_open(self, lane: Tensor, index: Tensor) -> Tensor:
        """Whether page `index` of a lane is the one that the next entry goes into."""
        return index == self.length.view(-1)[lane].long() // self.pool.slots

    def drop_last(self, lanes_X: Tensor, number_X: Tensor) -> None:
        """Drop the last 0 or 1 entries of lane X."""
        lanes, number, slots = lanes_X.reshape(-1), number_X.reshape(-1).long(), self.pool.slots
        length = self.length.view(-1)[lanes].long() - number
        emptied = (number > 0) & (length % slots == 0)
        page = self.table_flat()[lanes[emptied], length[emptied] // slots]
        self.length.view(-1)[lanes] = length.int()
        self.pool.give_back(page)

    # -- what a call may need ------------------------------------------------------------------------------------

    def most_kept(self, rows_B: Tensor, seen: list[int]) -> int:
        """Entries of the longest lane of these rows, at most, where they have seen so many tokens."""
        if self.state:
            return int(self.length[:, rows_B].max())
        return max((self.spec.max_kept(tokens) for tokens in set(seen)), default=0)

    def pages_after(self, rows_B: Tensor, seen: list[int], added: list[int]) -> tuple[int, int]:
        """Pages that these rows hold at most, and the longest lane of them, once rows that have now seen `seen` tokens were
        given `added` of them. What gates will decide is not known before, so every token may stay.
        """
        if self.state:
            more = torch.tensor(added, dtype=torch.int64, device=rows_B.device)
            pages = self._pages(self.length[:, rows_B].long() + more[:, None])
            return int(pages.sum()), int(pages.max())
        each = [pages_for(self.spec.max_kept(tokens), self.pool.slots) for tokens in seen]
        return len(self.owners) * self.num_kv_heads * sum(each), max(each, default=0)
