"""Perplexity over tokens of training: the best at each length, and a straight line beyond that says what it is."""

import json
import math

import pytest

import report_samples as samples
from html_reading import Page
from kvfold.report.page import write_page
from kvfold.report.pictures.uptraining import roads_of

LAW = {20_000: 200.0, 80_000: 100.0, 320_000: 50.0, 1_280_000: 25.0}
"""Half as much worse for four times the tokens."""


def row(name: str, tokens: int | None, change: float, **given) -> dict:
    return {
        "method": f"full of {name}", "title": name, "model": name, "trained": True, "trained_tokens": tokens, "text": "brown",
        "layers": "cla2", "perplexity": 30 * (1 + change / 100), "compression": 1.0, "allocated_bytes": 50, "full_bytes": 100,
        "perplexity_change_percent": {"mean": change, "standard_error": 1.5}, **given,
    }  # fmt: skip


def law(**given) -> list[dict]:
    return [row(f"after-{tokens}", tokens, change, **given) for tokens, change in LAW.items()]


def test_a_power_law_goes_on_as_it_is():
    (road,) = roads_of(law())
    assert [stage.change for stage in road.best] == list(LAW.values())
    assert road.beyond(5_120_000) == pytest.approx(12.5)
    assert road.beyond(1_280_000 * 16) == pytest.approx(6.25)


def test_the_line_joins_the_best_and_the_extrapolation_rests_on_its_last_three():
    worse = [row("other-loss", 80_000, 180.0), row("wasted", 640_000, 60.0), row("start", 5_000, 201.0)]
    (road,) = roads_of(law() + worse)
    assert [stage.name for stage in road.best] == ["start", *(f"after-{tokens}" for tokens in LAW)]
    assert len(road.stages) == 7 and road.beyond(5_120_000) == pytest.approx(12.5)


def test_layouts_and_texts_are_told_apart_and_so_are_bytes():
    rows = law() + law(text="wiki") + law(layers="0_0_0_3") + law(allocated_bytes=25)
    assert len(roads_of(rows)) == 4
    assert {len(road.stages) for road in roads_of(rows)} == {4}


@pytest.mark.parametrize(
    "rows",
    [
        [],
        law()[:2],
        law(allocated_bytes=100),  # nothing is stored less
        law(method="dms:128 of a", compression=2.0),
        [row("a", tokens, 10.0) for tokens in (1, 2, 3)],  # it never falls
        [row("a", None, 30.0), row("b", 0, 20.0), row("c", 5, -1.0), row("d", 6, math.nan), row("e", 7, 0.0)],
    ],
)
def test_where_there_is_no_such_line_none_is_drawn(rows):
    assert roads_of(rows) == []


def test_the_page_shows_it_and_says_what_was_not_measured(tmp_path):
    result = samples.quality(texts=("brown", "wiki"))
    result["rows"] += [*law(), row("mean", 320000, 300.0), *law(text="wiki")]
    (tmp_path / "a.json").write_text(json.dumps(result), encoding="utf-8")
    html = write_page(tmp_path, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "What training gives back" in html and html.count("Perplexity change over tokens of training, text") == 4
    head, *lines = Page(html).table("layers", "tokens", "change")
    assert head == ["model", "layers", "text", "tokens", "change"]
    assert lines[0] == ["after-20000", "cla2", "brown", "20,000", "+200.0 ± 1.5 %"]
    assert [line for line in lines if line[0].startswith("extrapolated")] == [
        ["extrapolated, not measured", "cla2", text, "12,800,000", "+7.91 %"] for text in ("brown", "wiki")
    ]


def test_without_trained_models_the_page_is_silent_about_it(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(samples.quality()), encoding="utf-8")
    assert "What training gives back" not in write_page(tmp_path, tmp_path / "p.html").read_text(encoding="utf-8")
