"""`kvfold generate`: the text to stdout, what the cache held to stderr."""

import json

import pytest

PROMPT = "Sir Walter Elliot, of Kellynch Hall"
LINE = "generate tiny --max-new-tokens 24"


def test_text_to_stdout_and_figures_to_stderr(kvfold):
    done = kvfold(LINE, PROMPT, "--time", "tova:8")
    assert done.code == 0
    assert done.out.startswith(PROMPT) and len(done.out) > len(PROMPT) + 24
    assert done.err.count("\n") == 1
    assert (
        done.err.startswith("tova:8: ")
        and " 8 kept a head, " in done.err
        and " kB held where a full cache takes " in done.err
    )


def test_json(kvfold):
    done = kvfold(LINE, PROMPT, "--time", "h2o:4+4", "--json")
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    assert result["text"].startswith(PROMPT) and result["method"] == "h2o:4+4"
    assert result["kept_tokens"] == [[8, 8], [8, 8]] and result["seen_tokens"] > 24
    assert 0 < result["allocated_bytes"] < result["full_bytes"]
    assert kvfold(LINE, PROMPT, "--time", "h2o:4+4").out.rstrip("\n") == result["text"]


@pytest.mark.parametrize("given", [["-"], []])
def test_a_prompt_from_stdin(kvfold, given):
    done = kvfold(LINE, *given, "--json", stdin=PROMPT)
    assert json.loads(done.out) == json.loads(kvfold(LINE, PROMPT, "--json").out)


def test_draws_are_repeatable(kvfold):
    def draw(seed: int) -> str:
        return kvfold(LINE, PROMPT, "--temperature", "1.5", "--seed", str(seed)).out

    assert draw(1) == draw(1) != draw(2)
    assert draw(1).startswith(PROMPT)


def test_another_dtype(kvfold):
    full = json.loads(kvfold(LINE, PROMPT, "--json").out)["full_bytes"]
    half = json.loads(kvfold(LINE, PROMPT, "--json", "--dtype", "bfloat16", "--device", "cpu").out)["full_bytes"]
    assert 0.5 < half / full < 0.7


def test_a_file_of_requests_is_answered_line_by_line(kvfold, folder):
    lines = [{"prompt": "ab", "max_tokens": 3}, {"prompt": [5, 6, 7]}, {"prompt": ""}, "only a text"]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    done = kvfold("generate tiny --input in.jsonl --output out.jsonl --kv-memory 4MB --max-new-tokens 5 --json")
    assert done.code == 0
    told = json.loads(done.out)
    assert (told["answered"], told["errors"]) == (5, 2) and told["stats"]["running"] == 0
    answers = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [one["line"] for one in answers] == [1, 2, 3, 4, 5]
    assert [len(one["choices"][0]["token_ids"]) for one in answers] == [3, 5, 0, 5, 0]
    assert all("error" in answers[place]["choices"][0] for place in (2, 4))
    again = kvfold("generate tiny --input in.jsonl --output out.jsonl --kv-memory 4MB")
    assert again.code == 0 and "0 answered" in again.err and "5 were there" in again.err
    alone = kvfold("generate tiny --input in.jsonl")
    assert alone.code == 2 and "give both" in alone.err
