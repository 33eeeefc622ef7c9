from pathlib import Path

import pytest

from kvfold.record import write_whole_file


def test_a_file_is_written_whole_with_the_folders_it_needs(tmp_path: Path):
    path = tmp_path / "a" / "b.json"
    write_whole_file(path, "ä")
    write_whole_file(path, "second")
    assert path.read_text(encoding="utf-8") == "second"
    assert [entry.name for entry in path.parent.iterdir()] == ["b.json"]


def test_nothing_is_left_of_a_write_that_failed(tmp_path: Path):
    path = tmp_path / "b.json"
    path.write_text("first", encoding="utf-8")
    with pytest.raises(UnicodeEncodeError):
        write_whole_file(path, "\ud800")
    assert path.read_text(encoding="utf-8") == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["b.json"]
