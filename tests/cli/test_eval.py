"""`kvfold eval`: rows beside the unfolded model, files that are whole, and no measurement made twice."""

import json
import shutil

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
    readings.clear()
    cell = next((folder / "cache" / "cells").glob("*tova-8*"))
    cell.write_text(cell.read_text().replace('"seconds": ', '"seconds": 1'))
    torn = json.loads(kvfold(f"eval tiny {SHORT} --time tova:8 --json").out)
    assert readings == []
    new = json.loads(kvfold(f"eval tiny {SHORT} --time tova:8 --fresh --json").out)
    assert json.loads(kvfold(f"eval tiny {SHORT} --time tova:8 --json").out)["rows"] == new["rows"] != torn["rows"]


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
    train = "--data text.txt --tokens 256 --set seq_len=32 --set global_batch_size=2 --no-calibrate"
    assert kvfold(f"retrofit tiny dms --adapter --time dms:8 --compression 2 {train}").code == 0
    assert kvfold(f"retrofit mqa tuned --lora 2 {train}").code == 0
    assert kvfold(f"retrofit tiny whole --full {train}").code == 0
    assert kvfold(f"retrofit whole further --lora 2 {train}").code == 0
    done = kvfold(
        f"eval tiny {SHORT} --time full --beside dms --beside mqa --beside mqa,tuned --beside whole --beside whole,further --json"
    )
    assert done.code == 0, done.err
    rows = {row["method"]: row for row in json.loads(done.out)["rows"]}
    assert list(rows) == ["full", "dms:8 of dms", "full of mqa", "full of tuned", "full of whole", "full of further"]
    tokens = {method: row.get("trained_tokens") for method, row in rows.items()}
    assert tokens == {"full": None, "dms:8 of dms": 256, "full of mqa": None, "full of tuned": 256} | {
        "full of whole": 256,
        "full of further": 512,
    }
    assert rows["full of tuned"]["allocated_bytes"] == rows["full of mqa"]["allocated_bytes"]
    assert 0 < rows["full of mqa"]["kl"] != rows["full of tuned"]["kl"]
    body = [
        line for line in kvfold(f"eval tiny {SHORT} --compare dms --compare mqa").out.splitlines() if line[0] == "│"
    ]
    assert [line.split("│")[1].strip() for line in body] == ["Full attention", "DMS 8 of dms", "mqa"]


@pytest.mark.parametrize(
    ("beside", "says"),
    [
        ("nowhere", "nowhere: no folder here"),
        ("tiny --compare tiny", "two models beside are called 'tiny'"),
    ],
)
def test_what_can_not_stand_beside(kvfold, beside, says, readings):
    assert says in kvfold(f"eval tiny {SHORT} --compare {beside}").error
    assert readings == []


QUESTIONS = [
    {"input": f"Was Anne {how}?", "choices": ["Yes", "No, she was not"], "gold": index % 2, "prefix": ""}
    for index, how in enumerate(("glad", "proud", "at home", "alone"))
]


@pytest.fixture
def anne(folder) -> str:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'kvfold[eval]'")
    (folder / "anne.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    shutil.copytree(folder / "tiny", folder / "ending")
    path = folder / "ending" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "!"}))
    return "anne.jsonl"


def test_a_tokenizer_without_an_end_is_refused(kvfold, anne):
    assert "the tokenizer names no eos token" in kvfold(f"eval tiny --tasks {anne}").error


def test_tasks_of_a_file(kvfold, folder, anne):
    line = f"eval ending --tasks {anne} --limit 3 --time h2o:2+2 --out new/t.json"
    done = kvfold(f"{line} --json")
    assert (done.code, done.err) == (0, "")
    printed = json.loads(done.out)
    assert printed["kind"] == "tasks" and printed["protocol"] == {"limit": 3, "batch": 32}
    assert [(row["task"], row["method"], row["items"]) for row in printed["rows"]] == [
        ("anne", "full", 3), ("anne", "h2o:2+2", 3),
    ]  # fmt: skip
    assert printed["rows"][1]["kept_tokens"] == pytest.approx(4)
    ((result,), problems) = read_results(folder / "new" / "t.json")
    assert (result.kind, result.rows, problems) == ("tasks", printed["rows"], [])
    table = kvfold(line)
    assert (table.code, table.err) == (0, "")
    assert "anne" in table.out and "H2O 2+2" in table.out and "acc" in table.out and "perplexity" not in table.out


def test_tasks_of_other_models(kvfold, anne):
    assert kvfold("convert ending mqa --heads 1").code == 0
    done = kvfold(f"eval ending --tasks {anne} --time h2o:2+2 --compare mqa --json")
    rows = json.loads(done.out)["rows"]
    assert [row["method"] for row in rows] == ["full", "h2o:2+2", "full of mqa"]
    own = json.loads(kvfold(f"eval mqa --tasks {anne} --json").out)["rows"]
    assert [row["value"] for row in rows[2:]] == [row["value"] for row in own] and rows[2]["difference"] is None


def test_tasks_beside_texts_and_passkeys(kvfold, anne):
    line = f"eval ending {SHORT} --tasks {anne} --passkey --passkey-tries 1 --passkey-length 110 --passkey-length 130"
    result = json.loads(kvfold(f"{line} --json").out)
    assert result["kind"] == "quality" and len(result["rows"]) == 1
    assert [row["task"] for row in result["tasks"]] == ["anne"]
    assert [row["length_tokens"] for row in result["passkey"]] == [110] * 3 + [130] * 3
    done = kvfold(line)
    assert all(title in done.out for title in ("Quality", "Passkey retrieval", "Tasks"))
