"""What a teacher says of a sequence, kept on the disk: another run on the same text need not ask it again."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvfold.eval.cells import layout_key, model_key
from kvfold.models.decoder import FoldForCausalLM

_STATES = "states"


class TeacherStates:
    """States before the head, a file for each sequence: tokens x width x bytes of the dtype.

    A sequence is known by its tokens, a teacher by its weights and layout: runs of any order, method and batch share a folder.
    What was computed beside other sequences differs in rounding; what was computed under autocast is kept apart.
    """

    def __init__(self, folder: Path, teacher: FoldForCausalLM):
        """`teacher`: as it is before anything is trained or added."""
        key = model_key(teacher, "")
        layout = layout_key(teacher.config.layout)[:8]
        about = "-".join([key["fingerprint"][:16], layout, key["device"], key["dtype"].removeprefix("torch.")])
        self._folder, self._device = folder / about, teacher.device.type
        self._folder.mkdir(parents=True, exist_ok=True)

    def of(self, ids_BT: Tensor, ask: Callable[[Tensor], Tensor]) -> Tensor:
        """[B, T, C] on the device of `ids_BT`; `ask` is called with the sequences that are not there yet, if any."""
        paths = [self._path(ids_T) for ids_T in ids_BT.cpu()]
        found = [_read(path, ids_BT.device) for path in paths]
        missing = [row for row, states in enumerate(found) if states is None]
        if missing:
            for row, states in zip(missing, ask(ids_BT[missing]), strict=True):
                found[row] = states
                _write(paths[row], states)
        return torch.stack(found)

    def _path(self, ids_T: Tensor) -> Path:
        known = hashlib.sha256(ids_T.long().numpy().tobytes())
        if torch.is_autocast_enabled(self._device):
            known.update(str(torch.get_autocast_dtype(self._device)).encode())
        return self._folder / f"{known.hexdigest()[:32]}.safetensors"


def _read(path: Path, device: torch.device) -> Tensor | None:
    try:
        return load_file(path, device=str(device))[_STATES]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None


def _write(path: Path, states_TC: Tensor) -> None:
    """Whole or not at all, whoever else writes the same."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file({_STATES: states_TC.contiguous()}, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
