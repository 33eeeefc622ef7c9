"""The page: every result of a folder as one HTML file that needs nothing else, neither scripts nor fonts nor a network.

What it says, how it looks and which tables and pictures a section has stands in templates/, a file a section; everything that
comes from a result file is escaped there. Here is what templates ask for.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from inspect import getdoc
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kvfold.errors import need_packages
from kvfold.methods.base import Method
from kvfold.methods.registry import method_class
from kvfold.record import write_whole_file
from kvfold.report import pictures, series, sheets
from kvfold.report.drawing import COLOURS, svg
from kvfold.report.results import (
    MISSING,
    Group,
    Result,
    amount,
    count,
    difference,
    group_results,
    number,
    percent,
    read_results,
    rows_of,
    size,
    three,
    tick,
    times,
    words,
)

WIDE, NARROW = 860.0, 350.0
"""Pixels of a picture that stands alone, and on a phone, where it is drawn anew so that letters keep their size."""
MOST_FACTS = 4
"""Lines of one fact at the head of the page."""
KEPT, GONE, MERGED, WAITING = STATES = "kgmw"
"""Letters of `states`: has an entry; nothing is left; part of the entry of a token after it; has one that can't go yet."""
FIRST_TOKENS, MOST_TOKENS = 320, 2000
"""Of a text, those that are seen at once, and those that the page has at all."""
QUARTER = 0.3
"""Largest share of the cache that counts as about a quarter: pages are whole and H2O keeps scores."""


def write_page(results: Path, out: Path) -> Path:
    """Read a folder of results (or one file) and write the page; it is complete or not there at all.

    UserError, one line, if nothing readable is there or matplotlib is missing.
    """
    need_packages("matplotlib", extra="report", what="the page")
    return write_whole_file(Path(out), page_of(*read_results(Path(results))))


def page_of(found: list[Result], problems: Sequence[str] = ()) -> str:
    """The page of these results; `problems`: a line for each file that was none."""
    groups, colours = group_results(found), series.colours_of(found)
    files = [source.data for group in groups for source in group.sources]
    return (
        _templates()
        .get_template("page.html")
        .render(
            palette=COLOURS,
            models=sorted({name for data in files if (name := words(data, "model", "name"))}),
            facts=_facts(files),
            groups=groups,
            colours=colours,
            methods=[spec for family in colours if (spec := _spec(family)) is not None],
            names=[source.name for group in groups for source in group.sources],
            problems=problems,
        )
    )


@cache
def _templates() -> Environment:
    """The templates, and what they may ask for."""
    loader = PackageLoader("kvfold.report")
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    rooms = {"pictures": pictures, "series": series, "sheets": sheets, "MISSING": MISSING, "STATES": STATES}
    asked = (best_way, draw, head_texts, other_commits, passkey_grids, protocol_text, side_by_side, summary)
    asked += (count, number, percent, times, words)
    environment.globals |= rooms | {one.__name__: one for one in asked}
    environment.filters |= {
        "head_map": sheets.head_map, "compression_map": partial(sheets.head_map, of_compression=True),
        "commit": short_commit, "coded": _coded, "first_large": lambda text: text[:1].upper() + text[1:],
    }  # fmt: skip
    return environment


def draw(
    picture: Callable[..., Any], *about: Any, spoken: str, wide: float = WIDE, title: str = "", **options: Any
) -> list[dict[str, Any]]:
    """A picture of pictures.py, as a list of one, drawn for a wide page and for a phone, or once where it fits both; none where
    there is nothing to draw. `spoken`: what it shows.
    """
    of_width = partial(picture, *about, **options)
    figure = of_width(width=wide)
    if figure is None:
        return []
    spoken += ". The table below has the numbers."
    narrow = svg(of_width(width=NARROW), spoken) if wide > NARROW + 10 else None
    return [{"title": title, "wide": svg(figure, spoken), "narrow": narrow}]


def side_by_side(pictures: Sequence) -> float:
    """The width of one picture of so many; of more than two, three share a line."""
    return {1: 760.0, 2: 500.0}.get(len(pictures), 354.0)


def summary(group: Group, colours: Mapping[str, int]) -> list[dict[str, Any]]:
    """The page's first answer, a line a method: its share of the cache, what it costs on each text, passkeys all together."""
    lines = []
    passkey = [row for row in group.passkey if series.worth_showing(group.passkey, number(row, "length_tokens"))]
    for label, rows in _by_method(group.rows).items():
        by_text = {words(row, "text"): row for row in rows}
        found, tries = series.found_keys(row for row in passkey if words(row, "method") == words(rows[0], "method"))
        share, held = (
            series.mean_of(map(series.kept_share, rows)),
            series.mean_of(number(row, "allocated_bytes") for row in rows),
        )
        lines.append({
            "label": label, "colour": colours.get(series.family_of(rows[0]), 0), "share": share,
            "said": percent(share) + (f", {size(held)}" if held is not None else ""),
            "changes": [_change(by_text.get(text)) for text in series.texts_of(group.rows)],
            "found": (f"{count(found)} of {count(tries)}" if tries else MISSING) if passkey else None,
        })  # fmt: skip
    return lines


def _by_method(rows: Iterable[Mapping]) -> dict[str, list[Mapping]]:
    found: dict[str, list[Mapping]] = {}
    for row in rows:
        found.setdefault(series.label_of(row), []).append(row)
    return found


def _change(row: Mapping | None) -> str:
    if row is not None and series.family_of(row) == series.UNFOLDED and number(row, "perplexity") is not None:
        return three(number(row, "perplexity"))
    return difference(*sheets.pair(row or {}, "perplexity_change_percent"), "%")


def best_way(group: Group) -> dict[str, Any] | None:
    """The method with the lowest perplexity at about a quarter of the cache; None where none was that small. Only methods that
    were measured on every text are compared, by the mean of their changes.
    """

    def cost(row: Mapping) -> float | None:
        share = series.kept_share(row)
        return number(row, "perplexity_change_percent", "mean") if share is not None and share <= QUARTER else None

    texts = series.texts_of(group.rows)
    ways = _by_method(row for row in group.rows if cost(row) is not None)
    whole = {label: rows for label, rows in ways.items() if set(series.texts_of(rows)) == set(texts)}
    if not whole:
        return None
    label, rows = min(whole.items(), key=lambda one: series.mean_of(map(cost, one[1])))
    changes = {words(row, "text"): _change(row) for row in rows}
    share = percent(max(map(series.kept_share, rows)))
    return {"label": label, "ways": len(whole), "share": share, "changes": [(text, changes[text]) for text in texts]}


def passkey_grids(group: Group) -> list[dict[str, Any]]:
    """Keys found, a grid a length with a line a method and a column a depth: (text, share) a cell."""
    labels, grids = sheets.method_labels(group.rows), []
    for length in (one for one in series.lengths_of(group.passkey) if series.worth_showing(group.passkey, one)):
        rows = [row for row in group.passkey if number(row, "length_tokens") == length]
        depths = sorted({depth for row in rows if (depth := number(row, "depth")) is not None})
        lines: dict[str, list[tuple[str, float | None]]] = {}
        for row in rows:
            cells = lines.setdefault(
                labels.get(words(row, "method"), series.label_of(row)), [("–", None)] * len(depths)
            )
            (found, tries), depth = series.found_keys([row]), number(row, "depth")
            if tries and depth is not None:
                cells[depths.index(depth)] = (f"{count(found)}/{count(tries)}", min(1.0, max(0.0, found / tries)))
        heads_ = [f"{tick(100 * depth)} %" for depth in depths]
        grids.append({"length": count(length), "depths": heads_, "lines": lines})
    return grids


def head_texts(row: Mapping, tokens: object) -> list[dict[str, Any]]:
    """What each head that a row tells about holds of a text, or one for all where they hold the same; those without a state a
    token are left out. `marks`: (state, characters, tokens) of each stretch in one state; a run that was merged is one stretch,
    its state `MERGED`. `parts`: those that are seen at once, and the rest. `states`: letters of those that occur.
    """
    listed = tokens[:MOST_TOKENS] if isinstance(tokens, list) else []
    pieces = [piece if isinstance(piece, str) else "" for piece in listed]
    told = [head for head in rows_of(row, "heads") if words(head, "states") and pieces]
    marks = [list(_stretches(words(head, "states")[:MOST_TOKENS], pieces)) for head in told]
    places = [f"layer {words(head, 'layer') or '?'}, head {words(head, 'head') or '?'}" for head in told]
    if len(told) > 1 and all(one == marks[0] for one in marks):
        # A method with one budget for all: the same page three times would say no more.
        told, marks, places = told[:1], marks[:1], ["every head asked for"]
    found = []
    for head, place, stretches in zip(told, places, marks, strict=True):
        passed = first = 0
        while first < len(stretches) and passed < FIRST_TOKENS:
            passed, first = passed + stretches[first][2], first + 1
        kept, seen = number(head, "kept_tokens"), number(row, "seen_tokens")
        more = f" ({times(seen / kept)})" if seen and kept and kept > 0 else ""
        name = place if kept is None or not seen else f"{place}: {count(kept)} of {count(seen)} kept{more}"
        states = "".join(sorted({state for state, _, _ in stretches}))
        found.append(
            {"name": name, "marks": stretches, "states": states, "parts": (stretches[:first], stretches[first:])}
        )
    return found


def _stretches(states: str, pieces: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    """Neighbours in one state together, but each merged run, which ends with the token that has the entry, alone; and cut
    where the first page ends, unless that is within a run. A token without characters is a dot.
    """
    state, text, tokens = "", "", 0
    for index, (letter, piece) in enumerate(zip(states, pieces, strict=False)):
        ends_run = state == MERGED and letter == KEPT
        cut = letter != state or (index == FIRST_TOKENS and state != MERGED)
        if cut and not ends_run and tokens:
            yield state, text, tokens
            text, tokens = "", 0
        state = state if ends_run else letter
        text, tokens = text + (piece or "·"), tokens + 1
        if ends_run:
            yield state, text, tokens
            state, text, tokens = "", "", 0
    if tokens:
        yield state, text, tokens


def _facts(files: Sequence[Mapping]) -> dict[str, list[str]]:
    """Model, machine, software and days: one line for each that is known."""
    days = sorted({day for data in files if (day := words(data, "created")[:10])})
    known = zip(*map(_about, files), strict=True) if files else ((), (), ())
    return {
        **{name: _distinct(lines) for name, lines in zip(("Model", "Machine", "Software"), known, strict=True)},
        "Measured": [" to ".join(dict.fromkeys([days[0], days[-1]]))] if days else ["not recorded"],
    }


def _about(data: Mapping) -> tuple[str, str, str]:
    """Model, machine and software of one file, as far as it says."""
    about, parameters = data.get("environment"), number(data, "model", "parameters")
    weights = f"{amount(parameters)} parameters" if parameters else ""
    model = [words(data, "model", "name"), weights, words(data, "model", "note")]
    counted = [f"{count(value)} {name}" for name in ("cores", "threads") if (value := number(about, name))]
    device = f"device {device}" if (device := words(about, "device")) else ""
    machine = [words(about, "cpu"), *counted, device, words(about, "dtype")]
    versions = {name: words(about, name) for name in ("kvfold", "torch", "transformers", "python")}
    versions["commit"] = short_commit(words(data, "git_commit"))
    software = [f"{name} {version}" for name, version in versions.items() if version]
    return "; ".join(filter(None, model)), ", ".join(filter(None, machine)), ", ".join(software)


def _distinct(lines: Iterable[str]) -> list[str]:
    """Every line once, of many the first few; one that says no more than the beginning of another is left out."""
    known = sorted(set(filter(None, lines)))
    said = [line for line in known if not any(other != line and other.startswith(line) for other in known)]
    more = [f"and {len(said) - MOST_FACTS + 1} more"] if len(said) > MOST_FACTS else []
    return said[: MOST_FACTS - len(more)] + more or ["not recorded"]


def other_commits(source: Result) -> str:
    """Rows that an earlier run had measured name the commit of that run."""
    lists = (rows_of(source.data, key) for key in ("rows", "passkey", "tasks"))
    commits = [words(row, "made", "git_commit") for rows in lists for row in rows]
    counted = Counter(one for one in commits if one and one != words(source.data, "git_commit"))
    return ", ".join(f"{count(rows)} rows at commit {short_commit(one)}" for one, rows in counted.items())


def short_commit(commit: str) -> str:
    """The first digits of a commit, and whether the files differed from it."""
    return commit[:10] + ("-dirty" if commit.endswith("-dirty") else "")


def protocol_text(group: Group) -> str:
    """`32 windows of 1,024 tokens, read 32 at a time`, as far as the result says."""
    windows, context, batch = (number(group.newest, "protocol", key) for key in ("windows", "context_tokens", "batch"))
    texts = [f"{count(windows)} windows" if windows else "", f"of {count(context)} tokens" if context else ""]
    said = " ".join(filter(None, texts))
    return said + (f", {count(batch)} at a time" if batch and said else "")


def _spec(family: str) -> type[Method] | None:
    """The method's spec, which explains itself; None for one that this installation doesn't know, or whose package is broken."""
    try:
        return method_class(family)
    except (ValueError, ImportError, AttributeError):
        return None


def _coded(spec: type[Method]) -> Markup:
    """The first sentence of a method's docstring; words in backticks become code."""
    pieces = (getdoc(spec) or "").partition("\n\n")[0].replace("\n", " ").split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if at % 2 else piece for at, piece in enumerate(pieces)
    )
