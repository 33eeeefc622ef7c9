"""Compiles this folder's C files on first use, for one instruction set, and keeps the results in the user's cache folder.

No compiler, no compilation: `library()` gives None with one warning, and plain torch does the work. Settings:
`KVFOLD_NATIVE=0` asks for plain torch, `KVFOLD_ISA` for an instruction set below the CPU's best, `KVFOLD_CACHE` names
another cache folder. Threads are those of the OpenMP that torch itself has loaded, so that a process has one pool of them.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvfold.errors import UserError

_FOLDER = Path(__file__).parent
# Not -ffast-math: it would let the compiler forget that NaN exists, and switch the whole process to flush denormals.
FLAGS = ("-O2", "-std=gnu11", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_ISA_FLAGS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "neon": (),
    "generic": ("-DKVFOLD_GENERIC",),
}
KINDS = ("fp32", "bf16", "fp16", "fp8", "int8", "int4")
"""Storages of pages; their places are the numbers that C knows them by."""
_SOURCES = {"driver": ["paged_cpu.c"], "linear": ["linear_cpu.c"], "lifespan": ["lifespan_cpu.c"]}
SECONDS_TO_COMPILE = 120
_MADV_HUGEPAGE = 14
_PAUSE_HARD = 2
"""`omp_pause_hard` of OpenMP 5."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """What was compiled for keys and values of one storage each: functions of paged_cpu.c, and C's addresses of those of
    paged_tiles.c, without their prefix.
    """

    isa: str
    decode: Callable[..., int]
    read: Callable[..., int]
    products: int
    """For the keys."""
    sums: int
    """For the values."""
    parallel: int
    """OpenMP's start of a parallel region, 0 where it is not found: one thread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearLibrary:
    """What was compiled for a decoding step besides attention: the functions of linear_cpu.c, without their prefix."""

    panel: int
    """Output channels that lie side by side."""
    linear: Callable[..., int]
    rms_norm: Callable[..., int]
    rotate: Callable[..., int]
    front: Callable[..., int]
    tail: Callable[..., int]
    parallel: int
    """As in `Library`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LifespanLibrary:
    """What was compiled for the attention of prompts."""

    panel: int
    """A head's channels must be a multiple of this."""
    attend: Callable[..., int]
    """`kvfold_lifespan` of lifespan_cpu.c."""
    parallel: int
    """As in `Library`."""


@functools.cache
def library(k_kind: str = "fp32", v_kind: str = "fp32") -> Library | None:
    """The compiled library for two of `KINDS`, or None where it is switched off or can't be built."""
    built = _built("driver", k_kind, v_kind)
    if built is None:
        return None
    driver, *tiles = built
    driver.kvfold_decode.argtypes = (ctypes.c_char_p,)
    driver.kvfold_read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    driver.kvfold_read.restype = ctypes.c_float
    return Library(
        isa=instruction_set(), decode=driver.kvfold_decode, read=driver.kvfold_read, products=_address(tiles[0].kvfold_products),
        sums=_address(tiles[-1].kvfold_sums), parallel=_openmp(),
    )  # fmt: skip


@functools.cache
def linear_library() -> LinearLibrary | None:
    """The compiled products of linear_cpu.c, or None as in `_products`."""
    loaded = _products("linear")
    if loaded is None:
        return None
    loaded.kvfold_panel.restype = ctypes.c_int64
    loaded.kvfold_linear.argtypes = (*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 4, ctypes.c_void_p)
    loaded.kvfold_rms_norm.argtypes = (*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2, ctypes.c_float)
    loaded.kvfold_rotate.argtypes = (*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 6)
    loaded.kvfold_front.argtypes = loaded.kvfold_tail.argtypes = (ctypes.c_char_p,)
    for quiet in (loaded.kvfold_linear, loaded.kvfold_rms_norm, loaded.kvfold_rotate):
        quiet.restype = None
    return LinearLibrary(
        panel=loaded.kvfold_panel(), linear=loaded.kvfold_linear, rms_norm=loaded.kvfold_rms_norm,
        rotate=loaded.kvfold_rotate, front=loaded.kvfold_front, tail=loaded.kvfold_tail, parallel=_openmp(),
    )  # fmt: skip


@functools.cache
def lifespan_library() -> LifespanLibrary | None:
    """The compiled attention of lifespan_cpu.c, or None as in `_products`."""
    loaded = _products("lifespan")
    if loaded is None:
        return None
    loaded.kvfold_lifespan_panel.restype = ctypes.c_int64
    loaded.kvfold_lifespan.argtypes = (ctypes.c_char_p,)
    return LifespanLibrary(panel=loaded.kvfold_lifespan_panel(), attend=loaded.kvfold_lifespan, parallel=_openmp())


def _products(part: str) -> ctypes.CDLL | None:
    """One of the files whose work is products; None as in `_built`, or where it would run without an instruction set of its
    own, slower than torch.
    """
    built = None if instruction_set() == "generic" else _built(part)
    return None if built is None else built[0]


def _built(*parts: str) -> list[ctypes.CDLL] | None:
    """Files by their parts; None, with one warning, where they can't be built, and None where they are switched off."""
    if os.environ.get("KVFOLD_NATIVE", "1") == "0":
        return None
    isa = instruction_set()
    try:
        return _loaded(isa, parts)
    except (OSError, subprocess.SubprocessError) as problem:
        _warn(str(problem).splitlines()[0])
        return None


def instruction_sets() -> tuple[str, ...]:
    """Those that this CPU has, the best first."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return ("neon", "generic")
    known = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}
    return (*known.get(torch.backends.cpu.get_cpu_capability(), ()), "generic")


def instruction_set() -> str:
    """The one to compile for: `KVFOLD_ISA`, or the best."""
    at_hand = instruction_sets()
    isa = os.environ.get("KVFOLD_ISA") or at_hand[0]
    if isa not in at_hand:
        raise UserError(f"KVFOLD_ISA '{isa}': this CPU has {', '.join(at_hand)}: name one of them, or unset it")
    return isa


@functools.cache
def _warn(reason: str) -> None:
    """Once for each reason, however many storages are asked for."""
    warnings.warn(f"kvfold decodes with plain torch, more slowly: its C files were not built ({reason})", stacklevel=4)


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value


@functools.cache
def _openmp() -> int:
    """GOMP_parallel, which GNU's, LLVM's and Intel's OpenMP all have, of the library that torch has loaded; else 0."""
    for path in _openmp_candidates():
        try:
            return _address(ctypes.CDLL(str(path)).GOMP_parallel)
        except (OSError, AttributeError):
            continue
    return 0


def _openmp_candidates() -> Iterator[Path]:
    """Loaded libraries come first, and of these the one that torch brings."""
    names = ("libgomp", "libiomp", "libomp")
    home = Path(torch.__file__).parent
    maps, loaded = Path("/proc/self/maps"), []
    if maps.exists():
        paths = {Path(line.split(maxsplit=5)[5].strip()) for line in maps.read_text().splitlines() if ".so" in line}
        loaded = [path for path in paths if path.name.startswith(names)]
    yield from sorted(loaded, key=lambda path: (not path.is_relative_to(home), path))
    yield from sorted(path for path in (home / "lib").glob("lib*") if path.name.startswith(names))


def free_openmp_threads() -> None:
    """End the threads that GNU's OpenMP keeps for parallel regions of the calling thread; its next region starts them anew.

    Every thread that calls torch has helpers of its own. Where those of all together exceed the processors, libgomp lets them
    sleep as soon as they have nothing to do, and each of the hundreds of regions of a forward call then pays for waking them:
    8 to 15 % of a decoding step. To be called before another thread takes over for good. Other OpenMPs need no help.
    """
    path = next(_openmp_candidates(), None)
    if path is not None and path.name.startswith("libgomp"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(str(path)).omp_pause_resource_all(_PAUSE_HARD)


def _loaded(isa: str, parts: tuple[str, ...]) -> list[ctypes.CDLL]:
    """The driver and tiles by name, compiled side by side where they are missing."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("no C compiler found: install gcc or clang")
    sources = b"".join(
        path.read_bytes()
        for path in sorted((*_FOLDER.glob("paged_*.h"), *_FOLDER.glob("*_cpu.c"), _FOLDER / "paged_tiles.c"))
    )
    flags = (*FLAGS, *_ISA_FLAGS[isa])
    key = hashlib.sha256(sources + repr((flags, compiler, platform.machine())).encode()).hexdigest()[:16]
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    targets = {part: folder / f"paged_{part}-{isa}-{key}.so" for part in parts}
    _compile(compiler, flags, {part: target for part, target in targets.items() if not target.exists()})
    return [ctypes.CDLL(str(targets[part])) for part in parts]


def _compile(compiler: str, flags: tuple[str, ...], missing: dict[str, Path]) -> None:
    """All of `missing` at once. Written aside and renamed: another process may do the same."""
    running = []
    try:
        for part, target in missing.items():
            handle, name = tempfile.mkstemp(dir=target.parent, suffix=".so")
            os.close(handle)
            source = _SOURCES.get(part) or ["paged_tiles.c", f"-DSTORAGE={part}", f"-DKIND={part.upper()}"]
            command = [compiler, *flags, *source[1:], str(_FOLDER / source[0]), "-o", name, "-lm"]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            running.append((process, name, target))
        for process, name, target in running:
            _, errors = process.communicate(timeout=SECONDS_TO_COMPILE)
            if process.returncode != 0:
                lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
                raise OSError(f"{compiler} failed: {next((line for line in lines if 'error' in line), lines[0])}")
            os.replace(name, target)
    finally:
        for process, name, _ in running:
            process.kill()
            process.communicate()
            Path(name).unlink(missing_ok=True)


def huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Asks Linux for large memory pages behind a CPU tensor, best before it is written for the first time; gives the tensor.

    Shuffled cache pages of a KB or two are then read up to half again as fast: each of them lies in a memory page of its
    own, whose address has to be looked up. Where it can't be had nothing happens.
    """
    if platform.system() == "Linux" and tensor.device.type == "cpu":
        page = os.sysconf("SC_PAGESIZE")
        first = -(-tensor.data_ptr() // page) * page
        size = (tensor.data_ptr() + tensor.nbytes - first) // page * page
        if size > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_HUGEPAGE)
    return tensor


def cache_folder() -> Path:
    """`KVFOLD_CACHE`, else ~/.cache/kvfold; one for temporary files where there is no home, or none that can be written."""
    if os.environ.get("KVFOLD_CACHE"):
        return Path(os.environ["KVFOLD_CACHE"])
    try:
        folder = Path.home() / ".cache" / "kvfold"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except (RuntimeError, OSError):
        pass
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    folder = Path(tempfile.gettempdir()) / f"kvfold-{user}"
    folder.mkdir(exist_ok=True, mode=0o700)
    # Others can write to the parent: what lies in a folder of theirs must not be run.
    if hasattr(os, "getuid") and (folder.is_symlink() or folder.stat().st_uid != user or folder.stat().st_mode & 0o022):
        return Path(tempfile.mkdtemp(prefix="kvfold-"))
    return folder


_SPREAD = 1 << 20
"""Elements that PyTorch shares out to all of its threads."""


def flush_denormals() -> bool:
    """From here on a CPU takes numbers below 1e-38 for zero. True if it does so in all threads.

    Gates that have learned to let go give keys a bias of about -90, and the weight of such a key is such a number: without
    this, much of a retrofit's time goes to them. Threads take the setting over from the one that starts them and keep it, so
    call this before PyTorch has computed anything large; a processor that can't do it gives False.
    """
    torch.set_flush_denormal(True)
    # Every thread multiplies its part.
    return not (torch.full((_SPREAD,), 1e-30) * 1e-10).any().item()
