"""Checkpoints to go on from: written under another name, flushed to the disk, renamed, and only then marked as whole.

Whatever moment the writer dies at, a reader finds the marked ones whole and takes no other. No torch.
"""

import json
import os
import re
import shutil
from pathlib import Path

from kvfold.data.whole_file import write_whole_file

_MARK = "whole.json"
PARTIAL = ".partial-"
"""What the names of folders begin with that are not whole yet."""
_NAME = re.compile(r"checkpoint-(\d+)")


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
    return next((path for _, path in reversed(_numbered(folder)) if is_whole(path)), None)


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
    found = [path for _, path in reversed(_numbered(folder))]
    whole = [path for path in found if is_whole(path)]
    for path in found:
        if path not in whole[:keep]:
            shutil.rmtree(path, ignore_errors=True)


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    return sorted((int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)))


def _flush(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
