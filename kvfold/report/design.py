"""A design space: models from scratch that differ in heads and layers, each at its best learning rate, and which of them
no other beats at once in quality and in bytes.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvfold.report.numbers import MISSING, count, three
from kvfold.report.results import number, words
from kvfold.report.sheets import Column, Sheet


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """One recipe, over the runs at the learning rate at which it did best."""

    recipe: str
    kv_bytes: float
    """Of one token, all layers, at 16 bit."""
    runs: tuple[Mapping, ...]
    """At that rate, the best first."""
    rates: int
    """Learning rates that were tried."""
    tuning_seeds: frozenset[float] = frozenset()
    """Of runs at several rates: by these the rate was chosen, so at it they are lucky."""

    @property
    def row(self) -> Mapping:
        """The run that did best."""
        return self.runs[0]

    @property
    def perplexities(self) -> list[float]:
        """Of the runs, lowest first."""
        return [number(run, "validation_perplexity") for run in self.runs]

    @property
    def perplexity(self) -> float:
        """Mean over the seeds."""
        return sum(self.perplexities) / len(self.runs)

    @property
    def shares_layers(self) -> bool:
        """Whether some layers read keys and values of others."""
        return words(self.row, "layers") not in ("", "full")


def models_of(rows: Iterable[Mapping]) -> list[Model]:
    """The recipes that have a perplexity, most bytes first, of equal bytes the better first."""
    runs: dict[str, dict[float | None, list[Mapping]]] = {}
    for row in rows:
        if all((number(row, key) or 0) > 0 for key in ("validation_perplexity", "kv_bytes_per_token")):
            rates = runs.setdefault(words(row, "recipe") or "unnamed", {})
            rates.setdefault(number(row, "learning_rate"), []).append(row)
    found = [_model(recipe, rates) for recipe, rates in runs.items()]
    return sorted(found, key=lambda one: (-one.kv_bytes, one.perplexity))


def _model(recipe: str, rates: Mapping[float | None, list[Mapping]]) -> Model:
    """The rate is chosen by the run that did best: other rates may have fewer seeds."""
    ordered = [sorted(runs, key=perplexity_of) for runs in rates.values()]
    best = min(ordered, key=lambda runs: perplexity_of(runs[0]))
    seeds = Counter(seed for runs in rates.values() for seed in {number(run, "seed") for run in runs} - {None})
    return Model(
        recipe=recipe,
        kv_bytes=number(best[0], "kv_bytes_per_token"),
        runs=tuple(best),
        rates=len(rates),
        tuning_seeds=frozenset(seed for seed, times in seeds.items() if times > 1),
    )


def perplexity_of(row: Mapping) -> float:
    """Of a run, on held-out text."""
    return number(row, "validation_perplexity")


def frontier(models: Sequence[Model]) -> list[Model]:
    """Those that no model of as few bytes beats, most bytes first."""
    kept: list[Model] = []
    for one in sorted(models, key=lambda one: (one.kv_bytes, one.perplexity)):
        if not kept or one.perplexity < kept[-1].perplexity:
            kept.append(one)
    return kept[::-1]


COLUMNS = (
    Column(head="recipe", is_text=True),
    Column(head="KV bytes a token", note="Keys and values of one token, all layers, at 16 bit."),
    Column(head="held-out perplexity", note="Mean over the seeds, lowest and highest behind it."),
    Column(head="seeds"),
    Column(head="published", note="Perplexity of the published model of 1B weights that this one is made after."),
    Column(head="learning rate", note="At its highest; of the rates that were tried the best."),
    Column(head="rates", note="How many were tried."),
    Column(head="query heads"),
    Column(head="KV heads"),
    Column(head="head dim"),
    Column(head="layers with KV", note="That store keys and values; the others read theirs."),
    Column(head="weights", note="Parameters of the model."),
)


def design_sheet(models: Sequence[Model]) -> Sheet:
    """A line a model, as tables of design spaces are printed."""
    cells = tuple(
        (
            one.recipe,
            count(one.kv_bytes),
            _spread(one.perplexities),
            count(len(one.runs)),
            _published(one.row),
            three(number(one.row, "learning_rate")),
            count(one.rates),
            *(count(number(one.row, key)) for key in ("num_heads", "num_kv_heads", "head_dim")),
            _owners(one.row),
            count(number(one.row, "parameters")),
        )
        for one in models
    )
    return Sheet(title="The design space", columns=COLUMNS, rows=cells)


def _owners(row: Mapping) -> str:
    owners, layers = number(row, "owners"), number(row, "num_layers")
    return MISSING if owners is None or layers is None else f"{count(owners)} of {count(layers)}"


def _spread(values: Sequence[float]) -> str:
    mean = f"{sum(values) / len(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"


def _published(row: Mapping) -> str:
    value = number(row, "paper_perplexity")
    return "none" if value is None else f"{value:.2f}"
