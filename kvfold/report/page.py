"""The page: every result of a folder as one HTML file that needs nothing else, neither scripts nor fonts nor a network.

What stands on it is composed here and in sections.py; how it looks is page.html, which is filled in by name.
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from kvfold.report.explain import methods_section, words_section
from kvfold.report.groups import Group, group_results
from kvfold.report.markup import Markup, join, tag
from kvfold.report.numbers import amount, count
from kvfold.report.results import number, read_results, words, write_whole
from kvfold.report.sections import SECTIONS
from kvfold.report.series import colours_of

LEAD = (
    "A language model keeps a key and a value for every token it has read, in every layer: its KV cache. The cache grows "
    "with the text, and memory runs out before time does. Folding means keeping less of it. This page shows what was "
    "measured: the memory that each way of folding frees, and what it costs."
)


def write_page(results: Path, out: Path) -> Path:
    """Read a folder of results (or one file) and write the page; it is complete or not there at all.

    ValueError, one line, if nothing readable is there.
    """
    found, problems = read_results(Path(results))
    groups = group_results(found)
    colours = colours_of(found)
    sections = [SECTIONS[group.kind](group, colours) for group in groups]
    template = Template(files("kvfold.report").joinpath("page.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=join([_title(groups)]),
        heading=join([_title(groups)]),
        lead=join([LEAD]),
        facts=_facts(groups),
        sections=join([*sections, methods_section(colours), words_section()]),
        footer=_footer(groups, problems),
    )
    return write_whole(Path(out), page)


def _models(groups: Sequence[Group]) -> list[str]:
    return list(dict.fromkeys(group.model for group in groups if group.model))


def _title(groups: Sequence[Group]) -> str:
    models = _models(groups)
    if len(models) == 1:
        return f"The cache of {models[0]}, folded"
    return f"The caches of {len(models)} models, folded" if models else "A cache, folded"


def _facts(groups: Sequence[Group]) -> Markup:
    """Model, machine, software and day: one line for each that is known, every distinct value of it."""
    lines = {"Model": _model, "Machine": _machine, "Software": _software, "Measured": _measured}
    parts = []
    for name, say in lines.items():
        said = list(dict.fromkeys(text for group in groups for source in group.sources if (text := say(source.data))))
        if name == "Measured":
            said = sorted({said[0], said[-1]} if said else [])
            said = [" to ".join(sorted(said))] if said else []
        parts.extend([tag("dt", name), *(tag("dd", text) for text in said or ["not recorded"])])
    return tag("dl", *parts, class_="facts")


def _model(data) -> str:
    parameters = number(data, "model", "parameters")
    size = f"{amount(parameters)} parameters" if parameters else ""
    return "; ".join(filter(None, [words(data, "model", "name"), size, words(data, "model", "note")]))


def _machine(data) -> str:
    about = data.get("environment")
    cores, threads = number(about, "cores"), number(about, "threads")
    device = words(about, "device")
    return ", ".join(
        filter(
            None,
            [
                words(about, "cpu"),
                f"{count(cores)} cores" if cores else "",
                f"{count(threads)} threads" if threads else "",
                f"device {device}" if device else "",
                words(about, "dtype"),
            ],
        )
    )


def _software(data) -> str:
    about = data.get("environment")
    names = [f"{name} {words(about, name)}" for name in ("kvfold", "torch", "transformers", "python") if words(about, name)]
    commit = words(data, "git_commit")
    return ", ".join([*names, f"commit {commit[:12]}{'-dirty' if commit.endswith('-dirty') else ''}"] if commit else names)


def _measured(data) -> str:
    return words(data, "created")[:10]


def _footer(groups: Sequence[Group], problems: Sequence[str]) -> Markup:
    names = [source.name for group in groups for source in group.sources]
    parts = [
        tag("p", f"Made by kvfold from {', '.join(names)}. What is said to be not measured was not: nothing is estimated."),
        tag("p", "This page is a single file. It runs no scripts and loads nothing."),
    ]
    if problems:
        parts.append(tag("p", f"Left out: {'; '.join(problems)}."))
    return join(parts)
