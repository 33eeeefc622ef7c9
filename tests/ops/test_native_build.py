"""The compiled file: built once, kept, really used, and done without where it can't be had."""

import warnings

import pytest
import torch

from kvfold.ops import native, paged
from paged_pools import Streams


@pytest.fixture
def forgotten():
    """The library looked for anew, and forgotten again afterwards."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.fixture
def calls(monkeypatch):
    """Which of the two forms was taken, call by call."""
    seen = []
    for name in ("_decode_native", "decode_reference"):
        whole = getattr(paged, name)
        monkeypatch.setattr(
            paged, name, lambda *args, _n=name, _w=whole, **kwargs: seen.append(_n) or _w(*args, **kwargs)
        )
    return seen


def attend():
    pool = Streams([20], kv_heads=1, group=2, head_dim=8)
    return paged.decode_attention(pool.decode_batch(), pool.q, pool.k_new, pool.v_new, scale=0.3, softcap=None)


def test_the_compiled_form_is_really_used(calls, forgotten, monkeypatch):
    monkeypatch.delenv("KVFOLD_NATIVE", raising=False)
    if native.library() is None:
        pytest.skip("no C compiler on this machine")
    attend()
    assert calls == ["_decode_native"]


def test_it_can_be_switched_off(calls, forgotten, monkeypatch):
    ours = attend()
    monkeypatch.setenv("KVFOLD_NATIVE", "0")
    native.library.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = attend()
    assert native.library() is None and calls[-1] == "decode_reference"
    torch.testing.assert_close(ours, theirs)


def test_without_a_compiler_one_warning_and_the_plain_form(calls, forgotten, monkeypatch, tmp_path):
    monkeypatch.delenv("KVFOLD_NATIVE", raising=False)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path))
    with pytest.warns(UserWarning, match="no C compiler found") as found:
        attend()
        attend()
    assert len(found) == 1 and calls == ["decode_reference"] * 2


def test_a_compiler_that_fails_is_named(forgotten, monkeypatch, tmp_path):
    monkeypatch.delenv("KVFOLD_NATIVE", raising=False)
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'it is broken' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "kept"))
    with pytest.warns(UserWarning, match="it is broken"):
        assert native.library() is None
    assert list((tmp_path / "kept").iterdir()) == [], "nothing half-built may be left behind"


def test_a_folder_that_cannot_be_written_is_no_disaster(forgotten, monkeypatch, tmp_path):
    monkeypatch.delenv("KVFOLD_NATIVE", raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="plain torch"):
        assert native.library() is None


def test_it_is_built_once_and_kept(forgotten, monkeypatch, tmp_path):
    monkeypatch.delenv("KVFOLD_NATIVE", raising=False)
    if native.library() is None:
        pytest.skip("no C compiler on this machine")
    native.library.cache_clear()
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(native, "FLAGS", ("-O0", "-shared", "-fPIC"))
    assert native.library() is not None
    (built,) = (tmp_path / "kept").iterdir()
    native.library.cache_clear()
    monkeypatch.setattr(native, "_compile", lambda *args: pytest.fail("compiled again"))
    assert native.library() is not None and built.suffix == ".so"
