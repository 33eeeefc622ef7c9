"""`kvfold bench decode`, `kvfold report` and `kvfold demo`, small enough to run here."""

import json

import pytest

from kvfold import demo
from kvfold.bench.decode import Point
from kvfold.eval.reading import Protocol
from kvfold.models.load import load
from kvfold.report.results import read_results

BENCH = "bench decode tiny --batch 2 --prompt 8 --new 4 --repeats 1"


def test_both_sides(kvfold, folder):
    done = kvfold(f"{BENCH} --time full --time tova:4 --out decode.json --json")
    assert (done.code, done.err) == (0, "")
    ((result,), _) = read_results(folder / "decode.json")
    assert json.loads(done.out)["rows"] == result.rows
    assert [(row["method"], row["padded"]) for row in result.rows] == [
        (method, padded) for padded in (False, True) for method in ("full", "tova:4")
    ]
    for row in result.rows:
        assert (row["point"], row["batch"], row["new_tokens"]) == ("2 x (8 + 4)", 2, 4)
        assert row["ours"]["tokens_per_second"]["median"] > 0 < row["theirs"]["tokens_per_second"]["median"]
        assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]


def test_ours_alone_and_a_page_of_it(kvfold, folder):
    done = kvfold(f"{BENCH} --peers none --out results/decode.json")
    assert (done.code, done.err) == (0, "")
    assert "2 × (8 + 4), left-padded rows" in done.out and "not measured" in done.out
    assert "theirs" not in (folder / "results" / "decode.json").read_text()
    assert kvfold("report") == (0, "report.html\n", "")
    assert kvfold("report results/decode.json --out pages/one.html").out == "pages/one.html\n"
    for page in ("report.html", "pages/one.html"):
        text = (folder / page).read_text()
        assert text.startswith("<!doctype html>") and "2 × (8 + 4)" in text


def test_the_demo(kvfold, folder, monkeypatch):
    monkeypatch.setattr(demo, "bundled_model", lambda: folder / "tiny")
    monkeypatch.setattr(demo, "PROTOCOL", Protocol(windows=2, context_tokens=104, batch=2))
    # The shipped gates are for another model; this one's freed channel decides as it stands.
    monkeypatch.setattr(demo, "load", lambda source, adapter: load(source, time="dms:8", gates="channel"))
    monkeypatch.setattr(demo, "LEARNED", "dms:8")
    monkeypatch.setattr(demo, "QUICK_METHODS", ("dms:8", "window:28+4"))
    monkeypatch.setattr(demo, "SLOW_METHODS", ("tova:32",))
    monkeypatch.setattr(demo, "HELD_METHODS", ("full", "dms:8", "window:28+4"))
    monkeypatch.setattr(demo, "POINT", Point(name="2 x 8", batch=2, prompt_tokens=8, new_tokens=4))
    done = kvfold("demo --out shown")
    assert done.code == 0
    assert done.out.splitlines()[-1] == "the page: shown/index.html"
    assert [
        title for title in ("Quality", "Passkey retrieval", "Decode speed") if f"\n{title} " not in f"\n{done.out}"
    ] == []
    steps = [line.partition(":")[0].split()[0] for line in done.err.splitlines()]
    assert steps == ["loading", "quality", "quality", "passkeys", "memory", "speed", "next"]
    # The methods that are read in large pieces stand in a table while the others are measured.
    first, second = (part for part in done.out.split("Quality")[1:3])
    assert "TOVA" not in first and "TOVA" in second
    files = sorted(str(path.relative_to(folder)) for path in (folder / "shown").rglob("*") if path.is_file())
    assert files == [
        "shown/index.html",
        *(f"shown/results/{name}.json" for name in ("decode", "document", "kept", "memory", "quality")),
    ]
    results, problems = read_results(folder / "shown" / "results")
    assert problems == [] and {result.kind for result in results} == {"decode", "document", "kept", "memory", "quality"}
    page = (folder / "shown" / "index.html").read_text()
    assert page.startswith("<!doctype html>") and "TOVA" in page and demo.MODEL_NAME in page


@pytest.mark.parametrize("package", ["a_package_that_is_not_there", "json"])
def test_the_demo_without_its_model(kvfold, monkeypatch, package, folder):
    monkeypatch.setattr(demo, "PACKAGE", package)
    error = kvfold("demo --out shown").err
    assert "the demo's model is not installed" in error and "make demo" in error
    assert not (folder / "shown").exists()
