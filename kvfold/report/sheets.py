"""The tables behind the pictures, as plain text cells: made once, printed by the terminal and by the page alike; and the maps of
what single layers and heads hold, whose cells are a table and a picture too.

Which columns a table has and what they mean stands in sheets.toml; here is how cells are written, and the tables whose columns
depend on the rows. At the end, those of the terminal (rich): each takes a result's JSON object, as written or just measured.
"""

import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from typing import Any

from rich.table import Table
from rich.text import Text

from kvfold.report import series
from kvfold.report.results import (
    MISSING,
    count,
    difference,
    grid,
    middle,
    number,
    percent,
    rows_of,
    size,
    three,
    times,
    words,
)

KEPT_NAME, COMPRESSION_NAME = "share of the tokens kept", "compression"
MOST_LINES = 200
"""Lines of a table over time; longer ones show evenly spaced lines, and say so."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column: what stands above it; what writes the cell of a row, which is what the table is of, mostly a result's; what it
    means, "" where the head says it all; whether it is set to the left, as words are; whether a terminal of ordinary width shows
    it too; whether it is left out where no row says anything.
    """

    head: str
    cell: Callable[[Any], str]
    note: str = ""
    is_text: bool = False
    brief: bool = True
    optional: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """One table."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    """Cells, as many in a row as there are columns."""


def sheet_of(title: str, columns: Sequence[Column], rows: Iterable[Any], missing: str = MISSING) -> Sheet:
    """A line for each row; `missing`: what stands for a cell that was not measured."""
    rows = list(rows)
    shown = tuple(one for one in columns if not one.optional or any(one.cell(row) != MISSING for row in rows))
    cells = ((one.cell(row) for one in shown) for row in rows)
    lines = tuple(tuple(missing if cell == MISSING else cell for cell in line) for line in cells)
    return Sheet(title=title, columns=shown, rows=lines)


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(files("kvfold.report").joinpath("sheets.toml").read_text(encoding="utf-8"))


def _number(say: Callable[[float | None], str], keys: Sequence[str], row: Any) -> str:
    return say(number(getattr(row, "row", row), *keys))


def pair(row: Mapping, *keys: str) -> tuple[float | None, float | None]:
    """Mean and standard error of a difference."""
    return number(row, *keys, "mean"), number(row, *keys, "standard_error")


def _trained(row: Mapping) -> str:
    if (tokens := number(row, "trained_tokens")) is not None:
        return f"{count(tokens)} tokens"
    trained = row.get("trained")
    if trained is True and row.get("layers") and words(row, "method").startswith(series.UNFOLDED):
        return "converted only"
    return ("yes" if trained else "no") if isinstance(trained, bool) else MISSING


def _score(row: Mapping) -> str:
    value, error = number(row, "value"), number(row, "standard_error")
    return three(value) if value is None or error is None else f"{three(value)} ± {three(error)}"


def point_name(row: Mapping) -> str:
    """`8 x 1,024`, and how it differs from the plain case: padded rows, a method that folds."""
    name = words(row, "point").replace(" x ", " × ") or "unnamed point"
    method = words(row, "method")
    extras = [method] if method and method != series.UNFOLDED else []
    return ", ".join([name, *extras, *(["left-padded rows"] if row.get("padded") is True else [])])


def step_name(row: Mapping) -> str:
    """`DMS 128, all weights, 1 × 1,024 tokens`."""
    sizes = [count(value) for key in ("batch_sequences", "sequence_tokens") if (value := number(row, key))]
    trains = _trains(row).replace(MISSING, "")
    return ", ".join(filter(None, [series.label_of(row), trains, f"{' × '.join(sizes)} tokens" if sizes else ""]))


def _trains(row: Mapping) -> str:
    named = {"full": "all weights", "lora": "a low-rank addition", "adapter": "gates alone"}
    return _named(row, "trains", named)


def _named(row: Mapping, key: str, names: Mapping[str, str]) -> str:
    return names.get(words(row, key), words(row, key)) or MISSING


def _kept(of: Callable[[list[float]], float], say: Callable[[float | None], str], row: Mapping) -> str:
    kept = [cell for line in grid(row, "kept") for cell in line if cell is not None and cell >= 0]
    return say(of(kept) if kept else None)


def _mean(values: Sequence[float], shown: Callable[[float], str] = "{:.2f}".format, none: str = MISSING) -> str:
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


def _owners(one: series.Model) -> str:
    counts = [number(one.row, key) for key in ("owners", "num_layers")]
    return MISSING if None in counts else " of ".join(map(count, counts))


def _published(of: series.Model | series.Pair, key: str = "paper_perplexity") -> str:
    """Of the published models: the perplexity, or difference and share of two."""
    if isinstance(of, series.Pair):
        ours, theirs = (number(one.row, key) for one in (of.shared, of.other))
        return f"{_signed(ours - theirs)}, {_percent(ours / theirs - 1)}" if ours and theirs else "none"
    value = number(of.row, key)
    return "none" if value is None else f"{value:.2f}"


_LOSSES = {"reverse": "KL of student from teacher", "forward": "KL of teacher from student", "none": "next token"}
WRITERS: dict[str, Callable[..., str]] = {
    **{write.__name__: partial(_number, write) for write in (count, percent, size, three, times)},
    "words": lambda keys, row, otherwise="unnamed": words(getattr(row, "row", row), *keys) or otherwise,
    # A median with the smallest and largest behind it.
    "runs": lambda keys, row, unit="": middle(*(number(row, *keys, edge) for edge in ("min", "median", "max")), unit),
    "difference": lambda keys, row, unit="": difference(*pair(row, *keys), unit),
    "label": series.label_of, "trained": _trained, "score": _score, "point": point_name, "trains": _trains,
    "loss": lambda row: _named(row, "loss", _LOSSES), "kept_mean": partial(_kept, series.mean_of, three),
    "kept_least": partial(_kept, min, count), "kept_most": partial(_kept, max, count),
    "rows_found": lambda row: f"{count(number(row, 'rows'))}{' or more' if row.get('stopped') else ''}",
    # Of models from scratch, and of pairs of them.
    "rates": lambda one: count(one.rates), "perplexities": lambda one: _mean(one.perplexities), "owners": _owners,
    "published": _published,
    "seeds": lambda of: count(len(of.runs if isinstance(of, series.Model) else of.differences)),
    "shared": lambda pair: pair.shared.recipe, "other": lambda pair: pair.other.recipe,
    "bytes": lambda pair: f"{pair.other.kv_bytes / pair.shared.kv_bytes:.2f}×",
    "differences": lambda pair: _mean(pair.differences, _signed),
    "fresh": lambda pair: _mean(pair.fresh_differences, _signed, "none"),
    "shares": lambda pair: _mean(pair.shares, _percent),
    "tuned": lambda pair: _published(pair, "paper_tuned_perplexity"),
}  # fmt: skip
"""How a cell is written, by the name that sheets.toml has for it."""


def known_sheet(kind: str, rows: Iterable[Any], title: str = "") -> Sheet:
    """A table of sheets.toml."""
    about = _tables()[kind]
    return sheet_of(title or about["title"], columns_of(kind), rows, about.get("missing", MISSING))


def columns_of(kind: str) -> list[Column]:
    """The columns of a table of sheets.toml."""
    found = []
    for about in _tables()[kind]["columns"]:
        keys, how = about.get("of", "").split("."), {key: about[key] for key in ("unit", "otherwise") if key in about}
        cell = partial(WRITERS[about["write"]], *((keys,) if "of" in about else ()), **how)
        options = about.get("text", False), about.get("brief", True), about.get("optional", False)
        found.append(Column(about["head"], cell, about.get("note", ""), *options))
    return found


def pairs_sheet(models: Sequence[series.Model]) -> Sheet | None:
    """A line for each model with shared layers beside one without; None where there is none."""
    pairs = series.pairs_of(models)
    return known_sheet("pairs", pairs) if pairs else None


def passkey_sheet(rows: Sequence[Mapping], labels: Mapping[str, str]) -> Sheet:
    """Keys found per method, length and depth; `labels` gives the name of a method's text form."""
    method = Column("method", lambda row: labels.get(words(row, "method"), series.label_of(row)), is_text=True)
    return sheet_of("Passkey retrieval", [method, *columns_of("passkey")], rows)


def method_labels(rows: Sequence[Mapping]) -> dict[str, str]:
    """The name of each method's text form, for rows that carry the text form alone."""
    return {words(row, "method"): series.label_of(row) for row in rows if words(row, "method")}


def curve_sheet(rows: Sequence[Mapping]) -> Sheet:
    """The steps of a run; what no step says is no column, and a long run shows evenly spaced steps."""
    told = [row for row in rows if number(row, "step") is not None]
    title = "Steps" + _every(told, " (every {}th, and the last)")
    return known_sheet("curve", thinned(told), title)


def thinned(values: Sequence) -> list:
    """At most about `MOST_LINES` of them, evenly spaced, the last included."""
    firsts = [part[0] for part in series.stretches(list(values), MOST_LINES)]
    return firsts if not values or firsts[-1] is values[-1] else [*firsts, values[-1]]


def _every(values: Sequence, said: str) -> str:
    every = -(-len(values) // MOST_LINES)
    return said.format(every) if every > 1 else ""


def memory_sheet(rows: Sequence[Mapping]) -> Sheet:
    """Bytes held, a line per number of tokens, a column per method."""
    return _over_tokens(
        "Memory over time", [(series.label_of(row), dict(series.memory_points(row))) for row in rows], size
    )


def growth_sheet(rows: Sequence[Mapping]) -> Sheet:
    """Tokens kept while a text comes in, a line per number of tokens, three columns per method."""
    columns = [
        (f"{series.label_of(row)}, {name}", dict(zip(one["tokens"], one[name], strict=True)))
        for row in rows if (one := series.growth_of(row)) is not None
        for name in ("mean", "least", "most")
    ]  # fmt: skip
    return _over_tokens("Tokens kept as the text comes in, over all heads", columns, three)


def _over_tokens(
    title: str, columns: Iterable[tuple[str, Mapping[float, float | None]]], say: Callable[[float | None], str]
) -> Sheet:
    """A column for each name, a line for each number of tokens that any of them has."""
    tokens = sorted({at for _, points in columns for at in points})
    heads = [Column("tokens seen", count)]
    heads += [Column(name, lambda at, points=points: say(points.get(at))) for name, points in columns]
    return sheet_of(title + _every(tokens, " (every {}th measured point, and the last)"), heads, thinned(tokens))


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadMap:
    """One row's map: layers that keep a cache, ascending; what is coloured and what cells say, [owner][head]; what values are."""

    row: Mapping
    owners: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]
    hovers: tuple[tuple[str, ...], ...]
    value_name: str


def head_map(row: Mapping, *, of_compression: bool = False) -> HeadMap | None:
    """The map of one row: its score or the share of tokens kept, or tokens seen over tokens kept. None where it has neither.
    -1 kept stands for a head that a layer lacks.
    """
    kept, seen = grid(row, "kept"), number(row, "seen_tokens")
    score = [] if of_compression else grid(row, "score")
    shares = [[cell / seen if cell is not None and cell >= 0 and seen else None for cell in line] for line in kept]
    name = (words(row, "value_name") or "score") if score else KEPT_NAME
    values = score or shares
    if of_compression:
        name, values = COMPRESSION_NAME, [[1 / share if share else None for share in line] for line in shares]
    if not any(values) or (of_compression and not any(map(any, values))):
        return None
    listed = row.get("owners")
    fits = isinstance(listed, list) and len(listed) >= len(values) and all(isinstance(x, int) for x in listed)
    owners = tuple(listed[: len(values)] if fits else range(len(values)))

    def hover(at: int, head: int) -> str:
        said = []
        if (cell := _at(kept, at, head)) is not None and cell >= 0:
            said.append(f"{count(cell)}{f' of {count(seen)}' if seen else ''} kept")
        if (cell := _at(score, at, head)) is not None:
            said.append(f"{name} {three(cell)}")
        more = f": {times(values[at][head])}" if of_compression else ""
        return f"layer {owners[at]}, head {head}: {', '.join(said) or 'none'}{more}"

    hovers = tuple(tuple(hover(at, head) for head in range(len(line))) for at, line in enumerate(values))
    return HeadMap(row=row, owners=owners, values=tuple(map(tuple, values)), hovers=hovers, value_name=name)


def _at(cells: list, line: int, column: int) -> float | None:
    return cells[line][column] if line < len(cells) and column < len(cells[line]) else None


def kept_sheets(rows: Iterable[Mapping]) -> list[Sheet]:
    """Of each method kept counts and, where it has them, scores: a line per layer, a column per head."""
    found = []
    for row, key in ((row, key) for row in rows for key in ("kept", "score")):
        one, cells, seen = head_map(row), grid(row, key), number(row, "seen_tokens")
        if one is None or not cells:
            continue
        say, name = (count, "tokens kept") if key == "kept" else (three, words(row, "value_name") or "score")
        columns = [Column("layer", lambda line: str(line[0]))]
        columns += [
            Column(f"head {head}", lambda line, head=head, say=say: _head_cell(line[1], head, say))
            for head in range(max(map(len, cells)))
        ]
        title = f"{series.label_of(row)}: {name}" + (f" of {count(seen)} seen" if key == "kept" and seen else "")
        found.append(sheet_of(title, columns, zip(one.owners, cells, strict=False)))
    return found


def _head_cell(line: Sequence[float | None], head: int, say: Callable) -> str:
    absent = head >= len(line) or (say is count and line[head] == -1)
    return "–" if absent else say(line[head])


def uptraining_sheet(roads: Sequence[series.Road]) -> Sheet:
    """Models of one layout by the tokens they were trained on; the last line of each is extrapolated, and says so."""
    lines = []
    for road in roads:
        further = road.end.tokens * series.FURTHER
        said = [(one.name, one.tokens, difference(one.change, one.error, "%")) for one in road.stages]
        if (then := road.beyond(further)) is not None:
            said.append(("extrapolated, not measured", further, f"+{three(then)} %"))
        about = {"layers": road.layers, "text": road.text}
        lines += [about | {"model": model, "tokens": tokens, "change": change} for model, tokens, change in said]
    return known_sheet("uptraining", lines)


def known_table(kind: str, title: str = "") -> Callable[..., Table]:
    """What makes a table of sheets.toml of a result; `brief` leaves out what doesn't fit a terminal of ordinary width."""

    def table(result: Mapping, brief: bool = True) -> Table:
        # Scores stand beside the rows of a quality result.
        return rich_table(known_sheet(kind, rows_of(result, kind if kind in result else "rows"), title), brief=brief)

    return table


def passkey_table(result: Mapping) -> Table:
    """Passkeys found, for a quality result that has them."""
    return rich_table(passkey_sheet(rows_of(result, "passkey"), method_labels(rows_of(result))))


def rich_table(sheet: Sheet, brief: bool = False) -> Table:
    """Any sheet as a rich table."""
    shown = [index for index, column in enumerate(sheet.columns) if column.brief or not brief]
    table = Table(title=Text(sheet.title), title_justify="left", header_style="bold")
    for index in shown:
        column = sheet.columns[index]
        table.add_column(Text(column.head), justify="left" if column.is_text else "right", overflow="fold")
    for row in sheet.rows:
        table.add_row(*(Text(row[index]) for index in shown))
    return table
