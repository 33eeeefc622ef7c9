"""Reading text files into documents, and saying in one line what is wrong with a file that can't be read.

A `.json` or `.jsonl` file holds one JSON object a line with its text under `text`; any other file is one document of
plain text. Each may be gzipped (`.gz`). How documents become tokens is not this file's business, nor what lines hold that
are no text: `file_bytes` and `json_lines` are for all readers.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.errors import UserError, one_line

SAMPLE = Path(__file__).parents[1] / "assets" / "sample" / "persuasion.txt"
"""The novel that comes with kvfold: what is read where no text is named."""
_LINES = (".jsonl", ".json")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFile:
    """The documents of one file."""

    name: str
    """The file's name without folder and endings: `brown` for `valid/brown.jsonl.gz`."""
    documents: tuple[str, ...]
    """In the order of the file; none is blank."""
    digest: str
    """SHA-256 of the (unpacked) bytes, to know the same text again."""

    @property
    def joined(self) -> str:
        """The documents with a blank line between them."""
        return "\n\n".join(self.documents)


def read_text_file(path: str | Path) -> TextFile:
    """The documents of a text file. Raises `UserError`, in one line, for a file that is missing, torn, empty or not UTF-8."""
    path = Path(path)
    data = file_bytes(path)
    documents = _documents_of_lines(path, data) if holds_lines(path) else [_decoded(path, data)]
    documents = tuple(document for document in documents if document.strip())
    if not documents:
        raise UserError(f"{path}: there is no text in it: give a file with text")
    name = path.name.removesuffix(".gz")
    return TextFile(name=Path(name).stem, documents=documents, digest=hashlib.sha256(data).hexdigest())


def holds_lines(path: Path) -> bool:
    """Whether a file of this name holds a JSON object a line."""
    endings = [ending for ending in path.suffixes[-2:] if ending != ".gz"]
    return bool(endings) and endings[-1] in _LINES


def file_bytes(path: Path) -> bytes:
    """A file's bytes, unpacked where its name ends in `.gz`. Raises `UserError`, in one line, where it can't be read."""
    check_there(path)
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: it can't be read ({one_line(error)}): fetch it again") from error


def check_there(path: Path) -> None:
    """Raise `UserError` where there is no file."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file: correct the path")
    if path.is_dir():
        raise UserError(f"{path}: this is a folder: give a text file")


def _decoded(path: Path, data: bytes, start: int = 0) -> str:
    """`start`: byte of the file at which `data` begins."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at, byte = start + error.start, data[error.start]
        raise UserError(f"{path}: byte {at} (0x{byte:02x}) is not UTF-8: save the file as UTF-8") from error


def json_lines(path: Path, lines: Iterable[bytes], rule: str) -> Iterator[tuple[int, Any]]:
    """The JSON values of a file's lines with their numbers; blank lines are left out.

    `rule`: what each line is, for the `UserError` that a line which is no JSON raises.
    """
    start = 0
    for number, raw in enumerate(lines, start=1):
        line = _decoded(path, raw, start)
        start += len(raw) + 1
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} line {number}: not JSON: {rule}") from error


TEXT_RULE = "each line is one object with its text under 'text'"


def _documents_of_lines(path: Path, data: bytes) -> list[str]:
    return [text_of(path, number, record) for number, record in json_lines(path, data.split(b"\n"), TEXT_RULE)]


def text_of(path: Path, number: int, record: Any) -> str:
    """The text of one line's object. Raises `UserError` where it has none."""
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{path} line {number}: no text under 'text': {TEXT_RULE}")
    return text
