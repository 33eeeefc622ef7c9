"""A design space: models from scratch that differ in heads and layers, each at its best learning rate; which of them no other
beats at once in quality and in bytes; and shared layers beside what they have to be better than.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvfold.report.numbers import MISSING, amount, count
from kvfold.report.results import number, numbers_of, words
from kvfold.report.series import Run, known_pairs
from kvfold.report.sheets import WRITERS, Sheet, known_sheet


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
        return [perplexity_of(run) for run in self.runs]

    @property
    def perplexity(self) -> float:
        """Mean over the seeds."""
        return sum(self.perplexities) / len(self.runs)

    @property
    def shares_layers(self) -> bool:
        """Whether some layers read keys and values of others."""
        return words(self.row, "layers") not in ("", "full")

    @property
    def losses(self) -> list[tuple[float, float]]:
        """(tokens, training loss) of the best run."""
        curve = self.row.get("curve")
        curve = curve if isinstance(curve, Mapping) else {}
        return known_pairs(numbers_of(curve, "tokens"), numbers_of(curve, "loss"))


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
    best = min((sorted(runs, key=perplexity_of) for runs in rates.values()), key=lambda runs: perplexity_of(runs[0]))
    seeds = Counter(seed for runs in rates.values() for seed in {number(run, "seed") for run in runs} - {None})
    tuning = frozenset(seed for seed, times in seeds.items() if times > 1)
    kv_bytes = number(best[0], "kv_bytes_per_token")
    return Model(recipe=recipe, kv_bytes=kv_bytes, runs=tuple(best), rates=len(rates), tuning_seeds=tuning)


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


def loss_runs(models: Sequence[Model], most: int = 7) -> list[Run]:
    """The losses of the best runs over their tokens, of as many models as there are colours: those that nothing beats first."""
    best = frontier(models)
    ordered = [*best, *(one for one in models if one not in best)]
    return [Run(name=one.recipe, points=one.losses) for one in ordered if one.losses][:most]


def scale_of(models: Sequence[Model]) -> str:
    """How large the models are and what they saw, and that it says nothing about larger ones."""
    weights = [weight for one in models if (weight := number(one.row, "parameters"))]
    least, most = (amount(one(weights)) if weights else "" for one in (min, max))
    about = (f" of {least} weights" if least == most else f" of {least} to {most} weights") if weights else ""
    tokens = number(models[0].row, "tokens")
    about += f" that saw {amount(tokens)} tokens" if tokens else ""
    return f"These are models{about}: what holds for them may not hold for larger ones." if about else ""


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

    def published(self, key: str) -> str:
        """Difference and share of the published models, in words."""
        ours, theirs = (number(one.row, key) for one in (self.shared, self.other))
        return f"{_signed(ours - theirs)}, {_percent(ours / theirs - 1)}" if ours and theirs else "none"

    def _seeds(self, but: frozenset[float] = frozenset()) -> list[tuple[float, float]]:
        both = [{number(run, "seed"): perplexity_of(run) for run in one.runs} for one in (self.shared, self.other)]
        return [(both[0][seed], both[1][seed]) for seed in both[0].keys() & both[1].keys() - but if seed is not None]


def pairs_of(models: Sequence[Model]) -> list[Pair]:
    """In the order of the models, what has the same shape first, then what has equal bytes."""

    def shape(one: Model) -> tuple:
        return tuple(number(one.row, key) for key in ("num_layers", "num_heads", "num_kv_heads", "head_dim"))

    found = []
    for shared in (one for one in models if one.shares_layers):
        others = [one for one in models if not one.shares_layers]
        alike = [one for one in others if shape(one) == shape(shared)]
        equal = [one for one in others if one.kv_bytes == shared.kv_bytes and one not in alike]
        found += [Pair(shared=shared, other=other) for other in (*alike, *equal)]
    return found


def _spread(values: Sequence[float], shown: Callable[[float], str] = "{:.2f}".format, none: str = MISSING) -> str:
    """The mean, lowest and highest behind it."""
    if not values:
        return none
    mean = shown(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({shown(values[0])} to {shown(values[-1])})"


def _signed(value: float) -> str:
    """Two decimals, as perplexities have beside it."""
    return f"{value:+.2f}".replace("-", "−")


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", "−")


def _owners(one: Model) -> str:
    owners, layers = number(one.row, "owners"), number(one.row, "num_layers")
    return MISSING if owners is None or layers is None else f"{count(owners)} of {count(layers)}"


def _seeds(of: Model | Pair) -> str:
    return count(len(of.runs if isinstance(of, Model) else of.differences))


def _published(of: Model | Pair) -> str:
    if isinstance(of, Pair):
        return of.published("paper_perplexity")
    value = number(of.row, "paper_perplexity")
    return "none" if value is None else f"{value:.2f}"


DESIGN_WRITERS = WRITERS | {
    "recipe": lambda one: one.recipe,
    "kv_bytes": lambda one: count(one.kv_bytes),
    "perplexities": lambda one: _spread(one.perplexities),
    "rates": lambda one: count(one.rates),
    "owners": _owners,
    "seeds": _seeds,
    "published": _published,
    "shared": lambda pair: pair.shared.recipe,
    "other": lambda pair: pair.other.recipe,
    "bytes": lambda pair: f"{pair.other.kv_bytes / pair.shared.kv_bytes:.2f}×",
    "differences": lambda pair: _spread(pair.differences, _signed),
    "fresh": lambda pair: _spread(pair.fresh_differences, _signed, "none"),
    "shares": lambda pair: _spread(pair.shares, _percent),
    "tuned": lambda pair: pair.published("paper_tuned_perplexity"),
}


def design_sheet(models: Sequence[Model]) -> Sheet:
    """A line a model, as tables of design spaces are printed."""
    return known_sheet("design", models, writers=DESIGN_WRITERS)


def pairs_sheet(models: Sequence[Model]) -> Sheet | None:
    """A line a pair; None where there is none."""
    pairs = pairs_of(models)
    return known_sheet("pairs", pairs, writers=DESIGN_WRITERS) if pairs else None
