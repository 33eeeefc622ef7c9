"""The C files without Python, where a sanitizer sees every read, and NEON, which an emulator runs: decode_check.c (paged_cpu.c),
lifespan_check.c and linear_check.c.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from kvfold.ops import native

SOURCES = Path(native.__file__).parent
CHECK = Path(__file__).with_name("decode_check.c")
WHAT = ("decode", "lifespan", "linear")


def checked(what, compiler, flags, folder, run=()):
    """Compiles everything side by side, runs it, and gives what it prints."""
    flags = ["-O1", "-std=gnu11", *native.FLAGS[4:], *flags]
    program = str(folder / "check")
    if what != "decode":
        check = str(CHECK.with_name(f"{what}_check.c"))
        subprocess.run([compiler, *flags, f"-I{SOURCES}", check, "-o", program, "-lm"], check=True)
        return said([*run, program])
    parts = {kind: [f"-DSTORAGE={kind}", f"-DKIND={kind.upper()}", f"-Dkvfold_products=products_{kind}",
                    f"-Dkvfold_sums=sums_{kind}", str(SOURCES / "paged_tiles.c")] for kind in native.KINDS}  # fmt: skip
    parts["check"] = [str(CHECK)]
    running = [
        subprocess.Popen([compiler, *flags, *arguments, "-c", "-o", str(folder / f"{name}.o")])
        for name, arguments in parts.items()
    ]
    assert [process.wait() for process in running] == [0] * len(running)
    subprocess.run([compiler, *flags, *(str(folder / f"{name}.o") for name in parts), "-o", program, "-lm"], check=True)
    return said([*run, program])


def said(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("isa", native.instruction_sets())
def test_no_read_or_write_is_out_of_bounds(what, isa, tmp_path):
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler here")
    flags = [*native._ISA_FLAGS[isa], "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    assert checked(what, compiler, flags, tmp_path).startswith(f"{isa}: largest error")


@pytest.mark.slow
@pytest.mark.parametrize("what", WHAT)
def test_neon_computes_the_same(what, tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no compiler for ARM or no emulator here (Debian: gcc-aarch64-linux-gnu, qemu-user)")
    assert checked(what, compiler, ["-static"], tmp_path, run=[emulator]).startswith("neon: largest error")
