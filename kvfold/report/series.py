"""From rows to what is drawn: the names of methods, their colours on one page, and the lines of every chart.

A family is a method whatever its budget: `h2o:128+128` and `h2o:256+256` are one line. A budget that grows with the
text (in percent) is a line of its own, since a fixed one starts uncompressed and looks better than it is on short texts.
Of a design space, models from scratch that differ in heads and layers, each stands at its best learning rate; which of them no
other beats at once in quality and in bytes; and shared layers stand beside what they have to be better than.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvfold.report.results import Result, amount, number, numbers_of, words

UNFOLDED = "full"
NUM_COLOURS = 7
"""Colours of the page, apart from the neutral one (index 0) of the unfolded model."""
_OWN_SHARE = 0.9
"""Below it a model's layout saves by itself; what a method stores besides (pages, scores) can only raise the share."""
MOST_POINTS = 240
"""Points of a line over steps; a longer run shows means of neighbouring steps."""
LAST, FURTHER = 3, 10
"""Points that an extrapolation rests on, and a line needs; as many times the most tokens is how far it goes."""
SPREAD = ("mean", "least", "lower", "upper", "most")
"""Keys of `over_time`: the mean, the smallest head, the quartiles, the largest head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One measured budget of one method on one text: kept bytes over those of the full cache, the perplexity's change against the
    unfolded model with its standard error, in percent, and the row that they came from.
    """

    share: float
    change: float
    error: float | None
    row: Mapping


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One method over its budgets on one text, the largest budget first."""

    title: str
    """What stands at its end."""
    family: str
    """The method's name without settings: decides the colour."""
    grows: bool
    """Whether the budgets are shares of the text."""
    points: tuple[Point, ...]
    """At least one."""
    from_unfolded: bool = True
    """Whether a budget that covers the text makes it the unfolded model, as it doesn't for a model with other weights."""


def family_of(row: Mapping) -> str:
    """The method's name without its settings. Layers under different methods (`tova:64; 0-3=full`) are a family of their own."""
    method = words(row, "method")
    return method if ";" in method else method.partition(":")[0].strip() or words(row, "title") or "unnamed"


def title_of(row: Mapping) -> str:
    """What people call the method, first letter large; a model's own name as it is."""
    mixed = ";" in words(row, "method")
    title = family_of(row) if mixed else words(row, "title") or family_of(row)
    return title if title == words(row, "model") else title[:1].upper() + title[1:]


def label_of(row: Mapping) -> str:
    """Title and settings: `H2O 128+128`. The method's own text form where there is no title, or several methods."""
    if not words(row, "title") or ";" in words(row, "method"):
        return words(row, "method") or title_of(row)
    settings = words(row, "method").partition(":")[2].strip()
    return f"{title_of(row)} {settings}".strip()


def colours_of(results: Iterable[Result]) -> dict[str, int]:
    """Family -> colour index, the same in every picture of a page; the unfolded model is 0, others 1, 2, ... in turn.

    In alphabetical order, so that a page made again with one more file of known methods keeps its colours.
    """
    drawn = ("quality", "memory", "kept", "document")
    families = sorted({family_of(row) for one in results if one.kind in drawn for row in one.rows} - {UNFOLDED})
    return {UNFOLDED: 0} | {family: 1 + index % NUM_COLOURS for index, family in enumerate(families)}


def kept_share(row: Mapping) -> float | None:
    """Allocated bytes over those of the full cache; the inverse of the compression where bytes are unknown."""
    allocated, full = number(row, "allocated_bytes"), number(row, "full_bytes")
    if allocated is not None and full:
        return allocated / full
    compression = number(row, "compression")
    return 1 / compression if compression else None


def changed_model(row: Mapping) -> str:
    """The name of a model that stores less by itself (fewer heads, shared layers): the method is on top of that, and no
    budget of the method alone. Empty for any other row.
    """
    share, compression = kept_share(row), number(row, "compression")
    own_share = share * compression if share and compression else 1.0
    return words(row, "model") if own_share < _OWN_SHARE else ""


def texts_of(rows: Iterable[Mapping]) -> list[str]:
    """The texts that rows were measured on, in order of appearance."""
    return list(dict.fromkeys(words(row, "text") for row in rows))


def quality_panels(rows: Sequence[Mapping]) -> list[tuple[str, list[Line]]]:
    """(text, lines) for each text that has at least one folded row to show."""
    return [(text, lines) for text in texts_of(rows) if (lines := quality_lines(rows, text))]


def quality_lines(rows: Iterable[Mapping], text: str) -> list[Line]:
    """The folded methods on one text, a line per family, kind of budget and changed model below it; rows without the two
    numbers are left out.
    """
    found: dict[tuple[str, bool, str], list[Point]] = {}
    for row in rows:
        share, change = kept_share(row), number(row, "perplexity_change_percent", "mean")
        if words(row, "text") != text or family_of(row) == UNFOLDED or share is None or share <= 0 or change is None:
            continue
        error = number(row, "perplexity_change_percent", "standard_error")
        key = (family_of(row), "%" in words(row, "method"), changed_model(row))
        found.setdefault(key, []).append(Point(share=share, change=change, error=error, row=row))
    lines = []
    for (family, grows, model), points in found.items():
        points.sort(key=lambda point: -point.share)
        title = title_of(points[0].row) + (" %" if grows else "")
        title += f" of {model}" if model and model != title else ""
        is_other = bool(model) or family.startswith(f"{UNFOLDED} of ")
        lines.append(Line(title=title, family=family, grows=grows, points=tuple(points), from_unfolded=not is_other))
    return lines


def memory_points(row: Mapping) -> list[tuple[float, float]]:
    """(tokens, bytes) of one row, in order of tokens; pairs with a missing half are left out."""
    return sorted(known_pairs(numbers_of(row, "tokens"), numbers_of(row, "allocated_bytes")))


def known_pairs(x: Iterable[float | None], y: Iterable[float | None]) -> list[tuple[float, float]]:
    """Points of which both halves are known."""
    return [(a, b) for a, b in zip(x, y, strict=False) if a is not None and b is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One line over the steps of a run."""

    name: str
    points: Sequence[tuple[float, float]]
    """(step or tokens, value), ascending."""
    dashed: bool = False
    """Whether it is what was asked for, not what came out."""


def runs_of(rows: Sequence[Mapping], names: Mapping[str, str], most: int = MOST_POINTS) -> list[Run]:
    """A line for each key that any row has, of a long run the means of neighbours; one that lies on an earlier one is left out:
    nothing but that part was minimised.
    """
    found: list[Run] = []
    for key, name in names.items():
        known = sorted(known_pairs((number(row, "step") for row in rows), (number(row, key) for row in rows)))
        points = [(part[-1][0], mean_of(value for _, value in part)) for part in stretches(known, most)]
        if points and all(points != other.points for other in found):
            found.append(Run(name=name, points=points, dashed=key.startswith("target")))
    return found


def layers_of(rows: Sequence[Mapping], most: int) -> list[tuple[float, list[float | None]]]:
    """(last step, compression of each layer that has gates), of at most so many stretches of the run."""
    told = [(number(row, "step"), numbers_of(row, "layer_compression")) for row in rows]
    found = []
    for part in stretches(sorted([one for one in told if one[0] is not None and one[1]], key=lambda one: one[0]), most):
        lines = [line for _, line in part]
        columns = [[line[at] for line in lines if at < len(line)] for at in range(max(map(len, lines)))]
        found.append((part[-1][0], [mean_of(column) for column in columns]))
    return found


def stretches(values: list, most: int) -> list[list]:
    """Neighbours together, so that there are at most so many parts."""
    size = -(-len(values) // most) or 1
    return [values[start : start + size] for start in range(0, len(values), size)]


def mean_of(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def growth_of(row: Mapping) -> dict[str, tuple[float | None, ...]] | None:
    """How one method's kept tokens grow while a document is read: `tokens` seen, ascending, and each of `SPREAD` at them; None
    where a row has no mean over time.
    """
    told = row.get("over_time")
    if not isinstance(told, Mapping):
        return None
    seen, columns = numbers_of(told, "tokens"), [numbers_of(told, name) for name in SPREAD]
    points = [
        (at, *(column[index] if index < len(column) else None for column in columns)) for index, at in enumerate(seen)
    ]
    known = [one for one in points if None not in one[:2] and min(value or 0 for value in one) >= 0]
    known.sort(key=lambda point: point[0])
    return dict(zip(("tokens", *SPREAD), zip(*known, strict=True), strict=True)) if known else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One model after so much training: tokens that it saw, those that weights were fitted on included, and the change of its
    perplexity against the model it came from, above 0, with its standard error, in percent.
    """

    tokens: float
    change: float
    error: float | None
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Road:
    """What more training makes of one layout on one text."""

    text: str
    layers: str
    """Which layers share, as a `--layers` text."""
    stages: tuple[Stage, ...]
    """All of them, the fewest tokens first."""
    best: tuple[Stage, ...]
    """Those that none on as few tokens comes up to; at least `LAST`."""

    def beyond(self, tokens: float) -> float | None:
        """The change after so many tokens, in percent, if it fell on as over the last points (a power law): extrapolated.
        None where it doesn't fall.
        """
        x, y = ([math.log(getattr(stage, name)) for stage in self.best[-LAST:]] for name in ("tokens", "change"))
        slope, at_one = statistics.linear_regression(x, y)
        return math.exp(slope * math.log(tokens) + at_one) if slope < 0 else None

    @property
    def end(self) -> Stage:
        """The last measured one."""
        return self.best[-1]


def roads_of(rows: Sequence[Mapping]) -> list[Road]:
    """Of models that store less by themselves and drop nothing besides, those layouts that were trained to several lengths."""
    found: dict[tuple[str, str, float], list[Stage]] = {}
    for row in rows:
        tokens, share = number(row, "trained_tokens"), kept_share(row)
        change, error = (number(row, "perplexity_change_percent", key) for key in ("mean", "standard_error"))
        drops = words(row, "method").partition(" of ")[0] != UNFOLDED
        if drops or not changed_model(row) or not tokens or change is None or change <= 0:
            continue
        key = (words(row, "text"), words(row, "layers"), round(share or 0, 2))
        found.setdefault(key, []).append(Stage(tokens=tokens, change=change, error=error, name=words(row, "model")))
    roads = []
    for (text, layers, _), stages in found.items():
        ordered = sorted(stages, key=lambda stage: (stage.tokens, stage.change))
        best: list[Stage] = []
        for stage in ordered:
            if not best or (stage.change < best[-1].change and stage.tokens > best[-1].tokens):
                best.append(stage)
        roads.append(Road(text=text, layers=layers, stages=tuple(ordered), best=tuple(best)))
    return [road for road in roads if len(road.best) >= LAST]


def lengths_of(rows: Iterable[Mapping]) -> list[float]:
    """Lengths of passkey rows in tokens, ascending."""
    return sorted({length for row in rows if (length := number(row, "length_tokens")) is not None})


def found_keys(rows: Iterable[Mapping]) -> tuple[float, float]:
    """Keys found and keys asked for, all rows together; (0, 0) where nothing was tried."""
    pairs = [(number(row, "found"), number(row, "tries")) for row in rows]
    pairs = [(found, tries) for found, tries in pairs if found is not None and tries]
    return sum(found for found, _ in pairs), sum(tries for _, tries in pairs)


def unfolded_share(rows: Iterable[Mapping], length: float) -> float | None:
    """Share of the keys that the unfolded model finds at one length; None where it wasn't asked."""
    asked = (row for row in rows if family_of(row) == UNFOLDED and number(row, "length_tokens") == length)
    found, tries = found_keys(asked)
    return found / tries if tries else None


def worth_showing(rows: Iterable[Mapping], length: float) -> bool:
    """Whether the unfolded model finds enough keys at this length, 80 %, for misses to mean anything."""
    share = unfolded_share(rows, length)
    return share is None or share >= 0.8


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
        return [_perplexity(run) for run in self.runs]

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
    best = min((sorted(runs, key=_perplexity) for runs in rates.values()), key=lambda runs: _perplexity(runs[0]))
    seeds = Counter(seed for runs in rates.values() for seed in {number(run, "seed") for run in runs} - {None})
    tuning = frozenset(seed for seed, times in seeds.items() if times > 1)
    kv_bytes = number(best[0], "kv_bytes_per_token")
    return Model(recipe=recipe, kv_bytes=kv_bytes, runs=tuple(best), rates=len(rates), tuning_seeds=tuning)


def _perplexity(row: Mapping) -> float:
    return number(row, "validation_perplexity")


def frontier(models: Sequence[Model]) -> list[Model]:
    """Those that no model of as few bytes beats, most bytes first."""
    kept: list[Model] = []
    for one in sorted(models, key=lambda one: (one.kv_bytes, one.perplexity)):
        if not kept or one.perplexity < kept[-1].perplexity:
            kept.append(one)
    return kept[::-1]


def loss_runs(models: Sequence[Model]) -> list[Run]:
    """The losses of the best runs over their tokens, of as many models as there are colours: those that nothing beats first."""
    best, runs = frontier(models), []
    for one in [*best, *(one for one in models if one not in best)]:
        curve = one.row.get("curve") if isinstance(one.row.get("curve"), Mapping) else {}
        runs.append(Run(name=one.recipe, points=known_pairs(numbers_of(curve, "tokens"), numbers_of(curve, "loss"))))
    return [run for run in runs if run.points][:NUM_COLOURS]


def about_models(models: Sequence[Model]) -> str:
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

    def _seeds(self, but: frozenset[float] = frozenset()) -> list[tuple[float, float]]:
        both = [{number(run, "seed"): _perplexity(run) for run in one.runs} for one in (self.shared, self.other)]
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
