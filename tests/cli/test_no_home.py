"""Commands where no home folder is known: neither HOME nor the user database has one, as in many containers."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def no_home(monkeypatch):
    """And nothing says where caches go."""

    def unknown(_: object):
        raise KeyError

    pwd = pytest.importorskip("pwd")
    for name in ("HOME", "KVFOLD_CACHE"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)
    with pytest.raises(RuntimeError):
        Path.home()


def test_measurements_wait_in_the_folder_for_temporary_files(kvfold, no_home, folder, monkeypatch):
    (folder / "temporary").mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(folder / "temporary"))
    done = kvfold("eval tiny --text text.txt --context 200 --windows 2 --batch 2")
    assert done.code == 0, done.err
    assert list((folder / "temporary").glob(f"kvfold-{os.getuid()}/cells/*"))


@pytest.mark.parametrize("command", ["plan ~/model", "generate ~/model x", "convert ~/model out --layers cla2"])
def test_a_path_that_begins_with_the_home_is_not_found(kvfold, no_home, command):
    assert "~/model: " in kvfold(command).error


def test_nothing_is_written_to_a_folder_named_like_a_home(kvfold, no_home, folder):
    assert "~/out: no home folder is known: write the whole path" in kvfold("convert tiny ~/out --layers cla2").error
    assert not (folder / "~").exists()
