import copy
import json
import math
import re
import subprocess
import sys

import pytest

import report_samples as samples
from html_reading import Page
from kvfold.report import numbers
from kvfold.report.page import page_of, write_page
from kvfold.report.results import Result
from kvfold.report.sheets import QUALITY_COLUMNS, quality_sheet

KINDS = ("quality", "tasks", "memory", "kept", "document", "curve", "decode", "step", "plan", "pretraining")
HOSTILE = "</td></svg></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;$title ${x} javascript:"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return Page(write_page(samples.write_samples(folder / "results"), folder / "page.html").read_text(encoding="utf-8"))


def _page_of(tmp_path, *results: dict) -> Page:
    folder = tmp_path / "results"
    folder.mkdir(exist_ok=True)
    for index, result in enumerate(results):
        (folder / f"{index}.json").write_text(json.dumps(result), encoding="utf-8")
    return Page(write_page(folder, tmp_path / "page.html").read_text(encoding="utf-8"))


def test_the_page_needs_nothing_else(tmp_path):
    text = write_page(samples.write_samples(tmp_path / "results"), tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|@import|url\(|<iframe|<object|<embed|\bsrc=", text)
    links = [attributes for name, attributes in Page(text).tags if name in ("link", "a", "base")]
    assert [link["href"] for link in links] == ["data:,"]
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "@media print" in text
    assert len(text) < 450_000


def test_every_section_is_there(page):
    headings = [
        "Quality against memory",
        "Finding a hidden number",
        "Tasks",
        "Memory while it writes",
        "Speed",
        "The plan",
    ]
    headings += ["Inside one text, persuasion", "How a retrofit went: made-up-adapter", "What gates cost in training"]
    for heading in headings:
        assert heading in page.text
    assert "The cache of Sample-135M , folded" in page.text and "135 million parameters" in page.text
    assert "Made-up CPU @ 2.0 GHz, 2 cores, 2 threads, device cpu, float32" in page.text
    assert "kvfold eval MADE-UP --time full --windows 8" in page.text and "commit 0123456789" in page.text
    assert "over 32 windows of 1,024 tokens" in page.text


def test_pictures_speak_and_say_more_on_hover(page):
    pictures = [attributes for name, attributes in page.tags if name == "svg" and "aria-hidden" not in attributes]
    assert len(pictures) >= 16 and all(picture["role"] == "img" and picture["aria-label"] for picture in pictures)
    assert sum(name == "title" for name, _ in page.tags) > 100
    assert not [1 for _, attributes in page.tags if "id" in attributes]


def test_every_quality_number_is_on_the_page(page):
    lines = page.table("method", "KL", "same top-1")
    assert len(lines) == 1 + len(samples.TEXTS) * len(samples.METHODS)
    for row, cells in zip(samples.quality()["rows"], lines[1:], strict=True):
        change, loss = row["perplexity_change_percent"], row["loss_difference"]
        assert cells[1:] == [
            row["text"], "no", numbers.three(row["perplexity"]), numbers.difference(*change.values(), "%"),
            numbers.difference(*loss.values()), numbers.three(row["bits_per_byte"]), numbers.three(row["kl"]),
            numbers.percent(row["top1_agreement"]), numbers.count(row["kept_tokens"]), numbers.times(row["compression"]),
            numbers.times(row["compression_mean_over_time"]), numbers.size(row["allocated_bytes"]),
            numbers.size(54_321 + samples.TEXTS.index(row["text"])), numbers.size(9_876),
            numbers.size(row["full_bytes"]), numbers.three(row["tokens_per_second"]), "32,736", "109",
        ]  # fmt: skip
    by_hand = dict(zip(lines[0], lines[3], strict=True))
    assert (
        by_hand["method"] == "Window + sinks 252+4"
        and by_hand["compression"] == "3.94×"
        and by_hand["bytes held"] == "6.10 MB"
    )


def test_every_other_number_is_on_the_page(page):
    keys = page.table("length, tokens", "depth", "found", "tries")
    assert [[int(n.replace(",", "")) for n in (line[1], *line[3:])] for line in keys[1:]] == [
        [row["length_tokens"], row["found"], row["tries"]] for row in samples.quality()["passkey"]
    ]
    memory = page.table("tokens seen", "Full attention", "TOVA 25%")
    for column, row in enumerate(samples.memory()["rows"], start=1):
        assert [line[column] for line in memory[1:]] == [numbers.size(held) for held in row["allocated_bytes"]]
    for row in samples.decode()["rows"]:
        side = row["ours"]["tokens_per_second"]
        assert numbers.middle(side["min"], side["median"], side["max"]) in page.text
        assert (
            numbers.size(row["theirs"]["peak_bytes"]) in page.text
            and numbers.times(row["ratio"]["median"]) in page.text
        )
    layers = [table for table in page.tables if table[0][:2] == ["layer", "head 0"]]
    dms, later = samples.kept()["rows"][2]["kept"], len(samples.document()["rows"])
    assert len(layers) == 5 + later
    assert layers[4][1:] == [[str(at), *map(numbers.count, line)] for at, line in enumerate(dms)]
    assert page.table("cache", "bytes a token")[3] == ["cla2, h2o:128+128", "23,040", "6.06 MB", "–"]


def test_the_short_answer_names_the_lowest_perplexity(page):
    assert "With 25.4 % of the cache left, the lowest perplexity among 6 ways measured is that of TOVA 256" in page.text


def test_a_length_that_the_unfolded_model_fails_is_in_the_table_alone(page):
    assert "At 2,048 tokens the unfolded model itself finds only 75.0 %" in page.text
    assert "24 of 24" in page.text and "33 of 36" not in page.text
    spoken = [attributes.get("aria-label", "") for _, attributes in page.tags]
    assert any("at 1,024 tokens" in text for text in spoken) and not any("at 2,048 tokens" in text for text in spoken)


def test_methods_explain_themselves(page):
    assert "arXiv 2306.14048" in page.text and "read one token a call when measured" in page.text


def test_several_models_are_told_apart(tmp_path):
    other = {**samples.decode(), "model": {"name": "Other-1B"}}
    page = _page_of(tmp_path, samples.memory(), other)
    assert "The caches of 2 models, folded" in page.text
    assert "Speed: Other-1B" in page.text and "Memory while it writes: Sample-135M" in page.text


def test_long_series_are_thinned_and_say_so(tmp_path):
    tokens = list(range(5001))
    row = {"method": "full", "title": "full", "tokens": tokens, "allocated_bytes": [at * 10 for at in tokens]}
    page = _page_of(tmp_path, {"kind": "memory", "rows": [row]})
    assert len(page.table("tokens seen")) < 204 and "5,000" in page.text and "50.0 kB" in page.text


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "broken.json").write_text("{")
    assert "Left out: broken.json: not readable as JSON" in _page_of(tmp_path, samples.plan()).text


def test_one_file_makes_a_page_too_and_the_old_one_is_replaced(tmp_path):
    samples.write_samples(tmp_path)
    out = tmp_path / "deep" / "page.html"
    assert write_page(tmp_path / "decode.json", out) == out
    write_page(tmp_path / "plan.json", out)
    assert "The plan" in out.read_text(encoding="utf-8") and [file.name for file in out.parent.iterdir()] == [
        "page.html"
    ]


def test_nothing_is_written_without_results(tmp_path):
    with pytest.raises(ValueError, match="no readable results"):
        write_page(tmp_path, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def _everywhere(value, change):
    """Every text of a result changed, `kind` kept."""
    if isinstance(value, dict):
        return {key: item if key == "kind" else _everywhere(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_everywhere(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def test_hostile_texts_stay_texts(tmp_path):
    hostile = [_everywhere(getattr(samples, kind)(), lambda text: f"{text} {HOSTILE}") for kind in KINDS]
    page = _page_of(tmp_path, *hostile)
    names = {name for name, _ in page.tags}
    assert "script" not in names and "img" not in names
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert not [
        key for _, attributes in page.tags for key in ("src", "href") if attributes.get(key, "data:,") != "data:,"
    ]
    assert HOSTILE in page.text


def _paths(value, path=()):
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in children:
        yield from _paths(item, (*path, key))


def _replaced(value, path, junk):
    if not path:
        return junk
    changed = copy.copy(value)
    changed[path[0]] = _replaced(value[path[0]], path[1:], junk)
    return changed


def _removed(value, path):
    changed = copy.copy(value)
    if len(path) == 1:
        del changed[path[0]]
    else:
        changed[path[0]] = _removed(value[path[0]], path[1:])
    return changed


def _small(kind: str) -> dict:
    """A row or two of a sample, so that every part of it can be spoilt in turn; what all kinds share stands in one."""
    if kind == "quality":
        result = samples.quality(["brown"])
        result = {**result, "rows": result["rows"][:1] + result["rows"][-1:], "passkey": result["passkey"][:2]}
        result["tasks"] = samples.tasks()["rows"][:1]
    else:
        result = {"kind": kind, "rows": getattr(samples, kind)()["rows"][:1]}
    if kind == "document":
        result["tokens"] = samples.WORDS[:2]
    for row in result["rows"]:
        row.update(
            {
                key: row[key][:2]
                for key in ("tokens", "allocated_bytes", "kept", "score", "owners", "heads", "layer_compression")
                if isinstance(row.get(key), list)
            }
        )
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_part_never_stops_the_page(tmp_path, kind):
    result = _small(kind)
    for path in _paths(result):
        if path and path != ("kind",):
            _page_of(tmp_path, _removed(result, path))
    assert "not measured" in _page_of(tmp_path, {"kind": kind, "rows": [{}]}).text.lower() or kind == "plan"
    _page_of(tmp_path, {"kind": kind})


@pytest.mark.parametrize("kind", KINDS)
def test_junk_never_stops_the_page(kind):
    result = _small(kind)
    junks = (None, "x; y", [], {}, [[]], -1, 0, 1e-300, 1e29, math.nan)
    for index, path in enumerate(_paths(result)):
        for junk in junks[index % 3 :: 3]:  # in turns: neighbouring paths are alike
            if path and path != ("kind",):
                page_of([Result(name="x.json", data=_replaced(result, path, junk))])


def test_what_was_not_measured_reads_so(tmp_path):
    row = {"method": "h2o:1+1", "title": "H2O", "text": "t", "perplexity": 12.0}
    page = _page_of(tmp_path, {"kind": "quality", "rows": [row]})
    cells = dict(zip(*page.table("method", "KL"), strict=True))
    assert cells["perplexity"] == "12.0"
    assert {cells[head] for head in ("KL", "change", "bytes held", "trained", "kept")} == {"not measured"}


def test_a_row_says_what_it_was_trained_on():
    assert [QUALITY_COLUMNS[2].head, *(quality_sheet([row]).rows[0][2] for row in (
        {"trained": True, "trained_tokens": 262_144}, {"trained": True, "trained_tokens": None}, {"trained": False}, {},
    ))] == ["trained", "262,144 tokens", "yes", "no", "not measured"]  # fmt: skip


def test_the_report_needs_neither_torch_nor_matplotlib():
    heavy = "{'torch', 'transformers', 'matplotlib', 'numpy'}"
    code = f"import kvfold.report.page, kvfold.report.tables, sys; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
