"""Shared layers beside what they have to be better than: the same model without sharing, and others of equal bytes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvfold.report.design import Model, perplexity_of
from kvfold.report.numbers import MISSING, count
from kvfold.report.results import number
from kvfold.report.sheets import Column, Sheet

_SHAPE = ("num_layers", "num_heads", "num_kv_heads", "head_dim")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A model with shared layers, and one without."""

    shared: Model
    other: Model

    @property
    def differences(self) -> list[float]:
        """Perplexity of the first less that of the second, for each seed that both were trained with, lowest first; below 0
        where sharing wins.
        """
        return sorted(ours - theirs for ours, theirs in self._seeds())

    @property
    def fresh_differences(self) -> list[float]:
        """Of the seeds by which neither's learning rate was chosen."""
        return sorted(ours - theirs for ours, theirs in self._seeds(self.shared.tuning_seeds | self.other.tuning_seeds))

    @property
    def shares(self) -> list[float]:
        """The same as shares of the second's perplexity."""
        return sorted(ours / theirs - 1 for ours, theirs in self._seeds())

    def published(self, key: str) -> tuple[float, float] | None:
        """Difference and share of the published models."""
        ours, theirs = (number(one.row, key) for one in (self.shared, self.other))
        return (ours - theirs, ours / theirs - 1) if ours and theirs else None

    def _seeds(self, but: frozenset[float] = frozenset()) -> list[tuple[float, float]]:
        ours, theirs = (
            {number(run, "seed"): perplexity_of(run) for run in one.runs} for one in (self.shared, self.other)
        )
        return [(ours[seed], theirs[seed]) for seed in ours.keys() & theirs.keys() - but if seed is not None]


def pairs_of(models: Sequence[Model]) -> list[Pair]:
    """In the order of the models, what has the same shape first."""
    found = []
    for shared in (one for one in models if one.shares_layers):
        others = [one for one in models if not one.shares_layers]
        alike = [one for one in others if _shape(one.row) == _shape(shared.row)]
        equal = [one for one in others if one.kv_bytes == shared.kv_bytes and one not in alike]
        found += [Pair(shared=shared, other=other) for other in (*alike, *equal)]
    return found


def _shape(row: Mapping) -> tuple:
    return tuple(number(row, key) for key in _SHAPE)


COLUMNS = (
    Column(head="layers shared", is_text=True),
    Column(head="beside", is_text=True),
    Column(head="its bytes", note="KV bytes a token of the model beside, as a multiple."),
    Column(head="difference", note="Perplexity less that of the model beside, mean over seeds, lowest and highest behind it: "
           "below 0 the shared layers win."),
    Column(head="fresh seeds", note="The same over the seeds by which no learning rate was chosen."),
    Column(head="in percent", note="Of the perplexity of the model beside."),
    Column(head="seeds", note="That both were trained with."),
    Column(head="published", note="The same of the published models of 1B weights, all at one learning rate."),
    Column(head="published, tuned", note="The same, each at the best of its learning rates."),
)  # fmt: skip


def pairs_sheet(models: Sequence[Model]) -> Sheet | None:
    """A line a pair; None where there is none."""
    rows = tuple(
        (
            pair.shared.recipe,
            pair.other.recipe,
            f"{pair.other.kv_bytes / pair.shared.kv_bytes:.2f}×",
            _spread(pair.differences, _signed),
            _spread(pair.fresh_differences, _signed) if pair.fresh_differences else "none",
            _spread(pair.shares, _percent),
            count(len(pair.differences)),
            _published(pair.published("paper_perplexity")),
            _published(pair.published("paper_tuned_perplexity")),
        )
        for pair in pairs_of(models)
    )
    return Sheet(title="Shared layers beside others", columns=COLUMNS, rows=rows) if rows else None


def _spread(values: Sequence[float], shown: Callable[[float], str]) -> str:
    if not values:
        return MISSING
    mean = shown(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({shown(values[0])} to {shown(values[-1])})"


def _published(values: tuple[float, float] | None) -> str:
    return "none" if values is None else f"{_signed(values[0])}, {_percent(values[1])}"


def _signed(value: float) -> str:
    """Two decimals, as perplexities have beside it."""
    return f"{value:+.2f}".replace("-", "−")


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", "−")
