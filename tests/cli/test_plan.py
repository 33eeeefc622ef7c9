"""`kvfold plan`: the planner's numbers, as a table or as JSON."""

import json

import pytest

from kvfold.layout.planner import plan, weight_bytes

EVERYTHING = "--layers cla2 --heads 4 --time h2o:512+512 --bits int8 --kv-memory 16GB --context 32k --batch 4"


def test_every_axis_has_a_row(kvfold):
    done = kvfold(f"plan llama-3.1-8b {EVERYTHING} --json")
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    assert (result["kind"], result["model"]["name"]) == ("plan", "llama-3.1-8b")
    assert (result["context_tokens"], result["batch"]) == (32_768, 4)
    names = ["as it is", "heads 4", "layers cla2", "time h2o:512+512", "bits int8", "together"]
    assert [row["name"] for row in result["rows"]] == names
    whole = plan("llama-3.1-8b", layers="cla2", heads=4, time="h2o:512+512", bits="int8")
    last = result["rows"][-1]
    assert last["bytes"] == whole.bytes([32_768] * 4)
    assert last["bytes_per_token"] == whole.bytes_per_token
    assert last["max_rows"] == whole.max_rows(16 * 10**9, 32_768)
    assert last["max_context_tokens"] == whole.max_context_tokens(16 * 10**9, 4)
    assert last["compression"] == pytest.approx(result["rows"][0]["bytes"] / last["bytes"])
    assert (last["layers"], last["time"], last["bits"]) == ("cla2", "h2o:512+512", "int8")


def test_the_table(kvfold):
    done = kvfold(f"plan llama-3.1-8b {EVERYTHING}")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "llama-3.1-8b: 4 rows of 32,768 tokens in 16GB of cache"
    assert sum("│" in line for line in lines) == 6
    assert "131,072" in done.out and "17.4 GB" in done.out and "longest context" in done.out


def test_of_a_devices_memory_the_weights_are_subtracted(kvfold):
    done = kvfold("plan llama-3.1-8b --memory 24GB --context 32k")
    assert done.out.splitlines()[0] == "llama-3.1-8b: 1 row of 32,768 tokens in 24GB less 16.1 GB of weights"
    row = json.loads(kvfold("plan llama-3.1-8b --memory 24GB --context 32k --json").out)["rows"][0]
    left = 24 * 10**9 - weight_bytes("llama-3.1-8b")
    assert row["max_rows"] == plan("llama-3.1-8b").max_rows(left, 32_768) == 1


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("plan llama-3.1-8b --memory 8GB", "the weights of llama-3.1-8b take 16.1 GB: name a larger device"),
        ("plan cla-1b-h128-mqa-cla2 --memory 8GB", "config does not tell what its weights weigh: give --kv-memory"),
        ("plan llama-3.1-8b --memory 8GB --kv-memory 8GB", "one is the device's, the other the cache's alone"),
    ],
)
def test_memory_that_does_not_do(kvfold, words, error):
    done = kvfold(words)
    assert done.code == 2 and error in done.err and done.err.count("\n") == 1


def test_without_options_the_model_as_it_is(kvfold):
    done = kvfold("plan llama-3.1-8b")
    assert done.out.splitlines()[0] == "llama-3.1-8b: 1 row of 4,096 tokens"
    assert "as it is" in done.out and "131,072" in done.out and "together" not in done.out
    assert "longest context" not in done.out


@pytest.mark.parametrize("source", ["tiny", "tiny/config.json", "./tiny/"])
def test_a_checkpoint(kvfold, source):
    done = kvfold(f"plan {source} --layers 0_0 --context 128 --json")
    # Keys and values of two layers, two heads of 8, fp32; sharing halves them.
    assert [row["bytes_per_token"] for row in json.loads(done.out)["rows"]] == [256, 128]


def test_what_is_planned_only_can_be_planned(kvfold):
    done = kvfold("plan tiny --time dms:16 --bits int8,int4 --context 256 --json")
    assert done.code == 0
    assert json.loads(done.out)["rows"][-1]["bits"] == "int8,int4"


def test_a_plan_in_json_is_a_result_that_the_report_reads(kvfold, folder):
    (folder / "results").mkdir()
    (folder / "results" / "plan.json").write_text(kvfold("plan tiny --heads 1 --json").out)
    assert kvfold("report").code == 0
    assert "heads 1" in (folder / "report.html").read_text()
