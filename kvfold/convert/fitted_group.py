"""Keys and values for a whole group of layers in closed form: those of the owner's input that serve all layers best, and
every layer's query and output projection turned towards them.

A group is all that one new KV head stands for: *parts*, each a KV head of one layer of the original. What a part's keys and
values would be is first predicted from the owner's input, linearly. Of these predictions
- the values' leading directions are kept, as many as a head has channels, measured by what the output projections make of
  them (a reduced-rank regression);
- the keys keep one complex channel for each rotary frequency, measured by the queries' energy there: scores depend on
  q conj(k) and on the turn alone, so a complex factor moves from keys to queries unharmed. What is constant in a key tells
  tokens apart only as far as the turn does, and counts accordingly.

The ridge regression behind it gathers its equations batch by batch in float64; held-out batches choose its strength.
Letters: C model width, D head dim, F channels of complex keys (D / 2), I inputs, N tokens, O outputs, P parts, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Self

import torch
from torch import Tensor, nn

from kvfold.models.config import FoldConfig
from kvfold.ops.rotation import Rotation

STRENGTHS = tuple(10.0**power for power in (-4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3))
"""Ridges that are tried, as shares of the inputs' mean energy."""


class LeastSquares:
    """The W that makes the sum over tokens of weight * |W x - y|^2 least, from the sums that it needs."""

    def __init__(self, num_inputs: int, num_outputs: int, device: torch.device):
        options = {"dtype": torch.float64, "device": device}
        self.xx_II = torch.zeros(num_inputs, num_inputs, **options)
        self.xy_IO = torch.zeros(num_inputs, num_outputs, **options)
        self.x_I, self.num_tokens = torch.zeros(num_inputs, **options), 0

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """x [..., I], y [..., O], weight [...] of a batch; products of one batch are taken in fp32."""
        x, y = x.flatten(0, -2).float(), y.flatten(0, -2).float()
        weighted = x if weight is None else x * weight.reshape(-1, 1)
        self.xx_II += weighted.T @ x
        self.xy_IO += weighted.T @ y
        self.x_I += weighted.sum(dim=0)
        self.num_tokens += len(x)

    def absorb(self, other: Self) -> None:
        """Take another's tokens in."""
        for name in ("xx_II", "xy_IO", "x_I", "num_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def solve(self, strength: float) -> Tensor:
        """W transposed, float64 [I, O]; `strength` is the ridge as a share of the inputs' mean energy."""
        ridge = strength * self._energy()
        return torch.linalg.solve(self.xx_II + ridge * torch.eye(len(self.xx_II)).to(self.xx_II), self.xy_IO)

    def best_strength(self, held: Self) -> float:
        """Of `STRENGTHS` the one whose solution here has the least error on the tokens of `held`."""
        values, vectors = torch.linalg.eigh(self.xx_II)
        turned_xy = vectors.T @ self.xy_IO
        held_xx, held_xy = vectors.T @ held.xx_II @ vectors, vectors.T @ held.xy_IO
        errors = {}
        for strength in STRENGTHS:
            solution = turned_xy / (values + strength * self._energy())[:, None]
            errors[strength] = float(((held_xx @ solution - 2.0 * held_xy) * solution).sum())
        return min(errors, key=errors.get)

    def _energy(self) -> float:
        return max(float(self.xx_II.diagonal().mean()), 1e-30)


_PREDICTION_RIDGE = 1e-4
"""Of the prediction of keys and values, as a share of the input's mean energy."""
_FLAT = 1e-8
"""Output directions with less than this share of the strongest's energy are taken to have that much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A KV head of the original, which a new head stands for."""

    attention: nn.Module
    """The converted layer that will read the new head."""
    columns: slice
    """Its channels among those of all keys, or of all values, that were gathered."""
    queries: slice
    """Its query heads in that layer."""
    energy_D: Tensor
    """Mean square of those queries, summed over the heads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _KeyChannels:
    """Keys of several parts as complex channels."""

    real: Tensor
    """Which of a head's channels are the real parts, [F]."""
    imaginary: Tensor
    """Which are the imaginary ones."""
    sizes: list[Tensor]
    """Of each part, the size of its queries, [F], by which its channels are scaled."""
    predicted_CFP: Tensor
    """How each channel is predicted from the owner's input."""
    energy_FPP: Tensor
    """Energy of what is predicted, less what no turn makes visible."""


def matching_order(
    config: FoldConfig, owner: Sequence[Part], reader: Sequence[Part], key_sums: LeastSquares, value_sums: LeastSquares,
    rotation: Rotation | None,
) -> list[int]:  # fmt: skip
    """Which of a reader's heads goes best with each head of the owner: `order[n]` is the one for head n, so that sharing
    loses the least share of keys and values in all. Found by swapping pairs as long as that helps.
    """
    linear = key_sums.solve(_PREDICTION_RIDGE), value_sums.solve(_PREDICTION_RIDGE)
    cost = torch.zeros(len(owner), len(reader), dtype=torch.float64)
    for row, ours in enumerate(owner):
        for column, theirs in enumerate(reader):
            pair = ours, theirs
            keys = torch.linalg.eigvalsh(_key_channels(config, pair, key_sums, linear[0], rotation).energy_FPP)
            values = torch.linalg.eigvalsh(_value_energy(config, pair, value_sums, linear[1])[1])
            cost[row, column] = keys[:, :-1].sum() / keys.sum() + values[: -config.head_dim].sum() / values.sum()
    order, moved = list(range(len(owner))), True
    while moved:
        moved = False
        for one, other in combinations(range(len(order)), 2):
            stands = cost[one, order[one]] + cost[other, order[other]]
            if cost[one, order[other]] + cost[other, order[one]] < stands * (1.0 - 1e-9):
                order[one], order[other], moved = order[other], order[one], True
    return order


def put_in_order(attention: nn.Module, order: Sequence[int], block: int) -> None:
    """Put a layer's groups of query heads, `block` channels each, in this order. It must then read other KV heads."""
    for name in ("weight", "bias"):
        old = getattr(attention.q_proj, name)
        if old is not None:
            rows = old.detach().unflatten(0, (len(order), block))[list(order)].flatten(0, 1)
            setattr(attention.q_proj, name, nn.Parameter(rows))
    columns = attention.o_proj.weight.detach().unflatten(1, (len(order), block))[:, list(order)].flatten(1)
    attention.o_proj.weight = nn.Parameter(columns)


def fit_values(config: FoldConfig, owner: nn.Module, head: int, parts: Sequence[Part], sums: LeastSquares) -> None:
    """Give one head of the owner the values that serve all parts, and turn their output projections.

    Source: reduced-rank regression, Izenman 1975; its use here is ours.
    Differs: none.
    """
    dim = config.head_dim
    predicted, energy = _value_energy(config, parts, sums, sums.solve(_PREDICTION_RIDGE))
    leading = torch.linalg.eigh(energy)[1][:, -dim:]
    inverses = [_output_root(part, dim)[1] for part in parts]
    _write_rows(owner.v_proj, slice(head * dim, (head + 1) * dim), (predicted @ leading).T)
    for place, (part, inverse) in enumerate(zip(parts, inverses, strict=True)):
        turn_DD = inverse @ leading[place * dim : (place + 1) * dim]
        weight = part.attention.o_proj.weight
        blocks = weight.detach().double().unflatten(1, (-1, dim)).clone()
        blocks[:, part.queries] = blocks[:, part.queries] @ turn_DD
        part.attention.o_proj.weight = nn.Parameter(blocks.flatten(1).to(weight.dtype))


def fit_keys(
    config: FoldConfig, owner: nn.Module, head: int, parts: Sequence[Part], sums: LeastSquares, rotation: Rotation | None
) -> None:  # fmt: skip
    """Give one head of the owner the keys that serve all parts, and turn their query projections.

    Source: ours.
    Differs: none.
    """
    dim = config.head_dim
    keys = _key_channels(config, parts, sums, sums.solve(_PREDICTION_RIDGE), rotation)
    leading = torch.linalg.eigh(keys.energy_FPP)[1][..., -1]
    rows = torch.einsum("cfp,fp->fc", keys.predicted_CFP, leading)
    new = torch.empty(dim, rows.shape[1], dtype=torch.float64, device=rows.device)
    new[keys.real], new[keys.imaginary] = rows.real, rows.imag
    _write_rows(owner.k_proj, slice(head * dim, (head + 1) * dim), new)
    for place, part in enumerate(parts):
        _turn_queries(part, dim, keys.real, keys.imaginary, leading[:, place] / keys.sizes[place])


def _value_energy(
    config: FoldConfig, parts: Sequence[Part], sums: LeastSquares, linear: Tensor
) -> tuple[Tensor, Tensor]:
    """How the parts' values, as their output projections see them, are predicted, and the energy of that, [P * D, P * D]."""
    roots = [_output_root(part, config.head_dim)[0] for part in parts]
    predicted, wanted = (
        torch.cat([columns[:, part.columns] @ root for part, root in zip(parts, roots, strict=True)], dim=1)
        for columns in (linear, sums.xy_IO)
    )
    energy = predicted.T @ wanted
    return predicted, (energy + energy.T) / 2


def _key_channels(
    config: FoldConfig, parts: Sequence[Part], sums: LeastSquares, linear: Tensor, rotation: Rotation | None
) -> _KeyChannels:
    """The parts' keys as complex channels, scaled by their queries' size."""
    real, imaginary, stay_F = _complex_channels(config.head_dim, rotation, linear)
    sizes = [(part.energy_D[real] + part.energy_D[imaginary]).sqrt().clamp(min=1e-12) for part in parts]

    def channels(columns: Tensor) -> Tensor:
        of_parts = [columns[:, part.columns] for part in parts]
        pairs = zip(of_parts, sizes, strict=True)
        return torch.stack([torch.complex(one[:, real], one[:, imaginary]) * size for one, size in pairs], dim=-1)

    predicted, wanted = channels(linear), channels(sums.xy_IO)
    energy = torch.einsum("cfp,cfr->fpr", predicted.conj(), wanted)
    constant = torch.einsum("c,cfp->fp", (sums.x_I / sums.num_tokens).to(predicted.dtype), predicted)
    energy = energy - sums.num_tokens * stay_F[:, None, None] * constant.conj()[:, :, None] * constant[:, None, :]
    return _KeyChannels(
        real=real, imaginary=imaginary, sizes=sizes, predicted_CFP=predicted, energy_FPP=(energy + energy.mH) / 2
    )


def _turn_queries(part: Part, dim: int, real: Tensor, imaginary: Tensor, factor_F: Tensor) -> None:
    """Multiply the complex channels of a part's queries."""
    for name in ("weight", "bias"):
        old = getattr(part.attention.q_proj, name)
        if old is None:
            continue
        heads = old.detach().double().unflatten(0, (-1, dim)).clone()
        rows = heads[part.queries]
        factor = factor_F.view(1, -1, *[1] * (rows.ndim - 2))
        turned = torch.complex(rows[:, real], rows[:, imaginary]) * factor
        rows[:, real], rows[:, imaginary] = turned.real, turned.imag
        heads[part.queries] = rows
        setattr(part.attention.q_proj, name, nn.Parameter(heads.flatten(0, 1).to(old.dtype)))


def _complex_channels(dim: int, rotation: Rotation | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Real and imaginary channels of each complex one, and how little its turn tells positions apart (1 = not at all).
    Channels that are not turned pair up likewise: a factor passes through them as well.
    """
    turned = 0 if rotation is None else rotation.cos_BTR.shape[-1]
    half, rest = turned // 2, (dim - turned) // 2
    real = torch.cat((torch.arange(half), turned + torch.arange(rest)))
    imaginary = torch.cat((half + torch.arange(half), turned + rest + torch.arange(rest)))
    stay = torch.ones(dim // 2, dtype=torch.float64, device=like.device)
    if half:
        turn_TF = torch.complex(rotation.cos_BTR[0, :, :half].double(), rotation.sin_BTR[0, :, :half].double())
        stay[:half] = (turn_TF.mean(dim=0).abs() / turn_TF[0].abs()).square()
    return real.to(like.device), imaginary.to(like.device), stay


def _output_root(part: Part, dim: int) -> tuple[Tensor, Tensor]:
    """The root of a part's output energy, [D, D], and its inverse: a value v moves the stream by |root v|."""
    weight = part.attention.o_proj.weight.detach().double().unflatten(1, (-1, dim))[:, part.queries]
    values, vectors = torch.linalg.eigh(torch.einsum("cqd,cqe->de", weight, weight))
    values = values.clamp(min=float(values[-1].clamp(min=1e-30)) * _FLAT).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def _write_rows(projection: nn.Linear, rows: slice, new: Tensor) -> None:
    """New rows of a projection; a last column more than it has inputs is its bias."""
    weight = projection.weight.detach().clone()
    weight[rows] = new[:, : weight.shape[1]].to(weight.dtype)
    projection.weight = nn.Parameter(weight)
    if projection.bias is not None:
        bias = projection.bias.detach().clone()
        bias[rows] = new[:, weight.shape[1]].to(bias.dtype)
        projection.bias = nn.Parameter(bias)
