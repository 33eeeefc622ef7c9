"""DMC, dynamic memory compression: a trained gate per KV head merges a token into the newest entry or opens one.

Each stream has a ring of the weighted keys and values of the newest tokens of its open entry and their weights, in fp32: an
entry is summed anew at each token, so nothing drifts. A token at position p writes at column p modulo the ring's length.
The decision and the place belong to the same token, so each owner places its own when its layer is reached.
Letters: O owners, B sequences, T tokens of the call, S stored, E = S + T entries, K kv heads, D head dim, W length of the ring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from kvfold.errors import UserError
from kvfold.methods.base import GateForm, Method, StateForm, parse_count
from kvfold.methods.plans import Chunk, ChunkPlan, Entered, StepPlan, Streams, TrainingForm, TrainingTokens

if TYPE_CHECKING:
    from torch import Tensor

    from kvfold.ops.gating import Gates


@dataclass(frozen=True, kw_only=True, slots=True)
class DMC(Method):
    """Merge tokens by a learned decision; a merged entry is the weighted mean of its newest `window` tokens.

    Source: arXiv 2403.09636, section 3.
    Differs: the window's entries are kept and summed anew in fp32; the official kernel subtracts from an fp16 sum. With `alone`,
    ours, the first tokens, which take much attention whatever they say, keep entries of their own.
    """

    name: ClassVar[str] = "dmc"
    title: ClassVar[str] = "DMC"
    source: ClassVar[str] = "Nawrot et al. 2024, arXiv 2403.09636"
    chunk_invariant: ClassVar[bool] = True
    lossy: ClassVar[bool] = True
    places_at_layer: ClassVar[bool] = True
    merges_tokens: ClassVar[bool] = True
    gate_form: ClassVar[GateForm] = GateForm(
        adapter=False, channel_of="key", frees="keys and queries", with_weights=True, zero_out=True, source="channel",
        scale=1.0, distils="none",
    )  # fmt: skip

    window: int | None = 12
    """Newest tokens of a segment that its entry averages; None = all of them, by one running sum."""
    alone: int = 0
    """First tokens of a text that nothing is merged into; 0 as published."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise UserError(f"dmc window {self.window}: it is at least 1 token: write e.g. 'dmc:12' or 'dmc:inf'")

    @classmethod
    def parse(cls, args: str) -> Self:
        """ "", `W` or `inf`, and `+S` behind it."""
        if not args:
            return cls()
        window, plus, alone = (part.strip() for part in args.partition("+"))
        return cls(
            window=None if window == "inf" else parse_count(cls.name, window, "dmc:12' or 'dmc:inf"),
            alone=parse_count(cls.name, alone, "dmc:12+1") if plus else 0,
        )

    def format(self) -> str:
        """`dmc:W`, or `dmc:W+S`."""
        window = "inf" if self.window is None else self.window
        return f"{self.name}:{window}" + (f"+{self.alone}" if self.alone else "")

    def stream_state(self, head_dim: int) -> StateForm:
        """Weighted k and v of the window's tokens and the weights; one running sum if it is unbounded."""
        return StateForm(shape=(self.window or 1, 2 * head_dim + 1), dtype="float32")

    @property
    def merge_window(self) -> int | None:
        """`window`."""
        return self.window

    def open_step(self, streams: Streams) -> StepPlan:
        """See `Method.open_step`."""
        return MergePlan(self, streams)

    def open_chunk(self, chunk: Chunk) -> ChunkPlan:
        """See `Method.open_chunk`."""
        return MergedChunk(self, chunk)

    def training_form(self, tokens: TrainingTokens) -> TrainingForm:
        """All partial means are keys; a key's bias is log(1 - alpha) of the token after it."""
        import torch

        from kvfold.ops.gating import first_real, from_next, pooled_real

        gates, real, (k, v) = tokens.gates, tokens.real_BT, (tokens.k_BTKD, tokens.v_BTKD)
        opens = first_real(real, k.shape[1], k.device, self.alone + 1)[..., None]
        alpha = gates.alpha_BTK.masked_fill(opens, 0.0)
        means = pooled_real(torch.cat((k, v), dim=-1), gates.weight_BTK, alpha, self.window, real)
        k, v = means.split((k.shape[-1], v.shape[-1]), dim=-1)
        bias = from_next(gates.log_stay_BTK.masked_fill(opens, 0.0), real, 0.0)
        return TrainingForm(k_BTKD=k, v_BTKD=v, bias_BTK=bias)


class MergePlan(StepPlan):
    """The token is merged into its stream's last entry, or goes behind it, as its gate decides."""

    method: DMC

    def enter(self, owner: int, gates: Gates | None, k_BKD: Tensor, v_BKD: Tensor) -> Entered:
        """The entry with the new token in it."""
        import torch

        window, streams = self.method.window, self.streams
        ids, length = streams.id_OBK[owner], streams.length_OBK[owner]
        merges = torch.zeros_like(ids, dtype=torch.bool)
        weight = k_BKD.new_ones(ids.shape, dtype=torch.float32)
        if gates is not None and gates.alpha_BTK is not None:
            merges = (gates.alpha_BTK[:, 0] > 0.5) & (streams.position_B > self.method.alone)[:, None]
            weight = gates.weight_BTK[:, 0]
        weight = weight.unsqueeze(-1)
        new = torch.cat((torch.cat((k_BKD, v_BKD), dim=-1).float() * weight, weight), dim=-1)
        held = torch.where(merges[..., None, None], streams.state_X[ids], 0.0)
        if window is None:
            held[:, :, 0] += new
        else:
            column = (streams.position_B % window)[:, None, None, None].expand(*new.shape[:2], 1, new.shape[-1])
            held.scatter_(2, column, new.unsqueeze(2))
        streams.state_X[ids] = held
        total = held.sum(dim=2)
        k, v = (total[..., :-1] / total[..., -1:]).to(k_BKD.dtype).split((k_BKD.shape[-1], v_BKD.shape[-1]), dim=-1)
        return Entered(k_BKD=k, v_BKD=v, place_BK=torch.where(merges, length - 1, length))


class MergedChunk(ChunkPlan):
    """All partial means lie side by side, each seen by its own query; later queries see those that were closed."""

    method: DMC

    def __init__(self, method: DMC, chunk: Chunk):
        import torch

        from kvfold.ops.gating import pooled_real

        super().__init__(method, chunk)
        k, gates, real = chunk.k_BTKD, chunk.gates, chunk.real_BT
        weight = k.new_ones(k.shape[:3], dtype=torch.float32)
        alpha = torch.zeros_like(weight)
        if gates is not None and gates.alpha_BTK is not None:
            opens = chunk.position_BT <= method.alone
            alpha, weight = gates.alpha_BTK.masked_fill(opens[..., None], 0.0), gates.weight_BTK
        self._merges_BKT = ((alpha > 0.5) & real[..., None]).transpose(1, 2)
        tokens = torch.cat((k, chunk.v_BTKD), dim=-1)
        self._merged, self._past = (tokens, weight, alpha), self._open_entry()
        means = pooled_real(*self._merged, method.window, real if chunk.padded else None, self._past)
        self.k_BTKD, self.v_BTKD = means.split((k.shape[-1], chunk.v_BTKD.shape[-1]), dim=-1)

    def _open_entry(self) -> tuple[Tensor, Tensor] | None:
        """The open entry's weighted tokens, oldest first: sums [B, W, K, 2D] and weights [B, W, K]."""
        if not self.chunk.stored:
            return None
        ring = self.chunk.state_X[self.chunk.id_BK]
        column = _columns(self.chunk.before_B, ring.shape[2])
        ring = ring.gather(2, column.expand(ring.shape)).transpose(1, 2)
        return ring[..., :-1], ring[..., -1]

    def _closed(self) -> Tensor:
        """bool [B, K, T]: entries that no later token of the call is merged into."""
        from kvfold.ops.gating import from_next

        after = from_next(self._merges_BKT.transpose(1, 2).float(), self.chunk.real_BT, 0.0)
        return (after < 0.5).transpose(1, 2) & self.chunk.real_BT[:, None]

    def _goes_on(self) -> Tensor:
        """bool [B, K, S]: the last stored entry of a stream that the call's first real token is merged into."""
        import torch

        chunk = self.chunk
        continued = (self._merges_BKT & chunk.first_BT[:, None]).any(dim=2)
        slot = torch.arange(chunk.stored, device=continued.device)
        return (slot == chunk.length_BK.unsqueeze(-1) - 1) & continued.unsqueeze(-1)

    def last_query(self) -> Tensor:
        """A partial mean is seen by its own query; one that is closed, and a stored one that does not go on, by all later."""
        import torch

        from kvfold.ops.attention import FOREVER

        own = self.chunk.position_BKE[..., self.chunk.stored :].long()
        last = torch.where(self._closed(), FOREVER, own)
        if self.chunk.stored:
            last = torch.cat((torch.where(self._goes_on(), -1, FOREVER), last), dim=-1)
        return last

    def sees(self) -> Tensor:
        """See `ChunkPlan.sees`."""
        import torch

        tokens = self.chunk.real_BT.shape[1]
        own = torch.eye(tokens, dtype=torch.bool, device=self.chunk.real_BT.device)
        seen = own | self._closed().unsqueeze(2)
        if self.chunk.stored:
            old = (~self._goes_on()).unsqueeze(2).expand(-1, -1, tokens, -1)
            seen = torch.cat((old, seen), dim=-1)
        return seen

    def retained(self, score_BKE: Tensor | None) -> Tensor:
        """Of each entry its last mean is stored; the open one's takes the place of the stored."""
        import torch

        closed = self._closed()
        return torch.cat((~self._goes_on(), closed), dim=-1) if self.chunk.stored else closed

    def close(self, stored_positions: Callable[[], Tensor]) -> None:
        """The weighted tokens of the entry that is open now go into the ring."""
        import torch

        from kvfold.ops.gating import open_entries, real_first, reordered

        chunk = self.chunk
        order, _ = real_first(chunk.real_BT)
        tokens, weight, alpha = (reordered(one, order) for one in self._merged)
        length = chunk.real_BT.sum(dim=1)
        sums, weights = open_entries(tokens, weight, alpha, self.method.window, self._past, length)
        held = torch.cat((sums, weights.unsqueeze(-1)), dim=-1).transpose(1, 2)
        column = _columns(chunk.seen_B, held.shape[2]).expand(held.shape)
        chunk.state_X[chunk.id_BK] = torch.zeros_like(held).scatter(2, column, held)


def _columns(seen_B: Tensor, width: int) -> Tensor:
    """Columns of the ring from its oldest token on, once so many have been seen: int64 [B, 1, W, 1]."""
    import torch

    return ((seen_B[:, None] + torch.arange(width, device=seen_B.device)) % width)[:, None, :, None]
