"""Which result files make one picture: quality files that differ only in texts or methods are read as one, and so are models
from scratch that saw as many tokens.

Quality files belong together when model (with its fingerprint, if it has one), protocol, device and dtype agree; a row measured
twice counts as the newer file has it. Every other kind stands alone, a picture a file.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvfold.record import KINDS
from kvfold.report.results import Result, number, rows_of, words


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One section of the page."""

    kind: str
    """As in the files."""
    sources: tuple[Result, ...]
    """The files, oldest first."""
    rows: tuple[Mapping, ...]
    """Rows of all of them."""
    passkey: tuple[Mapping, ...]
    """Passkey rows, for quality and tasks."""
    tasks: tuple[Mapping, ...]
    """Scores of tasks, for quality; those of a result of tasks are its rows."""
    replaced: int
    """Rows left out because a newer file has them too."""
    is_one_of_many: bool
    """Whether other sections are about other models, so that headings must name theirs."""

    @property
    def newest(self) -> Mapping:
        """The newest file's object: protocol, model and environment are read from it."""
        return self.sources[-1].data

    @property
    def model(self) -> str:
        """The model's name; "" if not said."""
        return words(self.newest, "model", "name")


def group_results(results: Iterable[Result]) -> list[Group]:
    """Sections in the order of the kinds, within a kind the newest first."""
    found: dict[object, list[Result]] = {}
    for index, result in enumerate(results):
        key = {"quality": _protocol, "pretraining": _training}.get(result.kind, lambda data, index=index: index)
        found.setdefault(key(result.data), []).append(result)
    many = len({words(members[-1].data, "model", "name") for members in found.values()}) > 1
    groups = [_group(members, many) for members in found.values()]
    groups.sort(key=lambda group: group.sources[-1].created, reverse=True)
    return sorted(groups, key=lambda group: KINDS.index(group.kind))


def _protocol(data: Mapping) -> str:
    environment = [words(data, "environment", key) for key in ("device", "dtype")]
    model = [words(data, "model", key) for key in ("name", "fingerprint")]
    return json.dumps([model, data.get("protocol"), environment], sort_keys=True)


def _training(data: Mapping) -> str:
    """Tokens trained on and held out: as many, and a design space can be seen as a whole."""
    first = next(iter(rows_of(data)), {})
    return json.dumps(["from scratch", *(number(first, key) for key in ("tokens", "validation_tokens"))])


def _group(members: list[Result], is_one_of_many: bool) -> Group:
    rows, lost_rows = _newest_rows(members, "rows", ("method", "text") if members[0].kind == "quality" else ())
    passkey, lost_keys = _newest_rows(members, "passkey", ("method", "length_tokens", "depth"))
    tasks, lost_scores = _newest_rows(members, "tasks", ("task", "length_tokens", "method", "metric"))
    return Group(
        kind=members[0].kind,
        sources=tuple(members),
        rows=rows,
        passkey=passkey,
        tasks=tasks,
        replaced=lost_rows + lost_keys + lost_scores,
        is_one_of_many=is_one_of_many,
    )


def _newest_rows(members: list[Result], key: str, same: tuple[str, ...]) -> tuple[tuple[Mapping, ...], int]:
    """Rows of all files, a later file's in the place of an earlier one's with the same words under `same`."""
    kept: dict[object, Mapping] = {}
    total = 0
    for member in members:
        for index, row in enumerate(rows_of(member.data, key)):
            about = tuple(words(row, name) for name in same)
            kept[about if any(about) else (member.name, index)] = row
            total += 1
    return tuple(kept.values()), total - len(kept)
