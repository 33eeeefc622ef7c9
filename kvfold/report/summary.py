"""The short table that opens the quality section: a line per method, its share of the cache as a bar, what it costs."""

from collections.abc import Mapping, Sequence

from kvfold.report.groups import Group
from kvfold.report.markup import Markup, tag
from kvfold.report.numbers import MISSING, count, difference, percent, size, three
from kvfold.report.pictures.passkey import found_keys
from kvfold.report.results import number, words
from kvfold.report.series import UNFOLDED, family_of, kept_share, label_of, texts_of


def summary_table(group: Group, colours: Mapping[str, int]) -> Markup:
    """Methods by share of the cache, texts side by side, passkeys all together; the page's first answer."""
    texts = texts_of(group.rows)
    methods: dict[str, list[Mapping]] = {}
    for row in group.rows:
        methods.setdefault(label_of(row), []).append(row)
    lines = []
    for label, rows in methods.items():
        by_text = {words(row, "text"): row for row in rows}
        cells = [tag("td", _change(by_text.get(text))) for text in texts]
        if group.passkey:
            cells.append(tag("td", _keys(group.passkey, words(rows[0], "method"))))
        lines.append(tag("tr", tag("th", label, scope="row", class_="text"), tag("td", _bar(rows, colours)), *cells))
    head = tag("thead", *_heads(texts, bool(group.passkey)))
    return tag("div", tag("table", head, tag("tbody", *lines), aria_label="Methods in short"), class_="scroll short")


def _heads(texts: Sequence[str], has_passkey: bool) -> list[Markup]:
    """Two lines: what is measured, and on which text."""
    first = [tag("th", "method", scope="col", class_="text", rowspan=2), tag("th", "cache kept", scope="col", class_="text", rowspan=2)]
    first.append(tag("th", "perplexity", scope="colgroup", colspan=len(texts), class_="over"))
    if has_passkey:
        first.append(tag("th", "passkeys", scope="col", rowspan=2))
    return [tag("tr", *first), tag("tr", *(tag("th", text or "unnamed text", scope="col") for text in texts))]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _bar(rows: Sequence[Mapping], colours: Mapping[str, int]) -> Markup:
    share = _mean([kept_share(row) for row in rows])
    if share is None:
        return tag("span", MISSING, class_="missing")
    fill = tag("i", style=f"width:{min(100.0, max(0.0, 100 * share)):.1f}%")
    held = _mean([number(row, "allocated_bytes") for row in rows])
    said = percent(share) + (f", {size(held)}" if held is not None else "")
    colour = colours.get(family_of(rows[0]), 0)
    return tag("div", tag("span", fill, class_=f"track c{colour}"), tag("span", said), class_="share")


def _change(row: Mapping | None) -> Markup:
    mean = number(row, "perplexity_change_percent", "mean")
    if row is not None and family_of(row) == UNFOLDED and number(row, "perplexity") is not None:
        return tag("span", three(number(row, "perplexity")))
    said = difference(mean, number(row, "perplexity_change_percent", "standard_error"), "%")
    return tag("span", said, class_="missing" if mean is None else None)


def _keys(passkey: Sequence[Mapping], method: str) -> Markup:
    found, tries = found_keys(row for row in passkey if words(row, "method") == method)
    return tag("span", f"{count(found)} of {count(tries)}" if tries else MISSING, class_=None if tries else "missing")
