"""Compiles this folder's one C file on first use and keeps the result in the user's cache folder.

No compiler, no compilation: `library()` gives None with one warning, and the plain torch form does the work.
`KVFOLD_NATIVE=0` asks for that form; `KVFOLD_CACHE` names another cache folder.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

SOURCE = Path(__file__).with_name("paged_cpu.c")
# Not -ffast-math: it would let the compiler forget that NaN exists, and switch the whole process to flush denormals.
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-fno-math-errno", "-fassociative-math", "-fno-signed-zeros",
         "-fno-trapping-math")  # fmt: skip
SECONDS_TO_COMPILE = 60


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where it is switched off or can't be built."""
    if os.environ.get("KVFOLD_NATIVE", "1") == "0":
        return None
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as problem:
        reason = str(problem).splitlines()[0]
        warnings.warn(
            f"kvfold decodes with plain torch, which is slower: its C file was not built ({reason})", stacklevel=2
        )
        return None


def _built() -> Path:
    """The path of the compiled file, compiled now if it is not there yet."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("no C compiler found: install gcc or clang")
    key = hashlib.sha256(SOURCE.read_bytes() + repr((FLAGS, compiler, _processor())).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("KVFOLD_CACHE") or Path.home() / ".cache" / "kvfold")
    target = folder / f"paged_cpu-{key}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _compile(compiler, target)
    return target


def _compile(compiler: str, target: Path) -> None:
    """With OpenMP where the compiler has it, else on one core. Written aside and renamed: another process may do the same."""
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(handle)
    try:
        for extra in (("-fopenmp",), ()):
            command = [compiler, *FLAGS, *extra, str(SOURCE), "-o", name, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_COMPILE, check=False)
            if done.returncode == 0:
                os.replace(name, target)
                return
        raise OSError(f"{compiler} failed: {done.stderr.strip() or done.returncode}")
    finally:
        Path(name).unlink(missing_ok=True)


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by machines of several kinds."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        kept = [line for line in info.read_text().splitlines() if line.startswith(("flags", "Features", "model name"))]
        return "\n".join(sorted(set(kept)))
    return platform.platform() + platform.processor()
