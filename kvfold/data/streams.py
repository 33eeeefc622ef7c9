"""Reading the text of a file a little at a time, for files that memory has no room for. The kinds of files and what is said of
a broken one are those of texts.py; parquet besides.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kvfold.data.texts import TEXT_RULE, check_there, holds_lines, json_lines, text_of
from kvfold.errors import UserError, one_line

_PARQUET_ROWS = 256
"""Rows in memory at once."""


class TextStream:
    """The file's text in order: a document at a time where each has a line or a row of its own, else about `characters` at a
    time, cut at a line's end where there is one. Blank texts are left out. Raises `UserError`, in one line, where reading
    comes to something that can't be read.
    """

    def __init__(self, path: Path, characters: int):
        check_there(path)
        self.share = 0.0
        """Of the file's bytes, or a parquet file's rows, those that were read."""
        self._path, self._characters = path, characters

    def __iter__(self) -> Iterator[str]:
        if self._path.suffix == ".parquet":
            texts = self._column()
        else:
            texts = self._lines() if holds_lines(self._path) else self._blocks()
        return (text for text in texts if text and text.strip())

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """The unpacked bytes; `share` follows."""
        path = self._path
        try:
            with path.open("rb") as raw:
                self._raw, self._size = raw, max(1, path.stat().st_size)
                with gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw as file:
                    yield file
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: it is not UTF-8: save the file as UTF-8") from error
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: it can't be read ({one_line(error)}): fetch it again") from error

    def _note(self) -> None:
        self.share = self._raw.tell() / self._size

    def _lines(self) -> Iterator[str]:
        with self._opened() as file:
            lines = (line.removesuffix(b"\n") for line in file)
            for number, record in json_lines(self._path, lines, TEXT_RULE):
                self._note()
                yield text_of(self._path, number, record)

    def _blocks(self) -> Iterator[str]:
        with self._opened() as file, io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
            rest = ""
            while part := text.read(self._characters - len(rest)):
                self._note()
                block = rest + part
                cut = block.rfind("\n") + 1 or len(block)
                yield block[:cut]
                rest = block[cut:]
            yield rest

    def _column(self) -> Iterator[str]:
        """The `text` of a parquet file's rows."""
        from pyarrow import ArrowInvalid, parquet

        path = self._path
        try:
            with parquet.ParquetFile(path) as file:
                found, done, total = file.schema_arrow.names, 0, max(1, file.metadata.num_rows)
                if "text" not in found:
                    raise UserError(
                        f"{path}: no column 'text' among {', '.join(found)}: rename the one that holds the text"
                    )
                for rows in file.iter_batches(_PARQUET_ROWS, columns=["text"]):
                    done += len(rows)
                    self.share = done / total
                    yield from rows["text"].to_pylist()
        except (OSError, ArrowInvalid) as error:
            raise UserError(f"{path}: it can't be read ({one_line(error)}): fetch it again") from error
