"""Models from scratch on the page: each at its best rate, over its seeds, and those that nothing beats."""

import json
import math
from dataclasses import replace

import pytest

import report_samples as samples
from html_reading import Page
from kvfold.report.design import Model, frontier, models_of
from kvfold.report.design_pairs import Pair, pairs_of, pairs_sheet
from kvfold.report.page import write_page

JUNK = (None, "x; y", [], {}, [[]], -1, 0, 1e-300, 1e29, math.nan)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scratch")
    for index, result in enumerate(samples.design_space()):
        (folder / f"{index}.json").write_text(json.dumps(result), encoding="utf-8")
    return Page(write_page(folder, folder / "page.html").read_text(encoding="utf-8"))


def rows_of_samples() -> list[dict]:
    return [result["rows"][0] for result in samples.design_space()]


def test_a_model_stands_at_its_best_rate_with_all_its_seeds(page):
    head, *lines = page.table("layers with KV", "seeds")
    found = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    assert list(found) == ["made-up-mha", "made-up-mqa", "made-up-mqa-cla2", "made-up-small"]
    mqa = found["made-up-mqa"]
    assert (mqa["held-out perplexity"], mqa["learning rate"]) == ("121.00 (120.00 to 122.00)", "0.00200")
    assert (mqa["rates"], mqa["seeds"], mqa["layers with KV"], mqa["published"]) == ("2", "2", "8 of 8", "13.54")
    assert found["made-up-mqa-cla2"]["held-out perplexity"] == "123.50"


def test_shared_layers_stand_beside_what_they_have_to_beat(page):
    """The same shape without sharing, and equal bytes; seeds are paired."""
    head, *lines = page.table("layers shared", "difference")
    found = [dict(zip(head, line, strict=True)) for line in lines]
    assert [(one["layers shared"], one["beside"], one["its bytes"]) for one in found] == [
        ("made-up-mqa-cla2", "made-up-mqa", "2.00×"), ("made-up-mqa-cla2", "made-up-small", "1.00×")
    ]  # fmt: skip
    assert [(one["difference"], one["seeds"]) for one in found] == [("+3.50", "1"), ("−3.50", "1")]
    assert [one["in percent"] for one in found] == ["+2.9 %", "−2.8 %"]
    assert [one["published"] for one in found] == ["+0.06, +0.4 %", "−0.21, −1.5 %"]
    assert [one["published, tuned"] for one in found] == ["+0.04, +0.3 %", "−0.31, −2.4 %"]


def test_a_difference_has_the_spread_of_its_seeds():
    def model(perplexities: list[float], **row) -> Model:
        runs = [{"seed": seed, "validation_perplexity": one, **row} for seed, one in enumerate(perplexities)]
        return Model(recipe="r", kv_bytes=8.0, runs=tuple(runs), rates=1)

    pair = Pair(shared=model([5.0, 7.0, 6.0], layers="cla2"), other=model([6.0, 7.5]))
    assert pair.differences == [-1.0, -0.5]
    assert [(one.shared, one.other) for one in pairs_of([pair.shared, pair.other])] == [(pair.shared, pair.other)]
    sheet = pairs_sheet([pair.shared, pair.other])
    assert sheet.rows[0][3:7] == (
        "−0.75 (−1.00 to −0.50)",
        "−0.75 (−1.00 to −0.50)",
        "−11.7 % (−16.7 % to −6.7 %)",
        "2",
    )


def test_seeds_by_which_a_rate_was_chosen_are_no_fresh_ones():
    """They did best of several runs, so they look better than the model is."""
    shape = {"kv_bytes_per_token": 8, "num_layers": 2}
    sharing = {"recipe": "shares", "layers": "cla2", **shape}
    runs = [(1e-3, 0, 5.0), (2e-3, 0, 9.0), (1e-3, 1, 7.0), (1e-3, 2, 6.5)]
    rows = [{**sharing, "learning_rate": rate, "seed": seed, "validation_perplexity": one} for rate, seed, one in runs]
    plain = {"recipe": "plain", "learning_rate": 1e-3, **shape}
    rows += [{**plain, "seed": seed, "validation_perplexity": 6.0} for seed in range(3)]
    (pair,) = pairs_of(models_of(rows))
    assert pair.shared.tuning_seeds == {0} and pair.other.tuning_seeds == frozenset()
    assert (pair.differences, pair.fresh_differences) == ([-1.0, 0.5, 1.0], [0.5, 1.0])
    assert pairs_sheet([pair.shared, pair.other]).rows[0][4] == "+0.75 (+0.50 to +1.00)"
    assert pairs_sheet([replace(pair.shared, runs=pair.shared.runs[:1]), pair.other]).rows[0][4] == "none"


def test_files_of_one_size_are_one_section_with_every_run_behind_it(page):
    assert "Trained from scratch: 4 models" in page.text and "that saw 999,424 tokens" in page.text
    assert len(page.table("recipe", "seed")) == 1 + 6


def test_a_file_of_another_size_is_a_section_of_its_own(tmp_path):
    one, two, other = samples.design_space()[:3]
    other["rows"][0] |= {"tokens": 1, "recipe": "other"}
    for index, result in enumerate((one, two, other)):
        (tmp_path / f"{index}.json").write_text(json.dumps(result), encoding="utf-8")
    text = Page(write_page(tmp_path, tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert text.count("Trained from scratch") == 2 and "models" not in text.partition("Trained from scratch")[2][:12]


def test_a_model_is_on_the_line_where_nothing_of_as_few_bytes_is_better():
    shown = frontier(models_of(rows_of_samples()))
    assert [one.recipe for one in shown] == ["made-up-mha", "made-up-mqa", "made-up-mqa-cla2"]


def test_of_equal_bytes_and_equal_perplexity_one_is_on_the_line():
    twice = [Model(recipe=name, kv_bytes=8.0, runs=({"validation_perplexity": 3.0},), rates=1) for name in "ab"]
    assert len(frontier(twice)) == 1


def test_the_picture_marks_every_model_and_every_loss(page):
    hovers = [one for one in page.words if "bytes a token, perplexity" in one]
    assert len(hovers) == 2 * 4 and any("made-up-mqa-cla2: 192 bytes a token, perplexity 124" in one for one in hovers)
    assert sum("tokens 333,824" in one for one in page.words) == 2 * 4  # wide, and for a phone


def test_junk_never_stops_the_section(tmp_path):
    first, second = rows_of_samples()[2:4]
    for key in first:
        for junk in JUNK:
            result = {"kind": "pretraining", "rows": [{**first, key: junk}, second, {**second, "recipe": "third"}]}
            (tmp_path / "x.json").write_text(json.dumps(result), encoding="utf-8")
            write_page(tmp_path / "x.json", tmp_path / "page.html")
