"""`kvfold inspect` and `kvfold bench train`, small enough to run here."""

import json

import pytest

from kvfold.report.results import read_results

INSPECT = "inspect tiny --text text.txt --tokens 80"
SERVE = "bench serve tiny --requests 4 --prompt 20 --new 10 --text text.txt"
TRAIN = "bench train tiny --sequence 24 --repeats 1"


def test_a_text_is_looked_into_and_drawn(kvfold, folder):
    done = kvfold(f"{INSPECT} --time full --time window:28+4 --head 1.1 --out results/inside.json --json")
    assert (done.code, done.err) == (0, "")
    ((result,), _) = read_results(folder / "results" / "inside.json")
    assert result.kind == "document" and json.loads(done.out)["rows"] == result.rows
    assert "".join(result.data["tokens"]) == (folder / "text.txt").read_text()[: len("".join(result.data["tokens"]))]
    full, window = result.rows
    assert (full["compression"], window["compression"]) == (1.0, 2.5)
    assert [(one["layer"], one["head"]) for one in window["heads"]] == [(1, 1)]
    assert window["heads"][0]["states"] == "kkkk" + "g" * 48 + "k" * 28
    assert kvfold("report").out == "report.html\n"
    assert "Inside one text, text" in (folder / "report.html").read_text()


def test_three_heads_are_chosen_by_what_their_gates_keep(kvfold):
    """Gates that were never trained read the channel as it stands."""
    done = kvfold(f"{INSPECT} --time dms:16 --gates channel --json")
    assert (done.code, done.err) == (0, "")
    (row,) = json.loads(done.out)["rows"]
    kept = [one["kept_tokens"] for one in row["heads"]]
    assert len(kept) == 3 and kept == sorted(kept) and kept[0] < kept[-1] < 80
    told = kvfold(f"{INSPECT} --time dms:16 --gates channel").out
    assert "DMS 16" in told and f" {kept[0]} " in told and f" {kept[-1]} " in told


def test_requests_in_a_budget(kvfold, folder):
    line = f"{SERVE} --offline --time full --time window:6+2 --budget 2 --budget 1MB --peers generate"
    done = kvfold(f"{line} --out serve.json --json")
    assert done.code == 0, done.err
    ((result,), _) = read_results(folder / "serve.json")
    assert result.kind == "serve" and json.loads(done.out)["rows"] == result.rows
    assert [row["side"] for row in result.rows] == ["full", "window:6+2", "generate", "full", "window:6+2"]
    assert result.rows[0]["most_running"] < result.rows[1]["most_running"] == 4
    done = kvfold(f"{SERVE} --offline --time full --budget 2")
    assert done.code == 0 and "Serving" in done.out and "most at once" in done.out
    assert kvfold("report serve.json").code == 0 and "Serving" in (folder / "report.html").read_text()


def test_what_a_step_costs(kvfold, folder):
    done = kvfold(f"{TRAIN} --time dms:4 --time dmc --out step.json --json")
    assert (done.code, done.err) == (0, "")
    ((result,), _) = read_results(folder / "step.json")
    assert result.kind == "step" and json.loads(done.out)["rows"] == result.rows
    assert [(row["method"], row["trains"], row["loss"]) for row in result.rows] == [
        ("dms:4", "full", "reverse"), ("dmc:12", "full", "none"),
    ]  # fmt: skip
    assert all(row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"] for row in result.rows)
    done = kvfold(f"{TRAIN} --time dms:4 --train adapter --batch 2")
    assert (done.code, done.err) == (0, "") and "gates alone" in done.out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"{INSPECT} --head 3", "--head '3'"),
        (f"{INSPECT} --head 2.0", "there is no cache of that head"),
        ("inspect tiny --text none.txt", "none.txt: there is no such file"),
        ("inspect tiny --text text.txt --tokens 257", "the model reads 256 at most"),
        ("inspect tiny --text text.txt --tokens 1", "a text to look at has 2 or more"),
        (f"{INSPECT} --out .", "no file can be written there"),
        (f"{SERVE} --offline --prompt 9-4", "length '9-4'"),
        (f"{SERVE} --offline --budget 0", "--budget '0'"),
        (f"{SERVE} --offline --peers sglang", "peers 'sglang'"),
        (f"{SERVE} --offline --new 512", "the model reads 256 at most"),
        (f"{SERVE} --offline --trace none.jsonl", "none.jsonl: there is no such file"),
        (f"{TRAIN} --train some", "train 'some'"),
        (f"{TRAIN} --time tova:4", "it learns nothing"),
        (f"{TRAIN}", "dms:128 drops nothing in so few tokens"),
        ("bench train tiny --sequence 1024", "the model reads 256 at most"),
    ],
)
def test_what_can_not_be_done_is_one_line(kvfold, folder, line, says):
    before = sorted(folder.iterdir())
    assert says in kvfold(line).error
    assert sorted(folder.iterdir()) == before
