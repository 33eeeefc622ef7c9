"""Calibration windows: a share of each file, as many tokens as were asked for."""

import pytest

from byte_tokenizer import byte_tokenizer
from kvfold.convert.conversion import calibration_windows


@pytest.fixture
def files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name * 400)
    return [tmp_path / "a.txt", tmp_path / "b.txt"]


def test_every_file_gives_its_share(files):
    tokenizer = byte_tokenizer()
    windows = calibration_windows(tokenizer, files, tokens=5 * 32 + 7, context_tokens=32)
    assert windows.shape == (5, 32)
    assert [tokenizer.decode(row)[0] for row in windows] == ["a", "a", "a", "b", "b"]


def test_one_window_needs_one_file(files):
    assert calibration_windows(byte_tokenizer(), files, tokens=32, context_tokens=32).shape == (1, 32)


def test_less_than_a_window_is_refused(files):
    with pytest.raises(ValueError, match="1 window is the least"):
        calibration_windows(byte_tokenizer(), files, tokens=31, context_tokens=32)
