"""fold over entries that lie side by side: at each border of a grid marked entries leave, and each is merged into the most
similar entry that stays, or dropped. The fast form, for many streams at once; `fold_reference.py` judges it.

A merge changes the value and the bias of an entry and not its key. So that a long call can be attended to in one go, every
change is a new *version*: an entry of its own with the same key, which queries see from its border on, while those before see
the version that it replaced. All of it is differentiable but who merges into whom.
Letters: B sequences, K kv heads, E entries, V versions, N that leave at one border, M that may take them, C that changed,
D head dim, P numbers of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.ops.attention import FOREVER, chosen_entries

LARGEST_LOG_WEIGHT = 10.0
"""A token that is expected to matter exp(10) times as much as its entry counts as if it mattered that much."""
UNCHANGED_HEAD = (0.0, 0.0, 1.0)
"""b, c and the factor of the mass, before anything was learned."""
LEAST_FACTOR = 0.125
"""A mass is read back from the bias that it gave, so the factor between them can't be 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldEntries:
    """The entries of some streams in the order of their positions."""

    k_BKED: Tensor
    """Rotated, as they are stored."""
    v_BKED: Tensor
    position_BKE: Tensor
    """int64; -1 where there is no entry."""
    marked_BKE: Tensor
    """bool: leaves at the first border at which its delay is over."""
    s_BKE: Tensor
    """fp32: log of the attention that the token is expected to receive after its delay."""
    bias_BKE: Tensor
    """fp32: added to the entry's logits; 0 where nothing was merged into it."""


def fold_entries(
    entries: FoldEntries, *, before_B: Tensor, seen_B: Tensor, delay: int, grid: int, threshold: float | None, reach: int,
    heads_KP: Tensor | None, as_stored: Callable[[Tensor], Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """Cross the borders that queries `before_B` to `seen_B` - 1 of each sequence bring: those at multiples of `grid`.

    Before query t = grid * m attends, marked entries at positions below t - delay leave. `threshold`: the least similarity at
    which one is merged, None = all are dropped. `reach`: merged into an entry at most so many positions older. `heads_KP`: b,
    c and the factor of the mass of each head, fp32; None = nothing is merged. `as_stored`: rounds values [..., D] as the
    store does.
    Gives what the E entries, and the V versions that lived meanwhile, are to the queries of the call, by the fields of
    `methods.plans.Lives`; and by those of `Crossed` what the E entries are after the last border, with their `bias_BKE`.
    """
    first_B = ((before_B + grid - 1) // grid).clamp(min=1) * grid
    steps = (seen_B - 1 - first_B) // grid + 1
    # Autocast would round similarities, and its small products in bfloat16 are slower than these.
    with torch.autocast(entries.k_BKED.device.type, enabled=False):
        run = _Run(entries, heads_KP, as_stored)
        for step in range(max(0, int(steps.max()))):
            border_B = first_B + step * grid
            border_B11 = border_B.masked_fill(border_B >= seen_B, 0)[:, None, None]
            run.cross(border_B11, border_B11 - delay, threshold if heads_KP is not None else None, reach)
        return run.result()


class _Run:
    """The entries as they stand between two borders."""

    def __init__(
        self, entries: FoldEntries, heads_KP: Tensor | None, as_stored: Callable[[Tensor], Tensor] | None
    ) -> None:
        self._entries, self._as_stored = entries, as_stored
        numbers = entries.s_BKE.new_tensor(UNCHANGED_HEAD) if heads_KP is None else heads_KP
        self._b, self._c, self._factor = (
            one[:, None] for one in numbers.expand(entries.k_BKED.shape[1], -1).unbind(-1)
        )
        self._factor = self._factor.clamp(min=LEAST_FACTOR)
        self._number = entries.position_BKE.shape[-1]
        # One entry more takes what a masked write must not touch.
        self._v = torch.nn.functional.pad(entries.v_BKED, (0, 0, 0, 1))
        self._bias = torch.nn.functional.pad(entries.bias_BKE, (0, 1))
        self._last = torch.nn.functional.pad(torch.full_like(entries.position_BKE, FOREVER), (0, 1))
        # Where each entry's newest version stands among the E + 1 + V.
        self._newest = torch.arange(self._number + 1, device=self._v.device).expand_as(self._last).clone()
        self._versions: list[tuple[Tensor, ...]] = []
        self._num_versions = 0
        self._replaced: list[tuple[Tensor, Tensor]] = []

    def cross(self, border_B11: Tensor, edge_B11: Tensor, threshold: float | None, reach: int) -> None:
        """One border of each sequence; what is marked and older than `edge` leaves."""
        entries, here = self._entries, self._last[..., :-1] == FOREVER
        position, past = entries.position_BKE, here & (entries.position_BKE < edge_B11)
        leaves = past & entries.marked_BKE & (position >= 0)
        if not bool(leaves.any()):
            return
        if threshold is not None:
            oldest = position.masked_fill(~leaves, FOREVER).amin(dim=2, keepdim=True)
            takes = past & ~entries.marked_BKE & (position > 0) & (position >= oldest - reach)
            if bool(takes.any()):
                self._merge(chosen_entries(leaves), chosen_entries(takes), border_B11, threshold, reach)
        self._last = _put(self._last, leaves, border_B11 - 1)

    def _merge(
        self, leaving: tuple[Tensor, Tensor], taking: tuple[Tensor, Tensor], border_B11: Tensor, threshold: float, reach: int
    ) -> None:  # fmt: skip
        """All that leave at one border, looked up in the entries as they stand before it."""
        (index_N, there_N), (index_M, there_M) = leaving, taking
        entries, wide = self._entries, torch.promote_types(self._v.dtype, torch.float32)
        v_N, v_M = (_vectors(self._v, index).to(wide) for index in (index_N, index_M))
        anchor_N, cosine_N = self._most_similar(index_N, index_M, there_M, v_N, v_M, reach)
        merges_N = there_N & (cosine_N >= threshold)
        cosine_N = cosine_N.masked_fill(~merges_N, 1.0)
        s_N = entries.s_BKE.gather(2, index_N) - entries.s_BKE.gather(2, index_M).gather(2, anchor_N)
        log_u_N = (s_N + self._b + self._c * (cosine_N - 1)).clamp(max=LARGEST_LOG_WEIGHT)
        u_N = log_u_N.masked_fill(~merges_N, -torch.inf).exp().to(wide)
        into_NM = torch.nn.functional.one_hot(anchor_N, index_M.shape[2]) * u_N.unsqueeze(-1)
        more_M = into_NM.sum(dim=2)
        changed_M = more_M > 0
        if not bool(changed_M.any()):
            return
        z_M = (self._bias.gather(2, index_M) / self._factor).exp()
        total_M = z_M + more_M
        v_M = (z_M.unsqueeze(-1) * v_M + into_NM.transpose(2, 3) @ v_N) / total_M.unsqueeze(-1)
        place_C, there_C = chosen_entries(changed_M)
        self._replace(
            index_M.gather(2, place_C), there_C, border_B11, self._rounded(_vectors(v_M, place_C)),
            half_rounded((self._factor * total_M.log()).gather(2, place_C)),
        )  # fmt: skip

    @torch.no_grad()
    def _most_similar(
        self, index_N: Tensor, index_M: Tensor, there_M: Tensor, v_N: Tensor, v_M: Tensor, reach: int
    ) -> tuple[Tensor, Tensor]:
        """Of each that leaves the place in M of its most similar entry, the oldest of equals, and the similarity: the mean of the
        cosines of keys and of values; -inf where nothing may take it.
        """
        entries = self._entries
        k_N, k_M = (_vectors(entries.k_BKED, index).to(v_N.dtype) for index in (index_N, index_M))
        cosine_NM = (_unit(k_N) @ _unit(k_M).transpose(2, 3) + _unit(v_N) @ _unit(v_M).transpose(2, 3)) / 2
        position_N, position_M = (entries.position_BKE.gather(2, index) for index in (index_N, index_M))
        behind_NM = position_N.unsqueeze(3) - position_M.unsqueeze(2)
        may_NM = there_M.unsqueeze(2) & (behind_NM >= 1) & (behind_NM <= reach)
        cosine_NM = cosine_NM.masked_fill(~may_NM, -torch.inf)
        best_N = cosine_NM.amax(dim=3)
        place = torch.arange(cosine_NM.shape[3], device=v_N.device)
        first_N = place.masked_fill(cosine_NM != best_N.unsqueeze(3), cosine_NM.shape[3]).amin(dim=3)
        return first_N.clamp(max=cosine_NM.shape[3] - 1), best_N

    def _rounded(self, v: Tensor) -> Tensor:
        """Values as the store holds them; the gradient knows nothing of rounding."""
        stored = v.detach().to(self._v.dtype)
        stored = stored if self._as_stored is None else self._as_stored(stored)
        return stored if not v.requires_grad else v.to(self._v.dtype) + (stored - v.detach().to(self._v.dtype))

    def _replace(self, index_C: Tensor, there_C: Tensor, border_B11: Tensor, v_C: Tensor, bias_C: Tensor) -> None:
        """New versions of some entries, seen from a border on."""
        place_C = torch.where(there_C, index_C, self._number)
        self._replaced.append((self._newest.gather(2, place_C), (border_B11 - 1).expand_as(place_C)))
        first_C = border_B11.expand_as(place_C).masked_fill(~there_C, -1)
        self._versions.append((_vectors(self._entries.k_BKED, index_C), v_C, first_C, bias_C))
        number = place_C.shape[2]
        new = self._number + 1 + self._num_versions + torch.arange(number, device=place_C.device)
        self._newest = self._newest.scatter(2, place_C, new.expand_as(place_C))
        self._num_versions += number
        self._v = _scatter(self._v, place_C.unsqueeze(-1).expand_as(v_C), v_C)
        self._bias = _scatter(self._bias, place_C, bias_C.to(self._bias.dtype))

    def result(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All entries and versions, see `fold_entries`."""
        entries, last = self._entries, self._last[..., :-1]
        after = {
            "stays_BKE": (last == FOREVER) & (entries.position_BKE >= 0),
            "changed_BKE": self._newest[..., :-1] > self._number,
            "v_BEKD": self._v[..., :-1, :].transpose(1, 2), "bias_BKE": self._bias[..., :-1],
        }  # fmt: skip
        k, v, first, bias = own = entries.k_BKED, entries.v_BKED, entries.position_BKE, entries.bias_BKE
        if self._versions:
            # An entry that leaves was never replaced, and one that was replaced never leaves: marked ones take nothing.
            last = torch.nn.functional.pad(self._last, (0, self._num_versions), value=FOREVER)
            for index, at in self._replaced:
                last.scatter_(2, index, at)
            last = torch.cat((last[..., : self._number], last[..., self._number + 1 :]), dim=-1)
            k, v, first, bias = (
                torch.cat((one, *(version[at].to(one.dtype) for version in self._versions)), dim=2)
                for at, one in enumerate(own)
            )
        lives = {
            "k_BEKD": k.transpose(1, 2),
            "v_BEKD": v.transpose(1, 2),
            "first_BKE": first,
            "last_BKE": last,
            "bias_BKE": bias,
        }
        return lives, after


def half_rounded(x: Tensor) -> Tensor:
    """x as fp16 holds it, in its own dtype; the gradient knows nothing of rounding."""
    stored = x.detach().half().to(x.dtype)
    return stored if not x.requires_grad else x + (stored - x.detach())


def _put(last_BKE: Tensor, where_BKE: Tensor, value: Tensor) -> Tensor:
    """`last` with a value at some entries; it has one column more than `where`."""
    return torch.where(torch.nn.functional.pad(where_BKE, (0, 1)), value, last_BKE)


def _scatter(state: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """In place where no gradient is asked for: a long prompt has hundreds of borders."""
    if torch.is_grad_enabled() and (state.requires_grad or value.requires_grad):
        return state.scatter(2, index, value)
    return state.scatter_(2, index, value)


def _vectors(x_BKED: Tensor, index_BKX: Tensor) -> Tensor:
    """[B, K, X, D]."""
    return x_BKED.gather(2, index_BKX.unsqueeze(-1).expand(-1, -1, -1, x_BKED.shape[-1]))


def _unit(x: Tensor) -> Tensor:
    """Vectors of length 1; one of zeros stays."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
