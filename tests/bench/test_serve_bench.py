"""Serving benchmarks: budgets, requests, what a run says; and `kvfold bench serve` is in tests/cli."""

import json
from functools import partial

import pytest

from byte_tokenizer import byte_tokenizer
from kvfold.bench.serve import (
    Wanted,
    bench_serve,
    budget_bytes,
    drawn_requests,
    parse_lengths,
    read_trace,
    run_batch,
    run_engine,
    tokenised,
)
from kvfold.data import TextFile
from tiny import tiny_model

REQUESTS = [Wanted(prompt=tuple(range(3 + place, 23 + place)), max_tokens=20) for place in range(8)]
TEXT = TextFile(name="text", documents=("abcdefghij" * 50,), digest="")


@pytest.mark.parametrize("number", [1, 3, 6])
def test_a_budget_holds_just_so_many_uncompressed_requests(number):
    model = tiny_model()
    run = run_engine(model, model.config.layout, budget_bytes(model, number, 39), REQUESTS)
    assert run.stats["most_running"] == number and run.stats["preemptions"] == 0 and run.tokens == 160


def test_sides_of_one_budget():
    model, kept = tiny_model(), []
    result = bench_serve(
        model, REQUESTS, name="tiny", methods=["full", "window:6+2"], budgets=[budget_bytes(model, n, 39) for n in (2, 8)],
        peers={"generate": partial(run_batch, model, lambda rows: model.new_cache(rows=rows, time="full"))}, repeats=2,
        keep=kept.append,
    )  # fmt: skip
    full, window, generate, ample, _ = result["rows"]
    assert [row["side"] for row in result["rows"]] == ["full", "window:6+2", "generate", "full", "window:6+2"]
    assert (full["most_running"], ample["most_running"]) == (2, 8) and window["most_running"] > 4
    assert full["over_first"]["median"] == 1.0 and generate["most_running"] is None
    assert full["compression"] == 1.0 and window["compression"] == pytest.approx(39 / 8)
    assert full["tokens_per_step"] <= 2 and full["holds_uncompressed"] == pytest.approx(2, abs=0.01)
    for row in (full, window):
        assert 0 < row["first_token_ms"]["p50"] <= row["first_token_ms"]["p95"] and row["inter_token_ms"]["p95"] > 0
        assert 0 < row["outside_forwards"]["median"] < 1 and row["prompt_tokens_read"] == 8 * 20
    assert kept[-1] is result and len(kept) == 2


def test_sides_write_the_same_tokens():
    model = tiny_model()
    ours = run_engine(model, model.config.layout, 10**6, REQUESTS)
    theirs = partial(run_batch, model, lambda rows: model.new_cache(rows=rows, time="full"))(REQUESTS)
    assert ours.outputs == theirs.outputs


def test_requests_that_come_later_wait_for_their_time():
    model = tiny_model()
    some = [Wanted(prompt=(5, 6, 7), max_tokens=2, at_s=at) for at in (0.0, 1.0)]
    run = run_engine(model, model.config.layout, 10**6, some)
    assert run.seconds >= 1.0 and max(run.first_token_s) < 1.0


def test_drawn_lengths_and_traces(tmp_path):
    tokenizer = byte_tokenizer()
    drawn = drawn_requests(9, (4, 12), (2, 6), TEXT, tokenizer, seed=1)
    assert drawn == drawn_requests(9, (4, 12), (2, 6), TEXT, tokenizer, seed=1)
    assert all(4 <= len(one.prompt) <= 12 and 2 <= one.max_tokens <= 6 for one in drawn)
    assert len({len(one.prompt) for one in drawn}) > 2
    assert (parse_lengths("7"), parse_lengths("7-9")) == ((7, 7), (7, 9))
    path = tmp_path / "trace.jsonl"
    path.write_text('{"prompt": [5, 6], "max_tokens": 3, "at_s": 2}\n\n{"prompt": "ab"}\n')
    first, second = tokenised(read_trace(path), tokenizer)
    assert (first.at_s, len(first.prompt), second) == (0.0, 2, Wanted(prompt=(5, 6), max_tokens=3, at_s=2.0))


@pytest.mark.parametrize("line", ["7", '{"prompt": []}', '{"prompt": [1], "max_tokens": 0}', '{"prompt": [-1]}', "{"])
def test_bad_traces(tmp_path, line):
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps({"prompt": [4]}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"trace\.jsonl.*2"):
        read_trace(path)


@pytest.mark.parametrize("text", ["", "0", "9-7", "a", "3-"])
def test_bad_lengths(text):
    with pytest.raises(ValueError, match="length"):
        parse_lengths(text)


def test_bad_benchmarks():
    model = tiny_model()
    with pytest.raises(ValueError, match="0 requests"):
        bench_serve(model, [], name="tiny", methods=["full"], budgets=[10**6])
    with pytest.raises(ValueError, match="reads 512 at most"):
        long = [Wanted(prompt=(5,), max_tokens=512)]
        bench_serve(model, long, name="tiny", methods=["full"], budgets=[10**6])
    with pytest.raises(ValueError, match="longer one"):
        drawn_requests(9, (100, 100), (1, 1), TEXT, byte_tokenizer())
