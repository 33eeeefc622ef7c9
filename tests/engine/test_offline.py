"""A file of requests: one line out for each line in, in order, whatever is wrong with some, however often it is interrupted."""

import json

import pytest

from kvfold.engine import answers
from kvfold.engine.answers import answer_file
from kvfold.engine.engine import Engine
from tiny import TOKENIZER, tiny_model

LINES = [
    *(
        json.dumps({"id": f"q{number}", "prompt": "hello " * (1 + number % 5), "max_tokens": 2 + number % 7})
        for number in range(9)
    ),
    "",
    "{broken",
    '"a text alone"',
    '{"prompt": "a", "temperature": -1}',
    '{"prompt": "a", "n": 2, "logprobs": 1}',
    "[1, 2, 3]",
]
DEFAULTS = {"temperature": 0, "max_tokens": 4}


@pytest.fixture
def engine():
    with Engine(tiny_model(), TOKENIZER, "400kB", page_slots=4) as made:
        yield made


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_out_for_each_line_in_and_errors_are_records(engine, source, tmp_path):
    told = []
    counts = answer_file(
        engine, source, tmp_path / "out.jsonl", defaults=DEFAULTS, report=lambda *one: told.append(one)
    )
    records = read(tmp_path / "out.jsonl")
    assert [one["line"] for one in records] == [number for number, line in enumerate(LINES, 1) if line]
    assert counts == {"answered": 14, "errors": 2, "skipped": 0}
    assert [one.get("id") for one in records[:9]] == [f"q{number}" for number in range(9)]
    assert [len(one["choices"][0]["token_ids"]) for one in records[:9]] == [2 + number % 7 for number in range(9)]
    broken, text, negative, two, ids = records[9:]
    assert broken["choices"][0]["error"].startswith("the line must be a JSON object")
    assert "temperature" in negative["choices"][0]["error"]
    assert len(text["choices"][0]["token_ids"]) == len(ids["choices"][0]["token_ids"]) == 4
    assert len(two["choices"]) == 2 and len(two["choices"][1]["logprobs"]) == 4
    assert told == [(number, 14) for number in range(1, 15)]


@pytest.mark.parametrize("cut", [0, 1, 400, 2000])
def test_a_second_run_goes_on_where_the_first_was_cut_off(engine, source, tmp_path, cut):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    answer_file(engine, source, whole, defaults=DEFAULTS)
    part.write_bytes(whole.read_bytes()[:cut])
    counts = answer_file(engine, source, part, defaults=DEFAULTS)
    assert counts["skipped"] + counts["answered"] == 14 and counts["skipped"] == whole.read_bytes()[:cut].count(b"\n")
    for one, other in zip(read(part), read(whole), strict=True):
        for ours, theirs in zip(one["choices"], other["choices"], strict=True):
            # Logprobs depend on who else ran, up to rounding.
            near = [[token["logprob"] for token in choice.pop("logprobs", [])] for choice in (ours, theirs)]
            assert ours == theirs and near[0] == pytest.approx(near[1], abs=1e-4)
    assert answer_file(engine, source, part)["answered"] == 0


def test_lines_are_answered_in_order_with_a_short_lookahead(engine, source, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "LOOKAHEAD", 2)
    answer_file(engine, source, tmp_path / "out.jsonl", defaults=DEFAULTS)
    lines = [one["line"] for one in read(tmp_path / "out.jsonl")]
    assert lines == sorted(lines) and len(lines) == 14


def test_an_output_of_another_input_is_refused(engine, source, tmp_path):
    out = tmp_path / "out.jsonl"
    answer_file(engine, source, out, defaults=DEFAULTS)
    source.write_text(json.dumps({"prompt": "other"}) + "\n")
    with pytest.raises(ValueError, match="line 1 must answer line 1"):
        answer_file(engine, source, out)
    with pytest.raises(ValueError, match="must be a file of JSON lines"):
        answer_file(engine, tmp_path / "none.jsonl", out)
