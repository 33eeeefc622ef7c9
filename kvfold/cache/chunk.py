"""The view of a call that brings several real tokens to some of its sequences.

Such a call is cut into segments: the sequences that decode (exactly one real token), attended over pages in place (decode.py),
and those with a chunk of text. Of a chunk's every owner, stored entries and the call's own tokens are attended to side by side;
then the method says what stays, and only that is written: what a long prompt loses at once never takes a page.
Letters: B sequences, T columns of the call, S stored, E = S + T entries, H query heads, K kv heads, D head dim.
"""

from typing import Any

import torch
from torch import Tensor

from kvfold.cache.decode import DecodeSegment
from kvfold.cache.group import CacheGroup
from kvfold.cache.store import Batch, Store
from kvfold.methods.plans import Chunk, Crossed, Held
from kvfold.ops.attention import FOREVER, attention_with_weights, dense_attention, lifespan_attention
from kvfold.ops.gating import Gates, picked
from kvfold.ops.rotation import Rotation, rotate, rotate_queries


class ChunkSegment:
    """Sequences that bring several tokens each."""

    def __init__(self, store: Store, batch: Batch):
        self._layout, self._place_of, self._batch = store.layout, store.place_of, batch
        self.sequence_B, self.before_B, self.before = batch.index_B, batch.position_B, batch.before
        self.padded = batch.real_BT is not None
        self.real_BT = batch.real_BT
        if self.real_BT is None:
            self.real_BT = torch.ones((len(batch.sequences), batch.columns), dtype=torch.bool, device=store.device)
        order = self.real_BT.long().cumsum(dim=1)
        self.seen_B = self.before_B + order[:, -1]
        self.position_BT = (self.before_B[:, None] + order - 1).masked_fill(~self.real_BT, -1)
        self._groups: dict[int, _OwnerChunk] = {}

    def attend(
        self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor | None, v_BTKD: Tensor | None, rotation: Rotation | None,
        gates: Gates | None = None,
    ) -> Tensor:  # fmt: skip
        """See `KVView`."""
        owner = self._layout.owner_of(layer)
        group, index = self._place_of[owner]
        if owner == layer:
            stored = max(map(group.most_stored, self._batch.sequences, self._batch.before))
            self._groups[owner] = _OwnerChunk(group, index, self, stored, k_BTKD, v_BTKD, rotation, gates)
        one = self._groups[owner]
        q = rotate_queries(rotation, q_BTHD, None if gates is None else gates.q_keep_HD)
        out = one.attended(q, scale=self._batch.scale, softcap=self._batch.softcap)
        if layer == self._layout.last_reader(owner):
            self._groups.pop(owner).store()
        return out

    def close(self) -> None:
        """Every owner's chunk was stored when its last reader had attended."""

    def abandon(self) -> None:
        """Nothing is allocated ahead."""


class _OwnerChunk:
    """What one owner and its readers attend to, and what of it is stored."""

    def __init__(
        self, group: CacheGroup, index: int, call: ChunkSegment, stored: int, k_BTKD: Tensor, v_BTKD: Tensor,
        rotation: Rotation | None, gates: Gates | None,
    ):  # fmt: skip
        self._group, self._call, self._stored = group, call, stored
        self._id_BK = group.ids(call.sequence_B)[index]
        batch, tokens, heads, _ = k_BTKD.shape
        position = call.position_BT[:, None].expand(batch, heads, tokens).int()
        if stored:
            self._slot_BKS, self._filled_BKS = group.stored_slots(self._id_BK, stored)
            old = group.pool.position.view(-1)[self._slot_BKS].masked_fill(~self._filled_BKS, -1)
            position = torch.cat((old, position), dim=-1)
        self._position_BKE = position
        self._plan = group.method.open_chunk(
            Chunk(
                k_BTKD=k_BTKD, v_BTKD=v_BTKD, gates=gates, real_BT=call.real_BT, padded=call.padded,
                position_BT=call.position_BT, before_B=call.before_B, seen_B=call.seen_B, position_BKE=position,
                stored=stored, length_BK=group.lengths(self._id_BK).long(), id_BK=self._id_BK,
                state_X=group.flat_state,
            )
        )  # fmt: skip
        self._k_BTKD = rotate(rotation, self._plan.k_BTKD, None if gates is None else gates.k_keep_KD)
        self._k_BEKD, self._v_BEKD = self._beside_stored()
        self._first_BKE = position
        self._crossed: Crossed | None = None
        self._score_BKE: Tensor | None = None
        if group.method.grid is not None:
            self._cross(gates)
            return
        self._last_BKE = self._last_query()
        self._mask = self._seen() if self._last_BKE is None else None
        self._bias_BKE = self._slot_bias()

    def _cross(self, gates: Gates | None) -> None:
        """The borders of the method's grid that the call brings: what is attended to instead of the entries."""
        group, call, tokens, pool = self._group, self._call, self._k_BTKD.shape[1], self._group.pool
        noted, arrays = group.method.noted(gates, call.real_BT if call.padded else None), {}
        for name, dtype in group.method.slot_arrays.items():
            # In the dtype of the store, so that a chunk knows no more than the store will.
            empty = self._position_BKE.new_zeros((*self._id_BK.shape, tokens), dtype=getattr(torch, dtype))
            arrays[name] = noted[name].transpose(1, 2).to(empty.dtype) if name in noted else empty
        if self._stored:
            old = group.slot_values(self._slot_BKS, self._filled_BKS)
            self._before = self._noted_before(gates)
            newest = self._position_BKE[..., : self._stored] == (call.before_B - 1)[:, None, None]
            for name, one in self._before.items():
                old[name] = torch.where(newest, one.transpose(1, 2).to(old[name].dtype), old[name])
            arrays = {name: torch.cat((old[name], one), dim=-1) for name, one in arrays.items()}
        k, v = (pool.as_stored(x, name) for name, x in (("k", self._k_BEKD), ("v", self._v_BEKD)))
        self._crossed = group.method.cross(
            Held(
                k_BEKD=k, v_BEKD=v, position_BKE=self._position_BKE, arrays=arrays, before_B=call.before_B,
                seen_B=call.seen_B, as_stored=lambda x: pool.as_stored(x, "v"),
            ),
            gates,
        )  # fmt: skip
        lives = self._crossed.lives
        self._k_BEKD, self._v_BEKD, self._bias_BKE = lives.k_BEKD, lives.v_BEKD, lives.bias_BKE
        self._first_BKE, self._last_BKE, self._mask = lives.first_BKE, lives.last_BKE, None

    def _noted_before(self, gates: Gates | None) -> dict[str, Tensor]:
        """What each sequence's first token of the call says of the newest one stored, [B, 1, K] each."""
        call = self._call
        first_B = (call.real_BT & (call.position_BT == call.before_B[:, None])).to(torch.uint8).argmax(dim=1)
        row = torch.arange(len(first_B), device=first_B.device)
        return {name: one[row, first_B].unsqueeze(1) for name, one in self._group.method.noted_before(gates).items()}

    def _beside_stored(self) -> tuple[Tensor, Tensor]:
        """Stored keys and values first, then the call's."""
        k, v, pool = self._k_BTKD, self._plan.v_BTKD, self._group.pool
        if not self._stored:
            return k, v
        empty = None if bool(self._filled_BKS.all()) else ~self._filled_BKS.unsqueeze(-1)
        both = []
        for name, new in (("k", k), ("v", v)):
            old = pool.read(name, self._slot_BKS).to(new.dtype)
            old = old if empty is None else old.masked_fill(empty, 0)
            both.append(torch.cat((old.transpose(1, 2), new), dim=1))
        return both[0], both[1]

    def _slot_bias(self) -> Tensor | None:
        """What the method adds to the logits of stored entries, fp32 [B, K, E]; 0 for the call's own tokens."""
        array = self._group.pool.arrays.get(self._group.method.bias_array)
        if array is None or not self._stored:
            return None
        bias = array.view(-1)[self._slot_BKS].float().masked_fill(~self._filled_BKS, 0)
        return torch.nn.functional.pad(bias, (0, self._k_BTKD.shape[1]))

    def _last_query(self) -> Tensor | None:
        """Position of the last query that sees each entry, int64 [B, K, E]; None where that is no short cut."""
        group = self._group
        if group.method.attention_scores is not None or not (group.method.lossy or group.window is not None):
            return None
        if group.method.lossy:
            last = self._plan.last_query()
            if last is None:
                return None
        else:
            last = torch.full_like(self._position_BKE, FOREVER, dtype=torch.int64)
        return last if group.window is None else last.minimum(self._position_BKE.long() + group.window - 1)

    def _seen(self) -> Tensor | None:
        """Which entries each query sees, bool [B or 1, K or 1, T, E]; None = all up to its own."""
        group, call, stored = self._group, self._call, self._stored
        tokens, device = call.real_BT.shape[1], call.real_BT.device
        even = len(set(call.before)) <= 1
        plain = not group.method.lossy or group.method.attention_scores is not None
        if not call.padded and plain and group.window is None and even and (stored == 0 or not group.method.lossy):
            return None
        position = self._position_BKE if stored else self._position_BKE[:, :1]
        position, query = position.unsqueeze(2), call.position_BT[:, None, :, None]
        seen = (position >= 0) & (position <= query)
        if group.window is not None:
            seen &= position > query - group.window
        chosen = self._plan.sees()
        seen = seen if chosen is None else seen & chosen
        if call.padded:
            # Padding sees itself, so that no softmax is empty.
            own = torch.eye(tokens, dtype=torch.bool, device=device)
            seen[..., stored:] |= own & ~call.real_BT[:, None, :, None]
        return seen

    def attended(self, q_BTHD: Tensor, *, scale: float, softcap: float | None) -> Tensor:
        """Attention output [B, T, H, D]; scores are summed over the group's layers."""
        call, scores = self._call, self._group.method.attention_scores
        if self._last_BKE is not None:
            return lifespan_attention(
                q_BTHD, self._k_BEKD, self._v_BEKD, query_BT=call.position_BT, position_BKE=self._first_BKE,
                last_BKE=self._last_BKE, scale=scale, softcap=softcap, bias_BKE=self._bias_BKE,
            )  # fmt: skip
        common = {"scale": scale, "softcap": softcap, "mask": self._mask, "bias_BKE": self._bias_BKE}
        if scores is None:
            return dense_attention(q_BTHD, self._k_BEKD, self._v_BEKD, **common)
        newest_BT = call.real_BT & (call.position_BT == call.seen_B[:, None] - 1)
        weigh = call.real_BT if scores == "cumulative" else newest_BT
        out, received = attention_with_weights(q_BTHD, self._k_BEKD, self._v_BEKD, weigh_BT=weigh, **common)
        self._score_BKE = received if self._score_BKE is None else self._score_BKE + received
        return out

    def store(self) -> None:
        """All readers have attended: evict what must leave, and store what stays."""
        if self._crossed is not None:
            self._store_crossed(self._crossed)
            return
        group, call, stored, score = self._group, self._call, self._stored, self._score_BKE
        if group.method.attention_scores == "cumulative" and stored:
            group.copy_on_write(self._id_BK)
            self._slot_BKS = group.stored_slots(self._id_BK, stored)[0]
            kept = group.pool.arrays["score"].view(-1)
            old = score[..., :stored].masked_fill(~self._filled_BKS, 0)
            kept.index_add_(0, self._slot_BKS.reshape(-1), old.reshape(-1))
            score = torch.cat((kept[self._slot_BKS], score[..., stored:]), dim=-1)
        keep = self._plan.retained(score)
        if keep is None:
            keep = torch.ones((), dtype=torch.bool, device=self._id_BK.device).expand(self._position_BKE.shape)
        if stored:
            gone = self._filled_BKS & ~keep[..., :stored]
            if bool(gone.any()):
                group.evict(self._id_BK, ~gone)
        chosen = keep[..., stored:] & call.real_BT[:, None]
        state = {} if score is None else {"score": score[..., stored:]}
        group.append(self._id_BK, chosen, self._k_BTKD, self._plan.v_BTKD, call.position_BT, state)
        longest = int(group.lengths(self._id_BK).max())
        self._plan.close(lambda: group.stored_positions(self._id_BK, longest))

    def _store_crossed(self, crossed: Crossed) -> None:
        """What is there after the last border."""
        group, call, stored = self._group, self._call, self._stored
        if stored:
            if self._before:
                group.copy_on_write(self._id_BK)
                group.note_before(self._id_BK, group.lengths(self._id_BK).long(), self._before)
            group.merge(self._id_BK, stored, crossed)
        chosen = crossed.stays_BKE[..., stored:] & call.real_BT[:, None]
        state = {name: one[..., stored:] for name, one in crossed.arrays.items()}
        group.append(self._id_BK, chosen, self._k_BTKD, crossed.v_BEKD[:, stored:], call.position_BT, state)


def view_of(store: Store, batch: Batch) -> "DecodeSegment | ChunkSegment | SegmentedView":
    """The view that a call's layers attend through."""
    return ChunkSegment(store, batch) if min(batch.added) > 1 else SegmentedView(store, batch)


class SegmentedView:
    """A call whose sequences are at different work; see `KVView`. The real tokens of those that decode may stand in different
    columns: they are picked out, and their outputs put back.
    """

    def __init__(self, store: Store, batch: Batch):
        steps = [row for row, added in enumerate(batch.added) if added == 1]
        chunks = [row for row, added in enumerate(batch.added) if added > 1]
        self._segments: list[tuple[Tensor, Tensor | None, DecodeSegment | ChunkSegment]] = []
        for rows, kind in ((steps, DecodeSegment), (chunks, ChunkSegment)):
            if rows:
                part, row = batch.segment(store, rows), torch.tensor(rows, device=store.device)
                column = None if part.real_BT is None else part.real_BT.to(torch.uint8).argmax(dim=1)
                self._segments.append((row, column if kind is DecodeSegment else None, kind(store, part)))

    def attend(
        self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor | None, v_BTKD: Tensor | None, rotation: Rotation | None,
        gates: Gates | None = None,
    ) -> Tensor:  # fmt: skip
        """See `KVView`. Rows without a real token get zeros."""
        out = torch.zeros_like(q_BTHD)
        for row, column, segment in self._segments:
            q, k, v = (x if x is None else picked(x, row, column) for x in (q_BTHD, k_BTKD, v_BTKD))
            own: list[Any] = [one if one is None else one.at(row, column) for one in (rotation, gates)]
            attended = segment.attend(layer, q, k, v, *own)
            out[(row,) if column is None else (row, column)] = attended if column is None else attended[:, 0]
        return out

    def close(self) -> None:
        """All layers have attended: what the call evicts leaves now."""
        for *_, segment in self._segments:
            segment.close()

    def abandon(self) -> None:
        """The call has failed: pages that it allocated and did not use are free again."""
        for *_, segment in self._segments:
            segment.abandon()
