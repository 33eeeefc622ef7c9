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
