"""The page: every result of a folder as one HTML file that needs nothing else, neither scripts nor fonts nor a network.

What stands on it is composed here and in sections.py; how it looks is page.html, which is filled in by name.
"""

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from kvfold.data.whole_file import write_whole_file
from kvfold.report.explain import methods_section, words_section
from kvfold.report.groups import Group, group_results
from kvfold.report.markup import Markup, join, tag
from kvfold.report.numbers import amount, count
from kvfold.report.pieces import short_commit
from kvfold.report.results import Result, number, read_results, words
from kvfold.report.sections import SECTIONS
from kvfold.report.series import colours_of

LEAD = (
    "A language model keeps a key and a value for every token it has read, in every layer: its KV cache. The cache grows "
    "with the text, and memory runs out before time does. Folding means keeping less of it. This page shows what was "
    "measured: the memory that each way of folding frees, and what it costs."
)
MOST_FACTS = 4
"""Lines of one fact at the head of the page."""


def write_page(results: Path, out: Path) -> Path:
    """Read a folder of results (or one file) and write the page; it is complete or not there at all.

    UserError, one line, if nothing readable is there.
    """
    return write_whole_file(Path(out), page_of(*read_results(Path(results))))


def page_of(found: list[Result], problems: Sequence[str] = ()) -> str:
    """The page of these results; `problems`: a line for each file that was none."""
    groups = group_results(found)
    colours = colours_of(found)
    sections = [SECTIONS[group.kind](group, colours) for group in groups]
    template = Template(files("kvfold.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=join(_title(groups)),
        heading=_heading(groups),
        lead=join([LEAD]),
        facts=_facts(groups),
        sections=join([*sections, methods_section(colours), words_section()]),
        footer=_footer(groups, problems),
    )


def _title(groups: Sequence[Group]) -> tuple[str, str, str]:
    """The page's title in three pieces, a model's name in the middle where there is one model."""
    models = sorted(
        {name for group in groups for source in group.sources if (name := words(source.data, "model", "name"))}
    )
    if len(models) == 1:
        return "The cache of ", models[0], ", folded"
    return (f"The caches of {len(models)} models, folded" if models else "A cache, folded"), "", ""


def _heading(groups: Sequence[Group]) -> Markup:
    """The title; a model's name in it is not broken at its hyphens."""
    before, name, after = _title(groups)
    return join([before, tag("span", name) if name else None, after])


def _facts(groups: Sequence[Group]) -> Markup:
    """Model, machine, software and days: one line for each that is known."""
    files = [source.data for group in groups for source in group.sources]
    days = sorted({day for data in files if (day := words(data, "created")[:10])})
    lines = {
        "Model": _distinct(map(_model, files)),
        "Machine": _distinct(map(_machine, files)),
        "Software": _distinct(map(_software, files)),
        "Measured": [" to ".join(dict.fromkeys([days[0], days[-1]]))] if days else [],
    }
    parts = [
        join([tag("dt", name), *(tag("dd", line) for line in said or ["not recorded"])]) for name, said in lines.items()
    ]
    return tag("dl", *parts, class_="facts")


def _distinct(lines: Iterable[str]) -> list[str]:
    """Every line once, of many the first few; one that says no more than the beginning of another is left out."""
    known = sorted(set(filter(None, lines)))
    said = [line for line in known if not any(other != line and other.startswith(line) for other in known)]
    return said if len(said) <= MOST_FACTS else [*said[: MOST_FACTS - 1], f"and {len(said) - MOST_FACTS + 1} more"]


def _model(data: Mapping) -> str:
    parameters = number(data, "model", "parameters")
    size = f"{amount(parameters)} parameters" if parameters else ""
    return "; ".join(filter(None, [words(data, "model", "name"), size, words(data, "model", "note")]))


def _machine(data: Mapping) -> str:
    about = data.get("environment")
    counted = [f"{count(value)} {name}" for name in ("cores", "threads") if (value := number(about, name))]
    device = words(about, "device")
    said = [words(about, "cpu"), *counted, f"device {device}" if device else "", words(about, "dtype")]
    return ", ".join(filter(None, said))


def _software(data: Mapping) -> str:
    about, commit = data.get("environment"), words(data, "git_commit")
    names = ("kvfold", "torch", "transformers", "python")
    said = [f"{name} {version}" for name in names if (version := words(about, name))]
    return ", ".join(said + ([f"commit {short_commit(commit)}"] if commit else []))


def _footer(groups: Sequence[Group], problems: Sequence[str]) -> Markup:
    names = [source.name for group in groups for source in group.sources]
    parts = [
        tag("p", f"Made by kvfold from {', '.join(names)}. A figure that was not measured says so; none is estimated."),
        tag("p", "This page is a single file. It runs no scripts and loads nothing."),
    ]
    if problems:
        parts.append(tag("p", f"Left out: {'; '.join(problems)}."))
    return join(parts)
