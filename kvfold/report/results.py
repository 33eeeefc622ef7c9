"""Reading of results/*.json: all that the report knows, which files make one section, and how numbers are written for people.

A result is one JSON object with `kind`, when, how and where it was made, and `rows`; what writes them is record.py. Reading is
loose: unknown keys are ignored, missing ones read as None, so that results of other versions still make a page.

Quality files that differ only in texts or methods make one section: model (with its fingerprint, if it has one), protocol, device
and dtype agree; a row measured twice counts as the newer file has it. So do models from scratch that saw as many tokens. Every
other kind stands alone, a section a file. Numbers have three significant digits and their thousands apart; of a figure that was
not measured, None, every writer says so.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvfold.errors import UserError
from kvfold.record import KINDS

MISSING = "not measured"
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_CURVE = Path("training") / "curve.jsonl"
"""Where a retrofit's folder has its steps, a line of JSON each."""
_LARGEST, _SMALLEST = 1e30, 1e-30
"""What is larger is no measurement, what is nearer to 0 is 0: so that shares and scales stay numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One readable result file."""

    name: str
    """The file's name, to say where a figure comes from."""
    data: Mapping
    """The JSON object as it was read."""

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return self.data["kind"]

    @property
    def created(self) -> str:
        """When it was measured, ISO 8601 as written; "" if unknown."""
        return words(self.data, "created")

    @property
    def rows(self) -> list[Mapping]:
        """The measured rows; whatever is not an object is left out."""
        return rows_of(self.data)


def _under(data: object, keys: tuple[str, ...]) -> object:
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def rows_of(data: Mapping, key: str = "rows") -> list[Mapping]:
    """The list of objects under `key`, without anything in it that is not an object."""
    rows = data.get(key)
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []


def number(data: object, *keys: str) -> float | int | None:
    """The number found by following `keys`; None where one is missing or what stands there is no finite number."""
    value = _under(data, keys)
    # The comparison also refuses nan, and integers too large for a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        return None
    return value if abs(value) > _SMALLEST else 0


def words(data: object, *keys: str) -> str:
    """The text found by following `keys` (a number is written out); "" where there is none."""
    value = _under(data, keys)
    return "" if value is None or isinstance(value, Mapping | list) else str(value)


def numbers_of(data: Mapping, key: str) -> list[float | None]:
    """A list of numbers; None for what is none, nothing where there is no list."""
    value = data.get(key)
    return list(map(number, value)) if isinstance(value, list) else []


def grid(data: Mapping, key: str) -> list[list[float | None]]:
    """A list of lists of numbers; None in a cell that holds none."""
    value = data.get(key)
    return [list(map(number, line)) for line in value if isinstance(line, list)] if isinstance(value, list) else []


def read_results(path: Path) -> tuple[list[Result], list[str]]:
    """The results in a folder (its *.json, and curves of retrofits: its *.jsonl, or that of the run whose folder it is) or in
    one file, oldest first, and one line for each file that is no result.

    UserError if nothing readable is there.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; results are written by `kvfold eval` and `kvfold bench`")
    files = [path]
    if path.is_dir():
        run = [path / _CURVE] if (path / _CURVE).is_file() else []
        files = [*sorted(path.glob("*.json")), *sorted(path.glob("*.jsonl")), *run]
    results, problems = [], []
    for file in files:
        outcome = _read_curve(file) if file.suffix == ".jsonl" else _read_file(file)
        (results if isinstance(outcome, Result) else problems).append(outcome)
    if not results:
        why = f" ({problems[0]})" if problems else ""
        raise UserError(f"{path}: no readable results{why}; make some with `kvfold eval` or `kvfold bench`")
    return sorted(results, key=lambda result: result.created), problems


def _read_file(file: Path) -> Result | str:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return f"{file.name}: not readable as JSON"
    if not isinstance(data, dict) or data.get("kind") not in KINDS:
        return f'{file.name}: no "kind" among {", ".join(KINDS)}'
    return Result(name=file.name, data=data)


def _read_curve(file: Path) -> Result | str:
    """The steps of a retrofit; what its run's notes beside it say goes with them. A last line that was cut short is none."""
    rows = []
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = _parsed(line)
            if number(row, "step") is None:
                break
            rows.append(row)
    except (OSError, UnicodeDecodeError):
        pass
    if not rows:
        return f"{file.name}: no steps of a retrofit in it"
    notes = {}
    for name in ("run", "done") if file.name == _CURVE.name else ():
        note = file.with_name(f"{name}.json")
        notes[name] = _parsed(note.read_text(encoding="utf-8", errors="replace")) if note.is_file() else None
    source = words(notes.get("run"), "source").rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    about = {key: words(notes.get("done"), key) for key in ("command", "git_commit")}
    name = file.resolve().parents[1].name if file.parent.name == _CURVE.parent.name else file.stem
    data = {"kind": "curve", "model": {"name": source}, "name": name, **about, "rows": rows}
    return Result(name=f"{name}/{_CURVE}" if name != file.stem else file.name, data=data)


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


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
        found.setdefault(_comparable(result.kind, result.data) or index, []).append(result)
    many = len({words(members[-1].data, "model", "name") for members in found.values()}) > 1
    groups = [_group(members, many) for members in found.values()]
    groups.sort(key=lambda group: group.sources[-1].created, reverse=True)
    return sorted(groups, key=lambda group: KINDS.index(group.kind))


def _comparable(kind: str, data: Mapping) -> str | None:
    """Equal for what makes one section; None for what stands alone."""
    if kind == "quality":
        environment = [words(data, "environment", key) for key in ("device", "dtype")]
        model = [words(data, "model", key) for key in ("name", "fingerprint")]
        return json.dumps([model, data.get("protocol"), environment], sort_keys=True)
    if kind != "pretraining":
        return None
    # Tokens trained on and held out: as many, and a design space can be seen as a whole.
    first = next(iter(rows_of(data)), {})
    return json.dumps([number(first, key) for key in ("tokens", "validation_tokens")])


def _group(members: list[Result], is_one_of_many: bool) -> Group:
    kind = members[0].kind
    rows, lost_rows = _newest_rows(members, "rows", ("method", "text") if kind == "quality" else ())
    passkey, lost_keys = _newest_rows(members, "passkey", ("method", "length_tokens", "depth"))
    tasks, lost_scores = _newest_rows(members, "tasks", ("task", "length_tokens", "method", "metric"))
    return Group(
        kind=kind, sources=tuple(members), rows=rows, passkey=passkey, tasks=tasks,
        replaced=lost_rows + lost_keys + lost_scores, is_one_of_many=is_one_of_many,
    )  # fmt: skip


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


def count(value: float | None) -> str:
    """A whole number with its thousands apart: 1,024. A count that is a mean (256.5) keeps three digits."""
    if value is None:
        return MISSING
    return f"{round(value):,}" if float(value).is_integer() else three(value)


def three(value: float | None) -> str:
    """Three significant digits: 29.7, 0.0312, 1,230; a minus is a real one."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    return _minus(f"{value:.2e}" if abs(value) < 1e-5 else _fixed(value, 2 - _exponent(value)))


def size(value: float | None) -> str:
    """Bytes in decimal units: 12.1 MB; 1 MB = 1,000,000 bytes."""
    return _in_units(value, _UNITS, f"{count(value)} B")


def amount(value: float | None) -> str:
    """A large count in words: 135 million."""
    return _in_units(value, ((1e9, "billion"), (1e6, "million")), count(value))


def _in_units(value: float | None, units: Iterable[tuple[float, str]], small: str) -> str:
    if value is None:
        return MISSING
    return next((f"{three(value / unit)} {name}" for unit, name in units if abs(value) >= unit * 0.9995), small)


def tick(value: float) -> str:
    """A round number at an axis, without idle zeros: 20, 12.5, 1,500."""
    return _minus(f"{value:,.10g}")


def size_unit(most: float) -> tuple[float, str]:
    """Bytes of the unit in which an axis up to `most` bytes is written, and its name."""
    return next(((unit, name) for unit, name in reversed(_UNITS) if most < unit * 1000), _UNITS[0])


def percent(share: float | None) -> str:
    """A share between 0 and 1 in percent: 25.2 %."""
    return MISSING if share is None else f"{three(100 * share)} %"


def times(value: float | None) -> str:
    """How many times: 4.03×."""
    return MISSING if value is None else f"{three(value)}×"


def difference(mean: float | None, error: float | None, unit: str = "") -> str:
    """A mean with its sign and its standard error, both cut where the error has two digits: +1.93 ± 0.62 %."""
    unit = f" {unit}" if unit else ""
    if mean is None:
        return MISSING
    if not error:
        return f"{'+' if mean > 0 else ''}{three(mean)}{unit}" + (f" (error {MISSING})" if error is None else "")
    places = 1 - _exponent(error)
    plus = "+" if round(mean, places) > 0 else ""
    return f"{plus}{_minus(_fixed(mean, places))} ± {_fixed(error, places)}{unit}"


def spread(low: float | None, high: float | None) -> str:
    """The smallest and largest of several runs: 17.9 to 18.6; "" if they were not kept."""
    return "" if low is None or high is None else f"{three(low)} to {three(high)}"


def middle(low: float | None, median: float | None, high: float | None, unit: str = "") -> str:
    """A median with the spread behind it: 18.3 (17.9 to 18.6)."""
    if median is None:
        return MISSING
    around = spread(low, high)
    return f"{three(median)}{unit}" + (f" ({around})" if around else "")


def _exponent(value: float) -> int:
    """The power of ten of the first digit, after rounding to three: 9.996 counts as 10.0."""
    return int(f"{abs(value):.2e}".split("e")[1])


def _fixed(value: float, places: int) -> str:
    text = f"{round(value, places):,.{max(0, places)}f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text


def _minus(text: str) -> str:
    return text.replace("-", "−")
