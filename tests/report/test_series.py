"""What is drawn, before it is drawn: names, colours, lines, maps, texts, and what training gives back."""

import math

import pytest

import report_samples as samples
from kvfold.report.page import head_texts
from kvfold.report.pictures import axes_of, scale_of
from kvfold.report.results import Result
from kvfold.report.series import (
    Line,
    Point,
    colours_of,
    family_of,
    growth_of,
    kept_share,
    label_of,
    layers_of,
    quality_lines,
    roads_of,
    runs_of,
)
from kvfold.report.sheets import COMPRESSION_NAME, head_map
from report_samples import trained, trained_row


@pytest.mark.parametrize(
    ("row", "family", "label"),
    [
        ({"method": "h2o:128+128", "title": "H2O"}, "h2o", "H2O 128+128"),
        ({"method": "full", "title": "full attention"}, "full", "Full attention"),
        ({"method": "tova:64; 0-3=full", "title": "mixed"}, "tova:64; 0-3=full", "tova:64; 0-3=full"),
        ({"method": "own:7"}, "own", "own:7"),
        ({"title": "something"}, "something", "Something"),
        ({}, "unnamed", "Unnamed"),
    ],
)
def test_names(row, family, label):
    assert (family_of(row), label_of(row)) == (family, label)


def test_a_line_is_a_method_and_growing_budgets_are_another():
    def row(method, share, change):
        return {
            "method": method, "title": "H2O", "text": "t", "allocated_bytes": share, "full_bytes": 100,
            "perplexity_change_percent": {"mean": change, "standard_error": 0.5},
        }  # fmt: skip

    rows = [
        row("h2o:1+1", 25, 9),
        row("h2o:2+2", 50, 3),
        row("h2o:12%+13%", 25, 30),
        row("full", 100, 0),
        {"text": "t"},
    ]
    fixed, growing = quality_lines(rows, "t")
    assert [(point.share, point.change, point.error) for point in fixed.points] == [(0.5, 3, 0.5), (0.25, 9, 0.5)]
    assert (fixed.title, growing.title, fixed.family) == ("H2O", "H2O %", "h2o") and growing.grows
    assert quality_lines(rows, "other") == []


def test_a_method_on_a_smaller_model_is_no_budget_of_the_method_alone():
    def row(model, compression, share):
        return {
            "method": f"dms:128 of {model}", "title": "DMS", "model": model, "text": "t", "compression": compression,
            "allocated_bytes": share, "full_bytes": 100, "perplexity_change_percent": {"mean": 1.0},
        }  # fmt: skip

    alone, on_top = quality_lines([row("dms-2x", 2.0, 52), row("dms-4x", 4.0, 26), row("cla2-dms", 2.0, 26)], "t")
    assert (alone.title, len(alone.points)) == ("DMS", 2)
    assert (on_top.title, len(on_top.points), on_top.family) == ("DMS of cla2-dms", 1, "dms")


def test_share_without_bytes_is_that_of_the_compression():
    assert kept_share({"compression": 4.0}) == 0.25
    assert kept_share({"compression": 4.0, "allocated_bytes": 3, "full_bytes": 10}) == 0.3
    assert kept_share({"compression": 0}) is None and kept_share({"allocated_bytes": 3}) is None


def test_every_picture_of_a_page_has_the_same_colours():
    results = [
        Result(name="a", data={"kind": "memory", "rows": [{"method": "tova:1"}, {"method": "full"}]}),
        Result(name="b", data={"kind": "quality", "rows": [{"method": "h2o:1+1"}, {"method": "tova:25%"}]}),
    ]
    assert colours_of(results) == {"full": 0, "h2o": 1, "tova": 2}
    many = Result(name="c", data={"kind": "kept", "rows": [{"method": f"m{index}"} for index in range(20)]})
    assert set(colours_of([many]).values()) == set(range(8))


def _line(*changes: float) -> Line:
    points = tuple(
        Point(share=0.5 / (index + 1), change=change, error=None, row={}) for index, change in enumerate(changes)
    )
    return Line(title="x", family="x", grows=False, points=points)


def test_the_scale_bends_only_where_small_and_large_stand_side_by_side():
    assert not axes_of([("", [_line(1, 3)])]).bent and axes_of([("", [_line(1, 40)])]).bent
    bent, straight = axes_of([("", [_line(1, 40)])]), axes_of([("", [_line(-2, 3)])])
    assert {0.0, 1.0, 10.0, 20.0} <= set(bent.levels()) and straight.low < -2 and straight.high > 3
    assert bent.shares() == [1.0, 0.5, 0.25] and bent.most == pytest.approx(1.0, rel=0.05)


def test_models_that_store_more_than_the_full_cache_are_inside_the_picture():
    def line(share: float) -> Line:
        return Line(title="x", family="x", grows=False, points=(Point(share=share, change=2.0, error=None, row={}),))

    axes = axes_of([("", [line(1.9), line(0.5)])])
    assert axes.shares() == [1.0, 0.5] and axes.most > 1.9
    assert axes_of([("", [line(16.0), line(0.25)])]).shares() == [16.0, 4.0, 1.0, 0.25]
    other, method = quality_lines([_full_of("m", 16.0), {**_full_of("m", 0.5), "method": "h2o:8+8"}], "t")
    assert (other.from_unfolded, method.from_unfolded) == (False, True)


def _full_of(model: str, share: float) -> dict:
    return {
        "method": f"full of {model}", "model": model, "text": "t", "compression": 1 / share, "allocated_bytes": share,
        "full_bytes": 1.0, "perplexity_change_percent": {"mean": 2.0},
    }  # fmt: skip


def test_compression_of_each_head_is_seen_over_kept():
    row = samples.document()["rows"][0]
    one = head_map(row, of_compression=True)
    assert one.value_name == COMPRESSION_NAME and one.owners == tuple(range(12))
    for line, kept in zip(one.values, row["kept"], strict=True):
        assert line == pytest.approx([360 / count for count in kept])
    assert scale_of([one]) == (1.0, pytest.approx(360 / min(min(line) for line in row["kept"])))
    assert one.hovers[2][1].startswith(f"layer 2, head 1: {row['kept'][2][1]} of 360 kept: ")
    assert head_map({"kept": [[0, -1, 5]], "seen_tokens": 10}, of_compression=True).values == ((None, None, 2.0),)


def test_growth_keeps_its_columns_together():
    row = {"over_time": {"tokens": [32, 0, None, 16], "mean": [4, 0, 3, 2], "least": [1, 0, 1, None], "most": [9, 0]}}
    growth = growth_of(row)
    assert growth["tokens"] == (0, 16, 32)
    assert growth["mean"] == (0, 2, 4) and growth["least"] == (0, None, 1) and growth["most"] == (0, None, 9)
    assert growth_of({"over_time": {"tokens": [1]}}) is None


def test_runs_are_boxes_of_their_own():
    head = {"layer": 1, "head": 0, "kept_tokens": 4, "states": "kmkmmkkgw"}
    (one,) = head_texts({"seen_tokens": 9, "heads": [head]}, [*"abcdefgh", ""])
    assert one["marks"] == [("k", "a", 1), ("m", "bc", 2), ("m", "def", 3), ("k", "g", 1), ("g", "h", 1), ("w", "·", 1)]
    assert one["name"] == "layer 1, head 0: 4 of 9 kept (2.25×)"


def test_long_runs_show_means_of_neighbours():
    rows = [{"step": step, "loss": float(step), "layer_compression": [1.0, float(step)]} for step in range(1, 1001)]
    (line,) = runs_of(rows, {"loss": "loss", "target_compression": "none", "distillation": "none"}, most=100)
    assert len(line.points) == 100 and line.points[0] == (10, 5.5) and line.points[-1] == (1000, 995.5)
    stretches = layers_of(rows, 50)
    assert len(stretches) == 50 and stretches[-1] == (1000, [1.0, 990.5])


def test_a_part_that_is_the_whole_loss_is_one_line():
    rows = [{"step": 1, "loss": 2.0, "distillation": 2.0}, {"step": 2, "loss": 1.0, "distillation": 1.0}]
    assert [one.name for one in runs_of(rows, {"loss": "whole", "distillation": "part"})] == ["whole"]


def test_a_power_law_goes_on_as_it_is():
    (road,) = roads_of(trained())
    assert [stage.change for stage in road.best] == list(samples.LAW.values())
    assert road.beyond(5_120_000) == pytest.approx(12.5)
    assert road.beyond(1_280_000 * 16) == pytest.approx(6.25)


def test_the_line_joins_the_best_and_the_extrapolation_rests_on_its_last_three():
    worse = [
        trained_row("other-loss", 80_000, 180.0),
        trained_row("wasted", 640_000, 60.0),
        trained_row("start", 5_000, 201.0),
    ]
    (road,) = roads_of(trained() + worse)
    assert [stage.name for stage in road.best] == ["start", *(f"after-{tokens}" for tokens in samples.LAW)]
    assert len(road.stages) == 7 and road.beyond(5_120_000) == pytest.approx(12.5)


def test_layouts_and_texts_are_told_apart_and_so_are_bytes():
    rows = trained() + trained(text="wiki") + trained(layers="0_0_0_3") + trained(allocated_bytes=25)
    assert len(roads_of(rows)) == 4
    assert {len(road.stages) for road in roads_of(rows)} == {4}


@pytest.mark.parametrize(
    "rows",
    [
        [],
        trained()[:2],
        trained(allocated_bytes=100),  # nothing is stored less
        trained(method="dms:128 of a", compression=2.0),
        [trained_row("a", tokens, 10.0) for tokens in (1, 2, 3)],  # it never falls
        [trained_row("a", *of) for of in ((None, 30.0), (0, 20.0), (5, -1.0), (6, math.nan), (7, 0.0))],
    ],
)
def test_where_there_is_no_such_line_none_is_drawn(rows):
    assert roads_of(rows) == []
