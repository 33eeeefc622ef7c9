"""Results that can be trusted: every file under results/ is listed with what made it, every row has its record, no measurement
stands under two records, and figures in the prose of the README and of results.md are those of the files."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FIELDS = ("git_commit", "kvfold", "torch", "cpu", "threads", "dtype", "when", "seconds")
LISTS = ("rows", "passkey", "tasks", "tensor_parallel")
BLOCK = re.compile(r"<!-- results: \w+ -->.*?<!-- end -->", re.DOTALL)

OLD = {
    "quality.json passkey": ("seconds", "passkeys were not timed before 29 November"),
    "dms.json passkey": ("seconds", "as above"),
    "time-axis.json passkey": ("seconds", "as above"),
    "layer-axis.json passkey": ("seconds", "as above"),
    "design-space/beside-mqa.json passkey": ("git_commit seconds", "as above; kvfold ran from a copy that is no checkout"),
    "design-space/beside-mqa.json rows": ("git_commit", "kvfold ran from a copy that is no checkout"),
    "mini-reach.json rows": ("git_commit", "as above"),
    "drawn-layers.json rows": ("git_commit", "as above"),
    "design-space/mini-*.json rows": ("git_commit dtype", "as above, where it lacks a commit; training named no dtype"),
    "runs/chosen-layers-trial-costs.json file": ("*", "what a conversion left in its folder"),
    "runs/*.json file": ("torch dtype when", "what a retrofit prints had kvfold's version, commit and processor alone"),
    "runs/dmc-4x-scale-*.jsonl line": ("*", "runs stopped on the way: the log has command and texts, nobody kept the commit"),
    "runs/dmc-control-freed.jsonl line": ("when", "the studies recorded no time before 29 November"),
    "runs/dmc-merge.jsonl line": ("dtype when", "as above, and no dtype"),
    "recall/recall.jsonl line": ("dtype when", "as above"),
    "dms-per-layer.json passkey": ("seconds", "as above"),
    "fold/distil-[ms]*.json *": ("*", "summed up from rows that have it, in distil-held-out.jsonl"),
    "fold/*.json* *": ("dtype when", "as above"),
    "integrations/ray-*.json rows": ("kvfold torch threads dtype", "the study recorded Ray's version alone"),
    "integrations/vllm-capacity.json rows": ("kvfold torch", "the study recorded vLLM's version alone"),
    "integrations/vllm-[ds]*.json *": ("dtype seconds", "the study named both in its text alone"),
    "engine/prefix.json rows": ("*", "ended by hand: the two rows that it had printed"),
    "serve/*.json file": ("*", "the studies recorded nothing, but for the steps of load.json under `made`"),
    "training/same-losses.jsonl line": ("kvfold torch threads dtype when seconds", "the study recorded little"),
    "speed/walls.json rows": ("*", "the two commits stand above the rows, nothing else was recorded"),
}  # fmt: skip
"""Rows that lack fields (`*`: any) that nobody can find out any more: file, where in it, fields, reason. None is new."""

RESULT_FILES = sorted(path for path in RESULTS.rglob("*") if path.is_file() and path.name != "README.md")


def name_of(path: Path) -> str:
    return str(path.relative_to(RESULTS))


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with where it stands: a line, a list of the file, or the file itself."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        yield from (("line", json.loads(line)) for line in text.splitlines())
        return
    data = json.loads(text)
    lists = [(name, row) for name in LISTS for row in data.get(name) or []]
    yield from lists or [("file", data)]


def is_timed(value: object) -> bool:
    """Whether a row says how long it took, or measures times: anywhere in it."""
    if isinstance(value, dict):
        named = any("second" in name or name.endswith(("_ms", "_s")) or "minutes" in name for name in value)
        return named or any(is_timed(item) for item in value.values())
    return isinstance(value, list) and any(map(is_timed, value))


def lacking(row: dict[str, Any]) -> set[str]:
    """Fields of the record that a row does not have."""
    record = {**row, **(row.get("made") or {})}
    return {name for name in FIELDS if (not is_timed(row) if name == "seconds" else record.get(name) is None)}


def excused(path: Path, place: str) -> tuple[str, set[str]] | None:
    """The entry of `OLD` for these rows, and its fields."""
    for pattern, (fields, _) in OLD.items():
        if fnmatch(f"{name_of(path)} {place}", pattern):
            return pattern, set(FIELDS if fields == "*" else fields.split())
    return None


def has_a_card(path: Path) -> bool:
    """A curve's steps are those of one run, whose record stands beside them under the same name."""
    return path.parent.name == "runs" and path.suffix == ".jsonl" and path.with_suffix(".json").is_file()


@pytest.mark.parametrize("path", [path for path in RESULT_FILES if path.suffix in (".json", ".jsonl")], ids=name_of)
def test_rows_carry_their_record(path):
    for place, row in [] if has_a_card(path) else rows_of(path):
        _, allowed = excused(path, place) or ("", set())
        assert lacking(row) <= allowed, f"{name_of(path)}: {place}: lacks {', '.join(sorted(lacking(row) - allowed))}"


def test_no_excuse_is_left_over():
    used = defaultdict(set)
    for path in RESULT_FILES:
        for place, row in rows_of(path) if path.suffix in (".json", ".jsonl") else ():
            if found := excused(path, place):
                used[found[0]] |= lacking(row)
    assert [pattern for pattern in OLD if not used[pattern]] == []
    assert [
        pattern for pattern, (fields, _) in OLD.items() if fields != "*" and set(fields.split()) - used[pattern]
    ] == []


def test_no_measurement_stands_under_two_records():
    """Two rows of equal seconds, to the last digit, are one measurement, wherever they stand."""
    records = defaultdict(set)
    for path in RESULT_FILES:
        for _, row in rows_of(path) if path.suffix == ".json" else ():
            if isinstance(row.get("seconds"), float):
                figures = [row.get(name) for name in ("seconds", "perplexity", "value", "kl")]
                records[json.dumps(figures)].add(json.dumps(row.get("made"), sort_keys=True))
    assert {figures: made for figures, made in records.items() if len(made) > 1} == {}


def test_results_readme_lists_every_file():
    listed = re.findall(r"^\| (`.+?) \|", (RESULTS / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    patterns = [pattern for cell in listed for pattern in re.findall(r"`([^`]+)`", cell)]
    assert [name_of(path) for path in RESULT_FILES if not any(fnmatch(name_of(path), one) for one in patterns)] == []
    assert [one for one in patterns if not any(fnmatch(name_of(path), one) for path in RESULT_FILES)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_result_files_that_a_page_names_are_there(page):
    """Whole names in backticks; commands name files of the reader's own."""
    named = re.findall(r"`(results/[^`\s*]+\.(?:jsonl?|txt))`", page.read_text(encoding="utf-8"))
    missing = [name for name in named if not (ROOT / name).is_file()]
    assert missing == (["results/pretraining.json"] if page.name == "pretraining.md" else [])


def test_every_entry_of_the_log_names_its_result_files():
    entries = re.split(r"^## ", (ROOT / "docs" / "log.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert [entry.splitlines()[0] for entry in entries if not re.search(r"\*\*result files?\*\*:", entry)] == []


def changes(file: str, method: str) -> list[float]:
    """Changes of perplexity under a method in percent, on the two texts of the README."""
    rows = json.loads((RESULTS / file).read_text(encoding="utf-8"))["rows"]
    wanted = [row for row in rows if row["method"] == method and row["text"] in ("brown", "wiki_articles")]
    return sorted(row["perplexity_change_percent"]["mean"] for row in wanted)


def test_the_readme_opens_with_what_was_measured():
    opening = " ".join((ROOT / "README.md").read_text(encoding="utf-8").partition("\n## ")[0].split())
    methods = (
        "fold:128+32@0.6 of smollm2-135m-fold-4x",
        "dms:128 of smollm2-135m-dms-4x",
        "h2o:128+128",
        "window:252+4",
    )
    said = ["{:.1f} to {:.1f} %".format(*changes("quality-4x.json", one)) for one in methods]
    assert re.findall(r"[\d.]+ to [\d.]+ %", opening) == said


def test_percentages_in_the_prose_of_results_stand_in_its_tables():
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    tables, prose = " ".join(BLOCK.findall(text)), BLOCK.sub("", text)
    published = {"4.9 %"}  # what the authors of CLA reached
    said = set(re.findall(r"[\d.]+ %", prose)) - published
    assert [figure for figure in sorted(said) if f"{figure}" not in tables] == []


@pytest.mark.parametrize("name", ["smollm2-135m-dms-8x", "smollm2-135m-fold-8x"])
def test_figures_on_the_cards_at_an_eighth_are_those_of_the_summary(name):
    card = (ROOT / "kvfold" / "assets" / "adapters" / name / "README.md").read_text(encoding="utf-8")
    rows = json.loads((RESULTS / "long" / "eighth-summary.json").read_text(encoding="utf-8"))["rows"]
    known = {f"{row['kl_late']:.4f}" for row in rows}
    for row in rows:
        change, error = row["perplexity_change_percent"], row["standard_error"]
        known |= {f"{change:+.1f} ± {error:.1f} %", f"{change:+.2f} ± {error:.2f} %"}
        for behind in ("", "_from_dms-on"):
            if "kl_change" + behind in row:
                known.add(f"{100 * row['kl_change' + behind]:+.1f} ± {100 * row['kl_change_error' + behind]:.1f} %")
    said = re.findall(r"[+-][\d.]+ ± [\d.]+ %|(?<![\d.])0\.\d{4}", card)
    assert len(said) > 4 and [one for one in said if one not in known] == []
