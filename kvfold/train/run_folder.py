"""The folder of a run: what it was started with, its curve and its checkpoints, so that the same command goes on.

`OUT/training/` holds them; the result itself lies in `OUT`. No torch.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kvfold.data.whole_file import write_whole_file
from kvfold.errors import UserError
from kvfold.train.checkpoints import newest_whole, step_of

MAY_DIFFER = ("sequences_at_once", "save_steps", "checkpoint_activations", "teacher_states")
"""Settings that a run may go on with another value of: they bear on time, memory and rounding alone."""


_DTYPE = "float32"
"""Of a run whose note says nothing of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """One run's folder."""

    out: Path

    @property
    def training(self) -> Path:
        """Curve, checkpoints, and notes of what is done."""
        return self.out / "training"

    @property
    def curve(self) -> Path:
        """A line of JSON for each step."""
        return self.training / "curve.jsonl"

    def check(self, source: str, settings: Any, dtype: str = _DTYPE) -> None:
        """`source`: the model that is trained on, or the recipe; `settings`: a dataclass of plain values; `dtype`:
        of weights that don't learn. Writes nothing.
        Raises `UserError` where a run with other settings lies there, or something else is in the way.
        """
        there = self.read("run")
        if there is not None:
            for name, old, new in _differences(there, _run(source, settings, dtype), settings):
                raise UserError(
                    f"{self.out}: a run lies there with {name} {old!r}, not {new!r}: "
                    "give the same settings to go on, or another folder"
                )
        elif self.out.is_file() or any(parent.is_file() for parent in self.out.parents):
            raise UserError(f"{self.out}: a file is in the way: name a folder that is not there yet")
        elif self.out.is_dir() and any(self.out.iterdir()):
            raise UserError(f"{self.out}: the folder holds something else: name a new one, or empty it")

    def begin(self, source: str, settings: Any, dtype: str = _DTYPE) -> None:
        """Begin a run, or go on with the one that lies there; see `check`."""
        self.check(source, settings, dtype)
        self.write("run", _run(source, settings, dtype))

    def keep_text(self, digest: str) -> None:
        """Note which text is trained on. Raises `UserError` where it was another one."""
        there = self.read("text")
        if there is None:
            self.write("text", {"sha256": digest})
        elif there != {"sha256": digest}:
            raise UserError(
                f"{self.out}: the run that lies there was begun on another text: the data has changed since, or how kvfold "
                "reads it: put it back to go on, or begin in another folder"
            )

    @property
    def checkpoint(self) -> Path | None:
        """The newest whole checkpoint."""
        return newest_whole(self.training)

    @property
    def done_steps(self) -> int:
        """Optimizer steps of that checkpoint."""
        found = self.checkpoint
        return 0 if found is None else step_of(found)

    def read(self, name: str) -> dict[str, Any] | None:
        """A note of the run; None where it was not written."""
        try:
            return json.loads((self.training / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def finished(self) -> dict[str, Any] | None:
        """The facts of a run whose model lies there, whole; else None."""
        return self.read("done") if (self.out / "config.json").is_file() else None

    def write(self, name: str, note: Mapping[str, Any]) -> None:
        """Keep a note; it is there whole or not at all."""
        write_whole_file(self.training / f"{name}.json", json.dumps(note, indent=1) + "\n")

    def give_up(self) -> None:
        """Remove a run that was begun and has come to nothing, and its folder where that holds nothing else."""
        shutil.rmtree(self.training, ignore_errors=True)
        if self.out.is_dir() and not any(self.out.iterdir()):
            self.out.rmdir()

    def clear(self) -> None:
        """The result is written: its checkpoints are of no more use."""
        for path in self.training.glob("checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(self.training / ".partial", ignore_errors=True)


def leads() -> bool:
    """Whether this is the process that writes, of one or of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _run(source: str, settings: Any, dtype: str) -> dict[str, Any]:
    return {"source": source, "dtype": dtype, "settings": json.loads(json.dumps(asdict(settings)))}


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], settings: Any) -> list[tuple[str, Any, Any]]:
    """Names with their old and new values. A setting that the run was begun without, since it is newer, had its default."""
    defaults = {one.name: one.default for one in fields(settings)}
    before = {**defaults, **(there.get("settings") or {})}
    found = [
        (name, before.get(name), value)
        for name, value in here["settings"].items()
        if before.get(name) != value and name not in MAY_DIFFER
    ]
    # A setting may be called `source` as well.
    for name, default in (("dtype", _DTYPE), ("source", None)):
        old, new = there.get(name, default), here[name]
        if old != new:
            found.insert(0, (name.upper() if name == "source" else name, old, new))
    return found
