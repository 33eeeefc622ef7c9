import json
from pathlib import Path

import pytest
import torch

from byte_tokenizer import byte_tokenizer
from kvfold.eval import perplexity
from kvfold.eval.cells import Cells, model_key
from kvfold.eval.perplexity import measure_quality
from kvfold.eval.reading import Protocol
from kvfold.record import made
from tiny_model import tiny_model

PROTOCOL = Protocol(windows=3, context_tokens=20)
METHODS = ["window:6+2", "tova:8"]


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Methods whose text is really read, in turn."""
    methods, original = [], perplexity.read_rows

    def noted(model, layout, *args, **kwargs):
        methods.append(layout.time_text())
        return original(model, layout, *args, **kwargs)

    monkeypatch.setattr(perplexity, "read_rows", noted)
    return methods


def measure(model, tokenizer, text: Path, cells: Path, methods=METHODS, protocol=PROTOCOL, name="tiny") -> list[dict]:
    return measure_quality(model, tokenizer, [text], methods, name=name, protocol=protocol, cells=cells)["rows"]


def test_finished_cells_are_not_measured_again(model, tokenizer, text, tmp_path, read):
    first = measure(model, tokenizer, text, tmp_path / "cells")
    assert read == ["full", "window:6+2", "tova:8"]
    assert measure(model, tokenizer, text, tmp_path / "cells") == first
    assert len(read) == 3


def test_a_mended_tokenizer_is_another_measurement(model, tokenizer, text, tmp_path, read):
    """Same weights, same file, other tokens: nothing in the key tells."""
    measure(model, tokenizer, text, tmp_path / "cells")
    read.clear()
    measure(model, byte_tokenizer(adds_bos=True), text, tmp_path / "cells")
    assert read == ["full", "window:6+2", "tova:8"]


def test_a_new_method_needs_the_unfolded_states_and_nothing_else(model, tokenizer, text, tmp_path, read):
    first = measure(model, tokenizer, text, tmp_path / "cells")
    read.clear()
    more = measure(model, tokenizer, text, tmp_path / "cells", [*METHODS, "h2o:4+4"])
    assert read == ["full", "h2o:4+4"]
    assert more[:3] == first


def test_a_run_cut_off_goes_on_where_it_stopped(model, tokenizer, text, tmp_path, read):
    def stop(what: str, done: int, total: int) -> None:
        if "tova" in what and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_quality(
            model, tokenizer, [text], METHODS, name="tiny", protocol=PROTOCOL, cells=tmp_path / "cells", report=stop
        )
    read.clear()
    measure(model, tokenizer, text, tmp_path / "cells")
    assert read == ["full", "tova:8"]


@pytest.mark.parametrize("damage", ["torn", "empty", "foreign", "other key"])
def test_a_file_that_is_no_cell_counts_as_none(model, tokenizer, text, tmp_path, read, damage):
    cells = tmp_path / "cells"
    first = measure(model, tokenizer, text, cells)
    path = next(cells.glob("*tova*"))
    whole = path.read_text(encoding="utf-8")
    changed = json.loads(whole)
    changed["key"]["text"] = "other"
    contents = {"torn": whole[: len(whole) // 2], "empty": "", "foreign": "[1]", "other key": json.dumps(changed)}
    path.write_text(contents[damage], encoding="utf-8")
    read.clear()
    again = measure(model, tokenizer, text, cells)
    assert read == ["full", "tova:8"]
    assert path.read_text(encoding="utf-8") != contents[damage]
    assert [row["perplexity"] for row in again] == [row["perplexity"] for row in first]


def test_whatever_changes_a_figure_is_another_cell(model, tokenizer, text, tmp_path, read):
    cells = tmp_path / "cells"
    measure(model, tokenizer, text, cells, [])
    other = tiny_model()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    edited = text.with_name("a").joinpath("news.txt")
    edited.parent.mkdir()
    edited.write_text(text.read_text(encoding="utf-8") + "!", encoding="utf-8")
    for number, (who, which, protocol) in enumerate(
        [
            (other, text, PROTOCOL),
            (model, edited, PROTOCOL),
            (model, text, Protocol(windows=2, context_tokens=20)),
            (model, text, Protocol(windows=3, context_tokens=19)),
            (tiny_model(rms_norm_eps=1e-3), text, PROTOCOL),
        ],
        start=2,
    ):
        measure(who, tokenizer, which, cells, [], protocol)
        assert read == ["full"] * number
    measure(tiny_model(), tokenizer, text, cells, [])
    assert read == ["full"] * 6


def test_a_models_key_does_not_depend_on_what_it_was_folded_to(model):
    folded = tiny_model(layout=model.config.layout.with_time("tova:8"))
    assert model_key(folded, "tiny") == model_key(model, "tiny")


def test_without_a_folder_nothing_is_kept(tmp_path):
    cells = Cells(None)
    cells.write("a", {"b": 1}, {"c": 2})
    assert cells.read("a", {"b": 1}) is None


def test_names_make_plain_file_names(tmp_path):
    cells = Cells(tmp_path)
    cells.write("../news h2o:25%+25%", {"b": (1,)}, {"c": 2})
    assert cells.read("../news h2o:25%+25%", {"b": [1]})["c"] == 2
    assert [path.name.rpartition("-")[0] for path in tmp_path.iterdir()] == ["news-h2o-25-25"]


@pytest.mark.parametrize("name", ["kvfold", "torch", "cpu", "threads"])
def test_a_cell_of_another_version_or_machine_counts_as_none(tmp_path, monkeypatch, name):
    cells = Cells(tmp_path)
    assert cells.write("a", {}, {"c": 2}) == cells.read("a", {})
    here = made(torch.get_num_threads())
    monkeypatch.setattr("kvfold.eval.cells.made", lambda threads: here | {name: "another"})
    assert cells.read("a", {}) is None


def test_a_row_keeps_the_record_of_the_run_that_measured_it(model, tokenizer, text, tmp_path, monkeypatch):
    here = made(torch.get_num_threads())
    monkeypatch.setattr("kvfold.eval.cells.made", lambda threads: here | {"git_commit": "first"})
    measure(model, tokenizer, text, tmp_path, [])
    monkeypatch.setattr("kvfold.eval.cells.made", lambda threads: here | {"git_commit": "second"})
    rows = measure(model, tokenizer, text, tmp_path, ["tova:8"])
    assert [row["made"]["git_commit"] for row in rows] == ["first", "second"]
