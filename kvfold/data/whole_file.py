"""Writing a file so that a reader finds it whole or not at all, whenever the writer dies."""

import os
from pathlib import Path


def write_whole_file(path: Path, content: str | bytes) -> Path:
    """Write under a temporary name beside `path`, to the disk, then rename. Gives the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
