"""Figures as SVG and PNG: names apart, colours by name, nothing that a text could break."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import report_samples as samples
from html_reading import Page
from kvfold.report import pictures
from kvfold.report.drawing import apart, chart, dot, name_ends, short, spots, svg


@given(st.lists(st.floats(0, 100), min_size=1, max_size=7))
def test_labels_are_kept_apart_in_order_and_inside(wanted):
    placed = apart(wanted, 14, 0, 100)
    in_order = [placed[index] for index in sorted(range(len(wanted)), key=lambda index: wanted[index])]
    assert all(b - a >= 14 - 1e-6 for a, b in pairwise(in_order))
    assert all(-1e-6 <= place <= 100 + 1e-6 for place in placed)


def test_labels_with_room_stay_where_they_are():
    assert apart([10, 50, 90], 14, 0, 100) == [10, 50, 90]
    assert apart([50, 50], 14, 0, 100) == [43, 57]


def test_long_names_are_cut():
    assert short("H2O", 100) == "H2O" and short("x" * 100, 66) == "x" * 9 + "…"


def test_texts_stay_texts_and_marks_say_more():
    odd = "<b> & \"'$x^2$\x00\n {{}}"
    figure, (place,) = chart(400, 200, right=120, titles=("x", odd))
    place.set(xlim=(0, 2), ylim=(0, 5))
    dot(place, 1, 3, 2, odd)
    spots(place, [(0, 0), (1, 1), (2, 2)], [f"spot {at} {at} {odd}" for at in range(3)])
    name_ends(place, [(2, 4, odd, 1), (2, 4, "other", 2)])
    page = Page(svg(figure, odd))
    plain = odd.replace("\x00", " ").replace("\n", " ")
    hovers = [text for name, text in page.texts if name == "title"]
    assert sorted(hovers) == sorted([plain, *(f"spot {at} {at} {plain}" for at in range(3))])
    written = [text for name, text in page.texts if name == "text"]
    assert written.count(plain) == 2 and "other" in written
    heights = [float(attributes["y"]) for name, attributes in page.tags if name == "text"][-2:]
    assert abs(heights[0] - heights[1]) >= 14 and page.tags[0][1]["aria-label"] == plain


def test_two_pictures_of_one_page_do_not_share_ids():
    ids = []
    for colour in (1, 2):
        figure, (place,) = chart(300, 200)
        dot(place, 1, 1, colour, "x")
        ids.append({attributes["id"] for _, attributes in Page(svg(figure, "x")).tags if "id" in attributes})
    assert ids[0] and not ids[0] & ids[1]


def test_the_readmes_picture_is_a_png_drawn_without_pyplot(tmp_path):
    (tmp_path / "quality.json").write_text(json.dumps(samples.quality(["brown", "austen"])))
    assert pictures.save_quality(tmp_path, tmp_path / "docs" / "q.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in (tmp_path / "docs").iterdir()] == ["q.png"]
    assert not [file for file in Path(pictures.__file__).parent.glob("*.py") if "pyplot" in file.read_text()]


def test_how_long_clients_waited(tmp_path):
    row = {"model": "m", "url": "http://x", "requests": 3, "output_tokens_per_s": 12.0}
    row["points"] = [[0.0, 0.5, 2.0], [1.0, 1.2, 4.0]]
    assert pictures.save_waits([row], tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no request was answered"):
        pictures.save_waits([{**row, "points": []}], tmp_path / "none.png")


def test_nothing_to_draw_is_refused(tmp_path, monkeypatch):
    for result in (samples.plan(), {"kind": "quality", "rows": [{"method": "full"}]}):
        (tmp_path / "x.json").write_text(json.dumps(result))
        with pytest.raises(ValueError, match="kvfold eval"):
            pictures.save_quality(tmp_path, tmp_path / "q.png")
    (tmp_path / "x.json").write_text(json.dumps(samples.quality()))
    with pytest.raises(ValueError, match="kvfold eval"):
        pictures.save_quality(tmp_path, tmp_path / "q.png", families=["dmc"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'kvfold\[report\]'"):
        pictures.save_quality(tmp_path, tmp_path / "q.png")
    assert not (tmp_path / "q.png").exists()
