"""What can't be converted is refused in one line, and nothing is left behind."""

import pytest
import torch

from kvfold.convert.conversion import Conversion, convert
from kvfold.models import load as loading
from kvfold.models.load import load


@pytest.fixture
def source(pair, tmp_path):
    pair("llama")[1].save_pretrained(tmp_path / "source")
    return tmp_path / "source"


CASES = {
    "pattern": ({"layers": "cla5"}, "layer pattern 'cla5'"),
    "short pattern": ({"layers": "0_0_2"}, "does not fit a model of 4 layers"),
    "heads": ({"heads": 3}, "use 1, 2"),
    "init": ({"init": "meen"}, "meen"),
    "target": ({"target": "sglang"}, "sglang"),
    "no text": ({"layers": "cla2", "init": "fitted"}, "give calibration text"),
    "time of a reader": ({"layers": "cla2", "time": "window:8+2; 1=full"}, "layer 1 stores nothing, it reads layer 0"),
    "shared for transformers": ({"layers": "cla2", "target": "transformers"}, "shares layers (cla2)"),
    "time for transformers": ({"time": "window:8+2", "target": "transformers"}, "folds along time"),
    "sinks for vllm": ({"time": "window:8+2", "target": "vllm"}, "for vllm: time 'window:8+2' in layer 0"),
    "heavy hitters for vllm": ({"time": "h2o:4+4", "target": "vllm"}, "use `kvfold serve`"),
    "bits for vllm": ({"bits": "int8", "target": "vllm"}, "for vllm: bits 'int8' in layer 0"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_left(case, source, tmp_path):
    wanted, said = CASES[case]
    with pytest.raises(ValueError) as error:
        convert(source, tmp_path / "out", Conversion(**wanted))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_unknown_dtype_is_refused_before_anything_is_fitted(source, tmp_path):
    windows = torch.full((2, 8), 5)
    with pytest.raises(ValueError, match="float8"):
        convert(source, tmp_path / "out", Conversion(init="fitted"), calibration_WT=windows, dtype="float8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_folder_that_holds_something_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match="not empty"):
        convert(source, source, Conversion(layers="cla2"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="a file is in the way"):
        convert(source, tmp_path / "file" / "out", Conversion(layers="cla2"))


def test_an_empty_folder_is_filled(source, tmp_path):
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out", Conversion(layers="cla2"))
    assert len(load(tmp_path / "out").config.layout.owners) == 2


def test_an_owner_with_a_method_of_its_own_is_not_made_a_reader(source, tmp_path):
    convert(source, tmp_path / "mixed", Conversion(time="window:8+2; 1=full"))
    with pytest.raises(ValueError, match="layer 1 has time 'full' of its own but would read layer 0"):
        convert(tmp_path / "mixed", tmp_path / "out", Conversion(layers="cla2"))
    convert(tmp_path / "mixed", tmp_path / "out", Conversion(layers="0_1_2_2"))
    assert load(tmp_path / "out").config.layout.time_text() == "window:8+2; 1=full"


def test_a_failure_while_writing_leaves_nothing(source, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(loading, "copy_tokenizer", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(source, tmp_path / "out", Conversion(layers="cla2"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
