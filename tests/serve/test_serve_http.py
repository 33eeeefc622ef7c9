"""The load on an endpoint: both kinds of load, a trace, and failures that are counted instead of hidden."""

import json

import pytest

from kvfold.bench.serve import read_trace
from kvfold.bench.serve_http import Load, bench_serve, draw_requests
from kvfold.cli.bench import serve as bench_serving

TEXT = " ".join(f"word{number}" for number in range(300))


@pytest.mark.parametrize("load", [Load(clients=4), Load(rate=200.0)])
def test_what_clients_see(server, load):
    asked = draw_requests(TEXT, 12, prompt_words=(2, 8), max_tokens=(3, 9), time="dms:8")
    told = []
    found = bench_serve(f"{server.url}/v1", asked, load, report=lambda done, total: told.append((done, total)))
    assert found["completed"] == 12 and found["failed"] == 0 and found["model"] == "tiny" and told[-1] == (12, 12)
    assert found["output_tokens"] == sum(one.max_tokens for one in asked)
    assert found["prompt_tokens"] == sum(len(one.prompt) for one in asked)  # a token a byte
    assert (
        0 < found["first_token_ms"]["median"] <= found["whole_answer_ms"]["median"] <= found["whole_answer_ms"]["most"]
    )
    assert found["kept_tokens"] < found["seen_tokens"]
    json.dumps(found)


def test_a_trace_and_its_failures(server, tmp_path):
    trace = tmp_path / "trace.jsonl"
    rows = [{"prompt": "hello", "max_tokens": 3, "at_s": 0.0}, {"prompt": [1, 2], "max_tokens": 4, "at_s": 0.1}]
    rows.append({"prompt": "x" * 2000, "max_tokens": 4, "at_s": 0.1})
    trace.write_text("\n".join(map(json.dumps, rows)))
    found = bench_serve(f"{server.url}/v1", read_trace(trace), Load())
    assert found["completed"] == 2 and found["failed"] == 1 and "status 400" in found["errors"][0]


def test_what_makes_no_sense_is_said(server, tmp_path):
    with pytest.raises(ValueError, match="one of the two"):
        Load(rate=1.0, clients=2)
    with pytest.raises(ValueError, match="OpenAI endpoint"):
        bench_serve(f"{server.url}/v9", read_trace(write(tmp_path, '{"prompt": "a", "max_tokens": 1}')), Load())
    with pytest.raises(ValueError, match="line 1"):
        read_trace(write(tmp_path, '{"max_tokens": 1}'))


def test_the_command_writes_json_and_a_picture(server, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    out, picture = tmp_path / "load.json", tmp_path / "load.png"
    bench_serving(
        [f"{server.url}/v1"] * 2, clients=3, requests=6, text=text, prompt_words="2-8", max_tokens="3", out=out, picture=picture,
    )  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    assert [row["completed"] for row in rows] == [6, 6] and len(rows[0]["points"]) == 6
    assert picture.read_bytes().startswith(b"\x89PNG") and "6 of 6 requests" in capsys.readouterr().out


def write(folder, text):
    path = folder / "trace.jsonl"
    path.write_text(text)
    return path
