"""What the page shows of one text and of one run: the pictures say what the numbers say."""

import json
import re

import pytest

import report_samples as samples
from html_reading import Page
from kvfold.report import numbers
from kvfold.report.page import write_page
from kvfold.report.pictures.curve import layers_of, series_of
from kvfold.report.pictures.growth import growth_of
from kvfold.report.pictures.kept import COMPRESSION_NAME, compression_map, scale_of
from kvfold.report.pictures.tokens import head_texts
from kvfold.report.results import read_results


def page_of(tmp_path, result: dict) -> tuple[str, Page]:
    (tmp_path / "one.json").write_text(json.dumps(result), encoding="utf-8")
    text = write_page(tmp_path / "one.json", tmp_path / "page.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_compression_of_each_head_is_seen_over_kept():
    row = samples.document()["rows"][0]
    one = compression_map(row)
    assert one.value_name == COMPRESSION_NAME and one.owners == tuple(range(12))
    for line, kept in zip(one.values, row["kept"], strict=True):
        assert line == pytest.approx([360 / count for count in kept])
    assert scale_of([one]) == (1.0, pytest.approx(360 / min(min(line) for line in row["kept"])))
    assert one.hovers[2][1].startswith(f"layer 2, head 1: {row['kept'][2][1]} of 360 kept: ")
    assert compression_map({"kept": [[0, -1, 5]], "seen_tokens": 10}).values == ((None, None, 2.0),)


def test_growth_keeps_its_columns_together():
    row = {"over_time": {"tokens": [32, 0, None, 16], "mean": [4, 0, 3, 2], "least": [1, 0, 1, None], "most": [9, 0]}}
    growth = growth_of(row)
    assert growth.tokens == (0, 16, 32)
    assert (
        growth.kept["mean"] == (0, 2, 4)
        and growth.kept["least"] == (0, None, 1)
        and growth.kept["most"] == (0, None, 9)
    )
    assert growth_of({"over_time": {"tokens": [1]}}) is None


def test_runs_are_boxes_of_their_own():
    head = {"layer": 1, "head": 0, "kept_tokens": 4, "states": "kmkmmkkgw"}
    (one,) = head_texts({"seen_tokens": 9, "heads": [head]}, [*"abcdefgh", ""])
    assert one.marks == (("k", "a", 1), ("m", "bc", 2), ("m", "def", 3), ("k", "g", 1), ("g", "h", 1), ("w", "·", 1))
    assert one.name == "layer 1, head 0: 4 of 9 kept (2.25×)"


def test_the_text_is_read_whole_and_marked_by_more_than_colour(tmp_path):
    result = samples.document()
    text, page = page_of(tmp_path, result)
    whole = "".join(result["tokens"])
    shown = [re.sub(r"<[^>]+>", "", body) for body in re.findall(r'<p class="held">(.*?)</p>', text, re.DOTALL)]
    # Three heads of DMS, three of DMC, and the window's once: a page, and the rest.
    assert len(shown) == 14 and all(f"{first}{rest}" == whole for first, rest in zip(*[iter(shown)] * 2, strict=True))
    assert "Every head asked for: 64 of 360 kept (5.62×)" in page.text
    runs = [attributes for name, attributes in page.tags if name == "span" and attributes.get("class") == "run"]
    # One more in the legend.
    assert len(runs) == 360 // 4 + 360 // 2 + 1 and runs[0]["title"] == "4 tokens in one entry"
    assert sum(name == "s" for name, _ in page.tags) > 100
    for word in ("kept", "merged", "too new to go", "let go"):
        assert re.search(rf">{word}</(span|s)>", text)
    for rule in (r"\.held s \{[^}]*line-through", r"\.waiting \{[^}]*dotted", r"\.run \{[^}]*outline"):
        assert re.search(rule, text)


def test_what_heads_keep_is_in_the_tables(tmp_path):
    _, page = page_of(tmp_path, samples.document())
    assert page.table("kept, mean", "kept, least")[1][:3] == ["DMS 64", "360", "1.88×"]
    growth = page.table("tokens seen", "DMS 64, mean", "DMC 12, most")
    assert growth[-1][:4] == ["360", numbers.three(180.0), numbers.three(72.0), numbers.three(324.0)]
    assert "measured 2031-02-03 04:05" in page.text


def test_a_runs_curve_is_found_in_its_folder(tmp_path):
    out = tmp_path / "my-adapter"
    (out / "training").mkdir(parents=True)
    lines = [json.dumps(row) for row in samples.curve()["rows"]]
    (out / "training" / "curve.jsonl").write_text("\n".join(lines) + '\n{"step": 41, "lo')
    (out / "training" / "run.json").write_text(json.dumps({"source": "/somewhere/tiny.gguf", "settings": {}}))
    (out / "training" / "done.json").write_text(json.dumps({"command": "kvfold retrofit tiny my-adapter"}))
    (out / "adapter.json").write_text("{}")
    (result,), problems = read_results(out)
    assert (result.kind, result.name, len(result.rows)) == ("curve", "my-adapter/training/curve.jsonl", 40)
    assert result.data["model"]["name"] == "tiny" and len(problems) == 1
    page = Page(write_page(out, tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "How a retrofit went: my-adapter" in page.text and "kvfold retrofit tiny my-adapter" in page.text
    steps = page.table("step", "loss", "asked for")
    assert len(steps) == 41 and steps[40][:3] == ["40", "163,840", numbers.three(0.1 + 1 / 40)]
    assert "next token" not in steps[0]


def test_curves_lie_among_other_results_too(tmp_path):
    samples.write_samples(tmp_path)
    (tmp_path / "mine.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.5}\n')
    (tmp_path / "other.jsonl").write_text('{"text": "no steps"}\n')
    found, problems = read_results(tmp_path)
    assert [len(one.rows) for one in found if one.name == "mine.jsonl"] == [2]
    assert problems == ["other.jsonl: no steps of a retrofit in it"]
    (alone,), _ = read_results(tmp_path / "mine.jsonl")
    assert alone.rows[1]["loss"] == 1.5


def test_long_runs_show_means_of_neighbours():
    rows = [{"step": step, "loss": float(step), "layer_compression": [1.0, float(step)]} for step in range(1, 1001)]
    (line,) = series_of(rows, {"loss": ("loss", False), "none": ("none", True)}, most=100)
    assert len(line.points) == 100 and line.points[0] == (10, 5.5) and line.points[-1] == (1000, 995.5)
    stretches = layers_of(rows, 50)
    assert len(stretches) == 50 and stretches[-1] == (1000, [1.0, 990.5])


def test_what_a_step_costs_is_on_the_page(tmp_path):
    result = samples.step()
    _, page = page_of(tmp_path, result)
    cells = page.table("method", "cost", "trained weights")
    assert cells[1][:5] == ["DMS 128", "all weights", "KL of student from teacher", "1,024", "1"]
    assert cells[2][2] == "next token"
    for row, line in zip(result["rows"], cells[1:], strict=True):
        spread = row["ratio"]
        assert line[7] == numbers.middle(spread["min"], spread["median"], spread["max"], "×")
    assert "DMC 12, all weights, 1 × 1,024 tokens" in page.text and "134,567,890" in page.text
