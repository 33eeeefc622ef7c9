import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.report.markup import Markup, join, tag
from kvfold.report.pictures.drawing import apart, end_labels, short, ticks
from kvfold.report.pictures.quality import axes_of
from kvfold.report.results import Result
from kvfold.report.series import Line, Point, colours_of, family_of, kept_share, label_of, quality_lines


def test_text_is_escaped_and_markup_is_not():
    inner = tag("b", "<&>", title='"x"', class_="y", gone=None, stroke_width=1.0)
    assert inner == '<b title="&quot;x&quot;" class="y" stroke-width="1">&lt;&amp;&gt;</b>'
    assert tag("p", inner, " 'and'") == f"<p>{inner} &#x27;and&#x27;</p>"
    assert isinstance(join([inner, None, "<"]), Markup) and join([None, "<"]) == "&lt;"


@given(st.lists(st.floats(0, 100), min_size=1, max_size=7))
def test_labels_are_kept_apart_in_order_and_inside(wanted):
    placed = apart(wanted, 14, 0, 100)
    in_order = [placed[index] for index in sorted(range(len(wanted)), key=lambda index: wanted[index])]
    assert all(b - a >= 14 - 1e-6 for a, b in pairwise(in_order))
    assert all(-1e-6 <= place <= 100 + 1e-6 for place in placed)


def test_labels_with_room_stay_where_they_are():
    assert apart([10, 50, 90], 14, 0, 100) == [10, 50, 90]
    assert apart([50, 50], 14, 0, 100) == [43, 57]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_are_inside_and_few(low, span, most):
    found = ticks(low, low + span, most)
    assert len(found) <= most + 1
    assert all(low - 1e-6 * span <= value <= low + span * (1 + 1e-6) for value in found)


def test_ticks_are_round():
    assert ticks(0, 95, 5) == [0, 20, 40, 60, 80] and ticks(0, 0, 5) == [0]


def test_long_names_are_cut():
    assert short("H2O", 100) == "H2O" and short("x" * 100, 66) == "x" * 9 + "…"


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
    assert not axes_of([[_line(1, 3)]]).bent and axes_of([[_line(1, 40)]]).bent
    bent, straight = axes_of([[_line(1, 40)]]), axes_of([[_line(-2, 3)]])
    assert {0.0, 1.0, 10.0, 20.0} <= set(bent.levels()) and straight.low < -2 and straight.high > 3
    assert bent.shares == (1.0, 0.5, 0.25) and bent.most == pytest.approx(1.0, rel=0.05)


def test_models_that_store_more_than_the_full_cache_are_inside_the_picture():
    def line(share: float) -> Line:
        return Line(title="x", family="x", grows=False, points=(Point(share=share, change=2.0, error=None, row={}),))

    axes = axes_of([[line(1.9), line(0.5)]])
    assert axes.shares == (1.0, 0.5) and axes.most > 1.9
    assert axes_of([[line(16.0), line(0.25)]]).shares == (16.0, 4.0, 1.0, 0.25)
    other, method = quality_lines([_full_of("m", 16.0), {**_full_of("m", 0.5), "method": "h2o:8+8"}], "t")
    assert (other.from_unfolded, method.from_unfolded) == (False, True)


def _full_of(model: str, share: float) -> dict:
    return {
        "method": f"full of {model}", "model": model, "text": "t", "compression": 1 / share, "allocated_bytes": share,
        "full_bytes": 1.0, "perplexity_change_percent": {"mean": 2.0},
    }  # fmt: skip


def test_names_that_would_lie_on_marks_further_right_stand_beside_those():
    """A short name stays at its own mark; a long one at the height of another mark goes to its column."""
    far = (200.0, 50.0, "far", 2)

    def places(name: str, y: float) -> list[float]:
        found = re.findall(r'<text x="([\d.]+)"', "".join(end_labels([(100.0, y, name, 1), far], 0, 300)))
        return sorted(map(float, found))

    assert places("near", 50.0) == [116.0, 216.0]
    assert places("a name that is long", 150.0) == [116.0, 216.0]
    assert places("a name that is long", 50.0) == [216.0, 216.0]
