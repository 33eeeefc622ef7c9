"""`kvfold eval`: rows beside the unfolded model, files that are whole, and no measurement made twice."""

import json

import pytest

from kvfold.eval import perplexity
from kvfold.report.results import read_results

SHORT = "--text text.txt --context 32 --windows 4 --batch 2"


@pytest.fixture
def readings(monkeypatch) -> list[str]:
    """The methods under which text was read, as it happens."""
    found, read_rows = [], perplexity.read_rows

    def watched(model, layout, *args, **kwargs):
        found.append(layout.time_text())
        return read_rows(model, layout, *args, **kwargs)

    monkeypatch.setattr(perplexity, "read_rows", watched)
    return found


def test_a_table_with_a_row_for_each_method(kvfold):
    done = kvfold(f"eval tiny {SHORT} --time tova:8 --time window:4+4")
    assert (done.code, done.err) == (0, "")
    body = [line for line in done.out.splitlines() if line.startswith("│")]
    assert [line.split("│")[1].strip() for line in body] == ["Full attention", "TOVA 8", "Window + sinks 4+4"]
    assert "passkey" not in done.out.lower()


def test_the_file_and_the_json_say_the_same(kvfold, folder):
    done = kvfold(f"eval tiny {SHORT} --time h2o:4+4 --dtype float32 --device cpu --out new/q.json --json")
    assert (done.code, done.err) == (0, "")
    printed = json.loads(done.out)
    ((result,), problems) = read_results(folder / "new" / "q.json")
    assert (result.kind, problems) == ("quality", [])
    assert [path.name for path in (folder / "new").iterdir()] == ["q.json"]
    assert {**result.data, **printed, "environment": 0} == {**result.data, "environment": 0}
    assert [row["method"] for row in result.rows] == ["full", "h2o:4+4"]
    assert result.rows[1]["kept_tokens"] == 8 and result.rows[1]["compression"] == 4
    assert result.data["model"]["name"] == "tiny"
    assert result.data["protocol"] == {"windows": 4, "context_tokens": 32, "batch": 2}
    assert result.data["command"].split()[0] == "kvfold"


def test_nothing_is_measured_twice(kvfold, readings, folder):
    first = kvfold(f"eval tiny {SHORT} --time tova:8 --json")
    assert set(readings) == {"full", "tova:8"}
    assert list((folder / "cache" / "cells").glob("*.json"))
    readings.clear()
    assert kvfold(f"eval tiny {SHORT} --time tova:8 --json") == first
    assert readings == []
    kvfold(f"eval tiny {SHORT} --time tova:8 --time window:4+4")
    assert "tova:8" not in readings and "window:4+4" in readings
    readings.clear()
    kvfold(f"eval tiny {SHORT} --time tova:8 --fresh")
    assert set(readings) == {"full", "tova:8"}


def test_several_texts(kvfold, folder):
    lines = [json.dumps({"text": (folder / "text.txt").read_text()})] * 2
    (folder / "two.jsonl").write_text("\n".join(lines))
    done = kvfold(f"eval tiny {SHORT} --text two.jsonl --chunk 8 --json")
    assert [row["text"] for row in json.loads(done.out)["rows"]] == ["text", "two"]


def test_the_text_that_kvfold_ships(kvfold):
    done = kvfold("eval tiny --context 32 --windows 2 --json")
    assert [row["text"] for row in json.loads(done.out)["rows"]] == ["persuasion"]


def test_a_text_with_too_few_windows_is_noted(kvfold):
    done = kvfold("eval tiny --text text.txt --context 200 --windows 32 --json")
    assert done.code == 0 and json.loads(done.out)["protocol"]["windows"] == 32
    assert done.err.startswith("note: text: the text has ") and done.err.count("\n") == 1


def test_passkeys(kvfold):
    line = "eval tiny --text text.txt --context 104 --windows 1 --time window:12+4 --passkey --passkey-tries 1"
    result = json.loads(kvfold(f"{line} --json").out)
    found = [(row["method"], row["depth"], row["tries"]) for row in result["passkey"]]
    assert found == [(method, depth, 1) for method in ("full", "window:12+4") for depth in (0.1, 0.5, 0.9)]
    done = kvfold(line)
    assert (done.code, done.err) == (0, "")
    assert "Passkey retrieval" in done.out and "Window + sinks 12+4" in done.out


def test_the_folder_one_stands_in_has_a_name(kvfold, folder, monkeypatch):
    monkeypatch.chdir(folder / "tiny")
    done = kvfold("eval . --context 32 --windows 1 --json", "--text", str(folder / "text.txt"))
    assert json.loads(done.out)["model"]["name"] == "tiny"


def test_trained_and_converted_models_beside_the_first(kvfold, folder):
    assert kvfold("convert tiny mqa --heads 1").code == 0
    train = "--data text.txt --tokens 256 --set sequence_tokens=32 --set batch_sequences=2 --no-calibrate"
    assert kvfold(f"retrofit tiny dms --adapter --time dms:8 --compression 2 {train}").code == 0
    assert kvfold(f"retrofit mqa tuned --lora 2 {train}").code == 0
    done = kvfold(f"eval tiny {SHORT} --time full --beside dms --beside mqa --beside mqa,tuned --json")
    assert done.code == 0, done.err
    rows = {row["method"]: row for row in json.loads(done.out)["rows"]}
    assert list(rows) == ["full", "dms:8 of dms", "full of mqa", "full of tuned"]
    assert rows["full of tuned"]["allocated_bytes"] == rows["full of mqa"]["allocated_bytes"]
    assert 0 < rows["full of mqa"]["kl"] != rows["full of tuned"]["kl"]
    body = [line for line in kvfold(f"eval tiny {SHORT} --beside dms --beside mqa").out.splitlines() if line[0] == "│"]
    assert [line.split("│")[1].strip() for line in body] == ["Full attention", "DMS 8 of dms", "mqa"]


@pytest.mark.parametrize(
    ("beside", "says"),
    [
        ("nowhere", "nowhere: no folder here"),
        ("tiny --beside tiny", "two models beside are called 'tiny'"),
    ],
)
def test_what_can_not_stand_beside(kvfold, beside, says, readings):
    assert says in kvfold(f"eval tiny {SHORT} --beside {beside}").error
    assert readings == []
