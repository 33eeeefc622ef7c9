import json
import math
import os

import pytest

from kvfold import record
from kvfold.record import write_result, write_whole_file
from kvfold.report.page import other_commits
from kvfold.report.results import Result, group_results, number, read_results, words
from report_samples import quality, write_samples


def test_what_is_written_is_read(tmp_path):
    path = write_result(
        tmp_path / "new" / "q.json",
        "quality",
        {"rows": [{"method": "full"}], "environment": {"dtype": "float32"}},
        "kvfold eval X",
    )
    (result,), problems = read_results(path)
    assert result.kind == "quality" and result.name == "q.json" and problems == []
    assert [row["method"] for row in result.rows] == ["full"]
    about = result.data["environment"]
    assert about["dtype"] == "float32" and about["python"].startswith("3.") and about["cores"] >= 1 and about["cpu"]
    assert {"torch", "transformers", "kvfold"} <= set(about)
    assert result.data["command"] == "kvfold eval X" and result.created.endswith("+00:00")
    assert result.data["git_commit"] is None or len(result.data["git_commit"].removesuffix("-dirty")) in (40, 64)


def test_a_kind_that_no_page_knows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'speed' is unknown: a result is one of quality, "):
        write_result(tmp_path / "x.json", "speed", {}, "")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_finite_becomes_null(tmp_path):
    path = write_result(tmp_path / "x.json", "quality", {"rows": [{"perplexity": math.inf, "kl": [math.nan, 1.0]}]}, "")
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["perplexity"], row["kl"]) == (None, [None, 1.0])


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = write_whole_file(tmp_path / "page.html", "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole_file(path, "new")
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_outside_a_checkout_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "__file__", str(tmp_path / "kvfold" / "record.py"))
    (tmp_path / "kvfold").mkdir()
    assert record.git_commit.__wrapped__() is None


def test_rows_of_an_earlier_run_name_their_own_commit(tmp_path):
    data = quality()
    data["rows"][1]["made"] = {"git_commit": "feedfacecafebeefdeadfeedfacecafebeefdead"}
    data["rows"][2]["made"] = {"git_commit": data["git_commit"]}
    path = tmp_path / "q.json"
    path.write_text(json.dumps(data))
    (result,), _ = read_results(path)
    assert other_commits(result) == "1 rows at commit feedfaceca"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"kind": "speed"}', "\x00", '{"kind": ["quality"]}', "[" * 100_000]
)
def test_a_folder_without_results_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match="no readable results") as error:
        read_results(tmp_path)
    assert "\n" not in str(error.value) and "kvfold eval" in str(error.value)


def test_an_empty_and_a_missing_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no readable results"):
        read_results(tmp_path)
    with pytest.raises(ValueError, match="no such file or folder"):
        read_results(tmp_path / "nowhere")


def test_what_cannot_be_read_is_named_beside_what_can(tmp_path):
    write_samples(tmp_path)
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    (tmp_path / "other.json").write_text('{"kind": "speed"}')
    found, problems = read_results(tmp_path)
    assert len(found) == 11
    assert problems == [
        "bad.json: not readable as JSON",
        'other.json: no "kind" among quality, tasks, memory, kept, document, curve, decode, step, plan, pretraining, serve',
    ]


def test_curves_lie_among_other_results_too(tmp_path):
    write_samples(tmp_path)
    (tmp_path / "mine.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.5}\n')
    (tmp_path / "other.jsonl").write_text('{"text": "no steps"}\n')
    found, problems = read_results(tmp_path)
    assert [len(one.rows) for one in found if one.name == "mine.jsonl"] == [2]
    assert problems == ["other.jsonl: no steps of a retrofit in it"]
    (alone,), _ = read_results(tmp_path / "mine.jsonl")
    assert alone.rows[1]["loss"] == 1.5


def test_numbers_are_read_loosely():
    data = {"a": {"b": 1.5}, "t": True, "s": "1", "inf": math.inf, "huge": 10**400, "n": None}
    assert number(data, "a", "b") == 1.5
    assert [number(data, key) for key in ("a", "t", "s", "inf", "huge", "n", "gone")] == [None] * 7
    assert number(data, "s", "b") is None and number("text", "b") is None
    assert words(data, "a", "b") == "1.5" and words(data, "a") == "" and words(data, "gone") == ""


def _result(name: str, created: str, **changed) -> Result:
    return Result(name=name, data={**quality(["brown"]), "created": created, **changed})


def test_texts_from_several_files_make_one_section():
    other = quality(["austen"])
    (group,) = group_results([_result("a", "2031"), Result(name="b", data={**other, "created": "2032", "passkey": []})])
    assert [source.name for source in group.sources] == ["a", "b"]
    assert {row["text"] for row in group.rows} == {"brown", "austen"} and len(group.rows) == 20
    assert group.replaced == 0 and not group.is_one_of_many


def test_the_newer_row_counts():
    newer = _result("b", "2032", rows=[{"method": "full", "text": "brown", "perplexity": 1.0}], passkey=[])
    (group,) = group_results([_result("a", "2031"), newer])
    assert group.replaced == 1 and len(group.rows) == 10
    assert [row["perplexity"] for row in group.rows if row["method"] == "full"] == [1.0]


@pytest.mark.parametrize(
    "changed",
    [
        {"protocol": {"windows": 8}},
        {"model": {"name": "another"}},
        {"model": {"name": "Sample-135M", "fingerprint": "1"}},
        {"environment": {"dtype": "bfloat16"}},
    ],
)
def test_what_cannot_be_compared_stays_apart(changed):
    groups = group_results([_result("a", "2031"), _result("b", "2032", **changed)])
    assert [group.sources[0].name for group in groups] == ["b", "a"]
    assert all(group.is_one_of_many == (changed.get("model", {}).get("name") == "another") for group in groups)
