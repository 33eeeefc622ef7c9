"""The compiled file: built once, kept, really used, and done without where it can't be had."""

import os
import shutil
import warnings

import pytest
import torch

from kvfold.ops import native, paged
from paged_pools import Streams


@pytest.fixture
def forgotten():
    """The library looked for anew, and forgotten again afterwards."""
    for cached in (native.library, native._warn):
        cached.cache_clear()
    yield
    for cached in (native.library, native._warn):
        cached.cache_clear()


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
    monkeypatch.setattr(native, "FLAGS", ("-O0", *native.FLAGS[1:]))
    isa = native.library().isa
    built = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert [name.rsplit("-", 1)[0] for name in built] == [f"paged_driver-{isa}", f"paged_fp32-{isa}"]
    native.library.cache_clear()
    monkeypatch.setattr(native.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("compiled again"))
    assert native.library() is not None


def test_flags_and_instruction_set_make_another_file(forgotten, monkeypatch, tmp_path):
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path))
    monkeypatch.setattr(
        native, "_compile", lambda compiler, flags, missing: [path.touch() for path in missing.values()]
    )
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: path)
    monkeypatch.setattr(native.shutil, "which", lambda name: "/usr/bin/cc")
    names = {native._loaded(isa, ("driver",))[0] for isa in ("avx2", "generic")}
    monkeypatch.setattr(native, "FLAGS", ("-O0",))
    names.add(native._loaded("avx2", ("driver",))[0])
    assert len(names) == len(list(tmp_path.iterdir())) == 3


def test_an_instruction_set_that_the_cpu_lacks_is_refused(forgotten, monkeypatch):
    monkeypatch.delenv("KVFOLD_NATIVE", raising=False)
    monkeypatch.setenv("KVFOLD_ISA", "mmx")
    with pytest.raises(ValueError, match=r"KVFOLD_ISA 'mmx': this CPU has .*generic: name one of them"):
        native.library()
    monkeypatch.setenv("KVFOLD_ISA", "generic")
    assert native.instruction_set() == "generic" == native.instruction_sets()[-1]


@pytest.mark.parametrize("trouble", [RuntimeError("no home directory"), PermissionError("read-only")])
def test_without_a_home_the_folder_for_temporary_files_serves(monkeypatch, tmp_path, trouble):
    monkeypatch.delenv("KVFOLD_CACHE", raising=False)
    monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path))

    def home():
        raise trouble

    monkeypatch.setattr(native.Path, "home", home)
    folder = native.cache_folder()
    assert folder.parent == tmp_path and folder.name == f"kvfold-{os.getuid()}" and folder == native.cache_folder()
    folder.chmod(0o777)
    assert native.cache_folder() != folder, "what others can write to must not be run"


@pytest.mark.parametrize("part", ["driver", "linear", "lifespan", "bf16", "int4"])
def test_it_compiles_for_neon(part, tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-gcc")
    if compiler is None:
        pytest.skip("no compiler for ARM here (Debian: gcc-aarch64-linux-gnu)")
    target = tmp_path / "paged.so"
    native._compile(compiler, ("-O1", *native.FLAGS[1:], "-Wall", "-Wextra", "-Werror"), {part: target})
    assert target.exists()
