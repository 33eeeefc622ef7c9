"""The short table that opens the quality section: a line per method, its share of the cache as a bar, what it costs."""

from collections.abc import Mapping, Sequence

from kvfold.report.groups import Group
from kvfold.report.markup import Markup, tag
from kvfold.report.numbers import MISSING, count, difference, percent, size, three
from kvfold.report.pictures.passkey import found_keys, lengths_of, worth_showing
from kvfold.report.results import number, words
from kvfold.report.series import UNFOLDED, family_of, kept_share, label_of, texts_of

QUARTER = 0.3
"""Largest share of the cache that counts as about a quarter: pages are whole and H2O keeps scores."""


def summary_table(group: Group, colours: Mapping[str, int]) -> Markup:
    """Methods by share of the cache, texts side by side, passkeys all together; the page's first answer."""
    texts = texts_of(group.rows)
    methods: dict[str, list[Mapping]] = {}
    for row in group.rows:
        methods.setdefault(label_of(row), []).append(row)
    passkey = _worth_showing(group.passkey)
    lines = []
    for label, rows in methods.items():
        by_text = {words(row, "text"): row for row in rows}
        cells = [tag("td", _change(by_text.get(text))) for text in texts]
        if passkey:
            cells.append(tag("td", _keys(passkey, words(rows[0], "method"))))
        lines.append(tag("tr", tag("th", label, scope="row", class_="text"), tag("td", _bar(rows, colours)), *cells))
    head = tag("thead", *_heads(texts, bool(passkey)))
    return tag(
        "div",
        tag("table", head, tag("tbody", *lines), aria_label="Methods in short"),
        class_="scroll short keys" if passkey else "scroll short",
    )


def short_answer(group: Group) -> Markup | None:
    """One sentence: the method with the lowest perplexity at about a quarter of the cache; None where none was that small.

    Only methods measured on every text are compared, by the mean of their changes.
    """
    texts = texts_of(group.rows)
    changes: dict[str, dict[str, Mapping]] = {}
    for row in group.rows:
        share = kept_share(row)
        if share is not None and share <= QUARTER and number(row, "perplexity_change_percent", "mean") is not None:
            changes.setdefault(label_of(row), {})[words(row, "text")] = row
    whole = {label: by_text for label, by_text in changes.items() if len(by_text) == len(texts)}
    if not whole:
        return None
    least = min(
        whole, key=lambda label: sum(number(row, "perplexity_change_percent", "mean") for row in whole[label].values())
    )
    said: list[str] = []
    for text in texts:
        change = tag("span", difference(*_parts(whole[least][text]), "%"), class_="whole")
        said += [", " if said else ": ", change, f" on {text}" if text else ""]
    among = f"the lowest perplexity among {len(whole)} ways measured" if len(whole) > 1 else "the perplexity"
    share = percent(max(kept_share(row) for row in whole[least].values()))
    return tag("p", f"With {share} of the cache left, {among} is that of ", tag("strong", least), *said, ".")


def _parts(row: Mapping | None) -> tuple[float | None, float | None]:
    return number(row, "perplexity_change_percent", "mean"), number(row, "perplexity_change_percent", "standard_error")


def _heads(texts: Sequence[str], has_passkey: bool) -> list[Markup]:
    """Two lines: what is measured, and on which text."""
    first = [
        tag("th", "method", scope="col", class_="text", rowspan=2),
        tag("th", "cache kept", scope="col", class_="text", rowspan=2),
    ]
    first.append(
        tag("th", "perplexity, and its change when folded", scope="colgroup", colspan=len(texts), class_="over")
    )
    if has_passkey:
        first.append(tag("th", "passkeys found", scope="col", rowspan=2))
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
    said = difference(*_parts(row), "%")
    return tag("span", said, class_="missing" if mean is None else None)


def _worth_showing(passkey: Sequence[Mapping]) -> list[Mapping]:
    shown = {length for length in lengths_of(passkey) if worth_showing(passkey, length)}
    return [row for row in passkey if number(row, "length_tokens") in shown]


def _keys(passkey: Sequence[Mapping], method: str) -> Markup:
    asked = (row for row in passkey if words(row, "method") == method)
    found, tries = found_keys(asked)
    return tag("span", f"{count(found)} of {count(tries)}" if tries else MISSING, class_=None if tries else "missing")
