"""The folder of a run: what it was started with, its curve and its checkpoints, so that the same command goes on.

`OUT/training/` holds them; the result itself lies in `OUT`. A checkpoint is written under another name, flushed to the disk,
renamed, and only then marked as whole: whatever moment the writer dies at, a reader finds the marked ones whole. No torch.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.errors import UserError
from kvfold.record import write_whole_file

MAY_DIFFER = ("micro_batch_size", "save_steps", "gradient_checkpointing", "teacher_states")
"""Settings that a run may go on with another value of: they bear on time, memory and rounding alone."""
CURVE = "curve.jsonl"
_MARK = "whole.json"
PARTIAL = ".partial-"
"""What the names of folders begin with that are not whole yet."""
_LAST = {"adapter.json": 1, "config.json": 1}
"""A folder is loaded by these, so they come last."""
_NAME = re.compile(r"checkpoint-(\d+)")
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
        return self.training / CURVE

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process trains here; one that is killed leaves no lock. Raises `UserError` where one does. A folder
        that was made for it and holds nothing in the end is removed.
        """
        made = [path for path in (self.out, *self.out.parents) if not path.exists()]
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{self.out}: a file is in the way: name a folder that is not there yet") from None
        handle = os.open(self.out, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{self.out}: another process trains in this folder: wait until it ends, or name another folder"
                ) from None
            yield
        finally:
            os.close(handle)
            with contextlib.suppress(OSError):  # not empty
                for path in made:
                    path.rmdir()

    def check(self, source: str, settings: Any, dtype: str = _DTYPE) -> dict[str, Any]:
        """The note of a run. `source`: the model that is trained on, or the recipe; `settings`: see `TrainSettings`; `dtype`: of
        weights that don't learn. Writes nothing. Raises `UserError` where a run with other settings lies there, or something
        else is in the way.
        """
        here = {"source": source, "dtype": dtype, "settings": settings.model_dump(mode="json")}
        there = self.read("run")
        if there is not None:
            for name, old, new in _differences(there, here, settings):
                raise UserError(
                    f"{self.out}: a run lies there with {name} {old!r}, not {new!r}: "
                    "give the same settings to go on, or another folder"
                )
        elif self.out.is_file() or any(parent.is_file() for parent in self.out.parents):
            raise UserError(f"{self.out}: a file is in the way: name a folder that is not there yet")
        elif self.out.is_dir() and any(self.out.iterdir()):
            raise UserError(f"{self.out}: the folder holds something else: name a new one, or empty it")
        return here

    def begin(self, source: str, settings: Any, dtype: str = _DTYPE) -> None:
        """Begin a run, or go on with the one that lies there; see `check`."""
        self.write("run", self.check(source, settings, dtype))

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
        """The facts of a run whose result lies there, whole; else None."""
        return self.read("done") if any((self.out / name).is_file() for name in _LAST) else None

    def write(self, name: str, note: Mapping[str, Any]) -> None:
        """Keep a note; it is there whole or not at all."""
        write_whole_file(self.training / f"{name}.json", json.dumps(note, indent=1) + "\n")

    def give_up(self) -> None:
        """Remove a run that was begun just now and has come to nothing. One that can be resumed stays."""
        if self.checkpoint is None:
            shutil.rmtree(self.training, ignore_errors=True)

    def clear(self) -> None:
        """The result is written: its checkpoints are of no more use."""
        drop_old(self.training, keep=0)


def leads() -> bool:
    """Whether this is the process that writes, of one or of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], settings: Any) -> list[tuple[str, Any, Any]]:
    """Names with their old and new values. A setting that the run was begun without, since it is newer, had its default."""
    defaults = {name: one.default for name, one in type(settings).model_fields.items()}
    before = {**defaults, **(there.get("settings") or {})}
    # A setting may be called `source` as well.
    pairs = [("SOURCE", there.get("source"), here["source"]), ("dtype", there.get("dtype", _DTYPE), here["dtype"])]
    pairs += [(name, before.get(name), new) for name, new in here["settings"].items() if name not in MAY_DIFFER]
    return [(name, old, new) for name, old, new in pairs if old != new]


def seal(staged: Path, final: Path) -> None:
    """Give a folder that was written under another name its own, and mark it with its files' sizes."""
    sizes = {}
    for file in sorted(path for path in staged.rglob("*") if path.is_file()):
        _flush(file)
        sizes[str(file.relative_to(staged))] = file.stat().st_size
    _flush(staged)
    # What has this name is no whole checkpoint, or its step would not be done again.
    shutil.rmtree(final, ignore_errors=True)
    os.replace(staged, final)
    _flush(final.parent)
    write_whole_file(final / _MARK, json.dumps(sizes, indent=1) + "\n")
    _flush(final)


def newest_whole(folder: Path) -> Path | None:
    """The marked checkpoint of the highest step whose files are all there at their sizes; None if there is none."""
    return next(filter(is_whole, _newest_first(folder)), None)


def is_whole(checkpoint: Path) -> bool:
    """Whether it is marked, and has what the mark says."""
    try:
        sizes = json.loads((checkpoint / _MARK).read_text(encoding="utf-8"))
        return bool(sizes) and all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that were done when it was written."""
    return int(_NAME.fullmatch(checkpoint.name)[1])


def drop_old(folder: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` whole checkpoints, and what is not whole."""
    for left in folder.glob(f"{PARTIAL}*"):  # by writers that died: one process at a time trains in a folder
        shutil.rmtree(left, ignore_errors=True)
    found = _newest_first(folder)
    kept = list(filter(is_whole, found))[:keep]
    for path in found:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _newest_first(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=step_of, reverse=True)


def _flush(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The points of a curve; a last line that was cut short counts as none."""
    points = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            points.append(json.loads(line))
        except ValueError:
            break
    return points


@contextmanager
def staged(folder: Path, card: str | None) -> Iterator[Path]:
    """A folder to write in, whose files then take their places."""
    partial = folder / f".partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        for file in sorted(partial.iterdir(), key=lambda path: (_LAST.get(path.name, 0), path.name)):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def card_text(name: str, what: str, rows: Mapping[str, str | None], command: str, use: str) -> str:
    """The card of a result: what it is, a table whose rows of None are left out, the command, and a line of Python."""
    table = "".join(f"| {label} | {value} |\n" for label, value in rows.items() if value)
    return (
        f"# {name}\n\n{what}\n\n| | |\n|---|---|\n{table}\nMade by `{command}`.\n\n"
        f"```python\nimport kvfold\n\n{use}\n```\n"
    )


def machine_rows(facts: Mapping[str, Any]) -> dict[str, str]:
    """Where a result was trained, and how long."""
    return {"hardware": facts["hardware"], "time": f"{facts['seconds'] / 60:.1f} minutes of training"}
