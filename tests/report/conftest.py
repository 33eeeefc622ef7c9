"""One page of everything, made once, its pictures in one width alone: drawing takes seconds."""

import json

import pytest

import report_samples as samples
from html_reading import Page
from kvfold.report import page
from kvfold.report.page import write_page


@pytest.fixture(scope="session")
def whole_text(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("report")
    results = samples.write_samples(folder / "results")
    quality = samples.quality()
    quality["rows"] += samples.trained()
    (results / "quality.json").write_text(json.dumps(quality), encoding="utf-8")
    for index, result in enumerate(samples.design_space()):
        (results / f"design-{index}.json").write_text(json.dumps(result), encoding="utf-8")
    (results / "broken.json").write_text("{")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "NARROW", page.WIDE)
        return write_page(results, folder / "deep" / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def whole(whole_text) -> Page:
    return Page(whole_text)


@pytest.fixture
def page_of(tmp_path, monkeypatch):
    """A page of some results, its pictures drawn in one width alone."""
    monkeypatch.setattr(page, "NARROW", page.WIDE)

    def make(*results: dict) -> Page:
        folder = tmp_path / "results"
        folder.mkdir(exist_ok=True)
        for index, result in enumerate(results):
            (folder / f"{index}.json").write_text(json.dumps(result), encoding="utf-8")
        return Page(write_page(folder, tmp_path / "page.html").read_text(encoding="utf-8"))

    return make
