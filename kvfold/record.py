"""What a measurement leaves behind: a result file, and in each of its rows a record, `made`: by what it was made, where and when.

A row that an earlier run measured keeps the record of that run.
"""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from kvfold.errors import UserError

KINDS = ("quality", "tasks", "memory", "kept", "document", "curve", "decode", "step", "plan", "pretraining", "serve")
"""Kinds of results that the report draws."""
UNDRAWN_KINDS = ("prefill", "capacity", "kernel", "gpu")
"""Results of `kvfold bench` that the report has no picture of: they lie in folders of their own."""
ROWS = ("rows", "passkey", "tasks")
"""The lists of a result whose rows are measurements."""


def made(threads: int | None, dtype: str | None = None) -> dict[str, Any]:
    """Who makes a row, and when: commit (`-dirty` if files differ from it), versions, processor, threads, dtype."""
    versions = {name: version for name in ("kvfold", "torch") if (version := _version(name))}
    about = {
        "git_commit": git_commit(), **versions, "cpu": cpu_name(), "threads": threads,
        "dtype": dtype and dtype.removeprefix("torch."), "when": now(),
    }  # fmt: skip
    return {name: value for name, value in about.items() if value is not None}


def recorded(payload: Mapping[str, Any]) -> dict[str, Any]:
    """A result whose measured rows all have a record; threads and dtype are those of its `environment`."""
    environment = payload.get("environment") or {}
    record = made(environment.get("threads"), environment.get("dtype"))
    lists = {name: with_record(payload[name], record) for name in ROWS if isinstance(payload.get(name), list)}
    return {**payload, **lists}


def with_record(rows: Iterable[Mapping[str, Any]], record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows with this record; what a row's own record says stays as it is."""
    return [{**row, "made": {**record, **(row.get("made") or {})}} for row in rows]


def made_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether figures of two records may stand in one table without a word: all but commit and time agree."""
    return all(one.get(name) == other.get(name) for name in ("kvfold", "torch", "cpu", "threads"))


def now() -> str:
    """ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_result(path: Path, kind: str, payload: Mapping, command: str) -> Path:
    """Write one result with time, commit and environment added; the file is complete or not there at all.

    `payload` holds the rows and what else the kind has; its own `environment` (device, dtype, threads) is kept.
    Numbers that are not finite become null, since JSON has no word for them.
    """
    if kind not in (*KINDS, *UNDRAWN_KINDS):
        raise UserError(f"kind {kind!r} is unknown: a result is one of {', '.join((*KINDS, *UNDRAWN_KINDS))}")
    versions = {name: _version(name) for name in ("torch", "transformers", "kvfold")}
    machine = {"python": platform.python_version(), **versions, "cpu": cpu_name(), "cores": os.cpu_count()}
    data = {
        "kind": kind, "created": now(), "command": command, "git_commit": git_commit(), **recorded(payload),
        "environment": machine | (payload.get("environment") or {}),
    }  # fmt: skip
    return write_whole_file(Path(path), json.dumps(finite(data), indent=1, ensure_ascii=False) + "\n")


def finite(data: Any) -> Any:
    """The same as JSON has it: numbers that are not finite, for which it has no word, are None."""
    return json.loads(json.dumps(data), parse_constant=lambda _: None)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@lru_cache
def cpu_name() -> str:
    """What the machine's processor is called."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name") and ":" in line]
    return names[0] if names else platform.processor() or platform.machine()


@lru_cache
def git_commit() -> str | None:
    """The commit this very file is tracked in, `-dirty` if the package differs from it; None outside a checkout.

    An installed copy may lie inside somebody else's repository, hence the question whether git knows the file.
    """
    here = Path(__file__).resolve()

    def git(*args: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(here.parent), *args], capture_output=True, text=True, timeout=10)

    try:
        if git("ls-files", "--error-unmatch", here.name).returncode != 0:
            return None
        head = git("rev-parse", "HEAD")
        dirty = git("diff", "--quiet", "HEAD", "--", str(here.parent)).returncode != 0
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if head.returncode != 0 else head.stdout.strip() + ("-dirty" if dirty else "")


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
