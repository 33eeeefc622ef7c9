"""The record of a run, a line of JSON for each optimizer step, and the same for TensorBoard where that is installed.

A run that goes on from a checkpoint first forgets the steps after it: they come again.
"""

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvfold.data.whole_file import write_whole_file


class Curve:
    """Appends to `curve.jsonl` in a run's folder, and to `tensorboard/` beside it."""

    def __init__(self, folder: Path, *, done_steps: int):
        """`done_steps`: steps of the checkpoint that the run goes on from; later lines are dropped."""
        self._path = folder / "curve.jsonl"
        kept = [point for point in read_curve(self._path) if point["step"] <= done_steps]
        write_whole_file(self._path, "".join(json.dumps(point) + "\n" for point in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._board = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done_steps + 1)

    def add(self, point: Mapping[str, Any]) -> None:
        """One step: `step`, and numbers or lists of numbers under any names. On the disk before a checkpoint of the step is."""
        self._file.write(json.dumps(point) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._board is not None:
            for name, value in point.items():
                if isinstance(value, list):
                    for index, one in enumerate(value):
                        self._board.add_scalar(f"{name}/{index}", one, point["step"])
                elif name != "step" and value is not None:
                    self._board.add_scalar(name, value, point["step"])

    def close(self) -> None:
        """Nothing more is added."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The points of a curve; a last line that was cut short counts as none."""
    points = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            points.append(json.loads(line))
        except ValueError:
            break
    return points
