"""The most memory that a piece of work took, beyond what was held when it began."""

import ctypes
import gc
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_HIGH_WATER = "5"
"""What Linux wants written to set the high-water mark back to what is held now."""


class PeakMemory:
    """Measures from its making on. On a GPU what torch allocated; on a CPU the process's resident memory."""

    def __init__(self, device: torch.device):
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            _return_freed_memory()
            self._before = _resident_bytes("VmRSS") if _reset_high_water() else None

    def bytes(self) -> int | None:
        """Peak since the making, less what was held then; None where the system doesn't tell."""
        if self._before is None:
            return None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device) - self._before
        peak = _resident_bytes("VmHWM")
        return None if peak is None else max(0, peak - self._before)


def _return_freed_memory() -> None:
    """Memory that was freed but kept by the C library would hide what comes next."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_high_water() -> bool:
    try:
        _CLEAR.write_text(_RESET_HIGH_WATER, encoding="ascii")
    except OSError:
        return False
    return _resident_bytes("VmRSS") is not None


def _resident_bytes(name: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith(f"{name}:")]
    return int(found[0][1]) * 1024 if found else None
