"""A text as one head holds it: what is kept, what was merged into one entry, what was let go. Text, not a drawing: it is
read, copied and searched like any other, and marks differ by more than their colour.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvfold.report.markup import Markup, join, tag
from kvfold.report.numbers import count, times
from kvfold.report.results import number, rows_of, words

KEPT, GONE, MERGED, WAITING = "kgmw"
"""Letters of `states`: has an entry; nothing is left; part of the entry of a token after it; has one that can't go yet."""
FIRST_TOKENS, MOST_TOKENS = 320, 2000
"""Of a text, those that are seen at once, and those that the page has at all."""
NO_CHARACTERS = "·"
"""Stands for a token without characters of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadText:
    """What one head holds of a text."""

    name: str
    """`layer 3, head 1: 120 of 1,024 kept (8.53×)`."""
    marks: tuple[tuple[str, str, int], ...]
    """(state, characters, tokens) of each stretch in one state; a run that was merged is one stretch, its state `MERGED`."""

    @property
    def states(self) -> set[str]:
        """The states that occur."""
        return {state for state, _, _ in self.marks}


def head_texts(row: Mapping, tokens: Sequence[object]) -> list[HeadText]:
    """Of each head that a row tells about, or one for all where they hold the same; those without a state a token are left
    out.
    """
    found = []
    for head in rows_of(row, "heads"):
        states = words(head, "states")
        if states and tokens:
            pieces = [piece if isinstance(piece, str) else "" for piece in tokens[:MOST_TOKENS]]
            marks = tuple(_stretches(states[:MOST_TOKENS], pieces))
            where = f"layer {words(head, 'layer') or '?'}, head {words(head, 'head') or '?'}"
            found.append(HeadText(name=_name(where, head, number(row, "seen_tokens")), marks=marks))
    if len(found) > 1 and all(one.marks == found[0].marks for one in found):
        # A method with one budget for all: the same page three times would say no more.
        head = rows_of(row, "heads")[0]
        return [HeadText(name=_name("every head asked for", head, number(row, "seen_tokens")), marks=found[0].marks)]
    return found


def _name(where: str, head: Mapping, seen: float | None) -> str:
    kept = number(head, "kept_tokens")
    if kept is None or not seen:
        return where
    return f"{where}: {count(kept)} of {count(seen)} kept" + (f" ({times(seen / kept)})" if kept > 0 else "")


def _stretches(states: str, pieces: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    """Neighbours in one state together, but each merged run, which ends with the token that has the entry, alone; and cut
    where the first page ends, unless that is within a run.
    """
    state, text, tokens = "", "", 0
    for index, (letter, piece) in enumerate(zip(states, pieces, strict=False)):
        ends_run = state == MERGED and letter == KEPT
        cut = letter != state or (index == FIRST_TOKENS and state != MERGED)
        if cut and not ends_run and tokens:
            yield state, text, tokens
            text, tokens = "", 0
        state = state if ends_run else letter
        text, tokens = text + (piece or NO_CHARACTERS), tokens + 1
        if ends_run:
            yield state, text, tokens
            state, text, tokens = "", "", 0
    if tokens:
        yield state, text, tokens


def text_page(one: HeadText) -> Markup:
    """The head's name and the text; what is longer than a page is folded away."""
    first, rest, passed = [], [], 0
    for stretch in one.marks:
        (first if passed < FIRST_TOKENS else rest).append(mark(*stretch))
        passed += stretch[2]
    more = tag("details", tag("summary", "The rest of the text"), tag("p", *rest, class_="held")) if rest else None
    return tag("div", tag("h3", one.name[:1].upper() + one.name[1:]), tag("p", *first, class_="held"), more)


def mark(state: str, text: str, tokens: int) -> Markup:
    """One stretch of text in its state."""
    if state == GONE:
        return tag("s", text)
    if state == MERGED:
        said = f"{count(tokens)} tokens in one entry"
        return tag("span", text, class_="run", title=said)
    return tag("span", text, class_={KEPT: "kept", WAITING: "waiting"}.get(state))


def legend(states: set[str]) -> list[Markup]:
    """What each mark means, of those that occur."""
    known = (
        (KEPT, "kept", "it has an entry of its own"),
        (MERGED, "merged", "the words of one box share one entry, their weighted mean"),
        (WAITING, "too new to go", "within the delay, in which every token is held"),
        (GONE, "let go", "nothing of it is left"),
    )
    return [
        join([tag("span", mark(state, name, 2), class_="held"), f" {meaning}. "])
        for state, name, meaning in known
        if state in states
    ]
