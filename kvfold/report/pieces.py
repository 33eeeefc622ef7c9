"""Pieces of the page that every section uses: a figure in two widths, a table behind it, where it comes from."""

from collections import Counter
from collections.abc import Callable, Sequence

from kvfold.report.groups import Group
from kvfold.report.markup import Markup, join, tag
from kvfold.report.numbers import MISSING, count
from kvfold.report.results import Result, number, rows_of, words
from kvfold.report.sheets import Sheet

WIDE, NARROW = 860.0, 350.0
"""Pixels of a picture on a page of ordinary width, and on a phone, where it is drawn anew so that letters keep their size."""

_SOURCES_SHOWN = 3
"""Files that a section names at once."""
NOTHING = Markup("<p>Not measured.</p>")


def section(title: str, *parts: str | None) -> Markup:
    """A part of the page under its heading."""
    return tag("section", tag("h2", title), *parts)


def titled(title: str, group: Group) -> str:
    """A heading that names the model where a page is about several."""
    return f"{title}: {group.model or 'unnamed model'}" if group.is_one_of_many else title


def figure(
    draw: Callable[[float], Sequence[Markup]], caption: Markup, wide: float = WIDE, class_: str | None = None
) -> Markup:
    """The pictures that `draw(width)` gives, side by side as far as there is room, and their caption."""
    pair = [
        tag("div", *(tag("div", one, class_="panel") for one in draw(width)), class_=f"panels {name}")
        for width, name in ((wide, "wide"), (NARROW, "narrow"))
    ]
    return tag("figure", *pair, tag("figcaption", caption), class_=class_)


def drawn(draw: Callable[[float], Markup | None], caption: Markup) -> Markup:
    """A figure of one picture, or a word that there is none."""
    return NOTHING if draw(WIDE) is None else figure(lambda width: [draw(width)], caption)


def behind(*sheets: Sheet) -> Markup:
    """The tables behind a picture, folded away until asked for."""
    several = len(sheets) > 1
    tables = [join([tag("h3", sheet.title) if several else None, table(sheet), notes(sheet)]) for sheet in sheets]
    return tag("details", tag("summary", "The tables behind it" if several else "The table behind it"), *tables)


def table(sheet: Sheet) -> Markup:
    """A sheet as an HTML table that scrolls sideways where it must; the first column stays."""
    sides = ["text" if column.is_text else None for column in sheet.columns]
    heads = [
        tag("th", column.head, scope="col", class_=side, title=column.note or None)
        for column, side in zip(sheet.columns, sides, strict=True)
    ]
    lines = [
        tag("tr", *(_cell(cell, side, first=not at) for at, (cell, side) in enumerate(zip(row, sides, strict=True))))
        for row in sheet.rows
    ]
    whole = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *lines), aria_label=sheet.title)
    return tag("div", whole, class_="scroll")


def _cell(text: str, side: str | None, first: bool) -> Markup:
    shown = tag("span", text, class_="missing") if text == MISSING else text
    return tag("th", shown, scope="row", class_=side) if first else tag("td", shown, class_=side)


def notes(sheet: Sheet) -> Markup | None:
    """What the columns mean, for readers who can't hover."""
    said = [tag("span", tag("b", column.head), f": {column.note} ") for column in sheet.columns if column.note]
    return tag("p", *said, class_="notes") if said else None


def source_line(group: Group) -> Markup:
    """Files, day, commit and the command that makes them again; more than a few are shown when asked for."""
    parts = []
    for source in group.sources:
        commit = words(source.data, "git_commit")
        about = [
            source.name,
            f"measured {source.created[:16].replace('T', ' ')}" if source.created else "",
            f"commit {short_commit(commit)}" if commit else "",
            _other_commits(source, commit),
        ]
        command = words(source.data, "command")
        again = [". To measure it again: ", command_text(command)] if command else ["."]
        parts.append(tag("p", ", ".join(filter(None, about)), *again, class_="source"))
    if group.replaced:
        parts.append(
            tag(
                "p",
                f"{count(group.replaced)} older rows are replaced by newer measurements of the same.",
                class_="source",
            )
        )
    if len(group.sources) > _SOURCES_SHOWN:
        return tag("details", tag("summary", f"The {count(len(group.sources))} files behind it"), *parts)
    return join(parts)


def _other_commits(source: Result, commit: str) -> str:
    """Rows that an earlier run had measured name the commit of that run."""
    lists = (rows_of(source.data, key) for key in ("rows", "passkey", "tasks"))
    commits = [words(row, "made", "git_commit") for rows in lists for row in rows]
    counted = Counter(one for one in commits if one and one != commit)
    return ", ".join(f"{count(rows)} rows at commit {short_commit(one)}" for one, rows in counted.items())


def short_commit(commit: str) -> str:
    """The first digits of a commit, and whether the files differed from it."""
    return commit[:10] + ("-dirty" if commit.endswith("-dirty") else "")


def command_text(command: str) -> Markup:
    """A command whose words are not broken at their hyphens."""
    return tag("code", join([piece for word in command.split() for piece in (tag("span", word), " ")][:-1]))


def protocol_text(group: Group) -> str:
    """`32 windows of 1,024 tokens, read 32 at a time`, as far as the result says."""
    windows, context, batch = (number(group.newest, "protocol", key) for key in ("windows", "context_tokens", "batch"))
    texts = [f"{count(windows)} windows" if windows else "", f"of {count(context)} tokens" if context else ""]
    said = " ".join(filter(None, texts))
    return said + (f", {count(batch)} at a time" if batch and said else "")
