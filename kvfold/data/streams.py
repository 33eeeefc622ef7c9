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

from kvfold.data.texts import TEXT_RULE, holds_lines, json_lines, text_of

_PARQUET_ROWS = 256
"""Rows in memory at once."""


def stream_texts(path: Path, characters: int) -> Iterator[str]:
    """The file's text in order: a document at a time where each has a line or a row of its own, else about `characters` at a
    time, cut at a line's end where there is one. Blank texts are left out. Raises `ValueError`, in one line, where reading
    comes to something that can't be read.
    """
    if path.suffix == ".parquet":
        texts = _column(path)
    elif holds_lines(path):
        texts = _lines(path)
    else:
        texts = _blocks(path, characters)
    return (text for text in texts if text and text.strip())


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The unpacked bytes."""
    if not path.exists():
        raise ValueError(f"{path}: there is no such file: correct the path")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: it is not UTF-8: save the file as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: it can't be read ({' '.join(str(error).split())}): fetch it again") from error


def _lines(path: Path) -> Iterator[str]:
    with _opened(path) as file:
        lines = (line.removesuffix(b"\n") for line in file)
        for number, record in json_lines(path, lines, TEXT_RULE):
            yield text_of(path, number, record)


def _blocks(path: Path, characters: int) -> Iterator[str]:
    with _opened(path) as file, io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
        rest = ""
        while part := text.read(characters):
            block = rest + part
            cut = block.rfind("\n") + 1 or len(block)
            yield block[:cut]
            rest = block[cut:]
        yield rest


def _column(path: Path) -> Iterator[str]:
    """The `text` of a parquet file's rows."""
    if not path.exists():
        raise ValueError(f"{path}: there is no such file: correct the path")
    from pyarrow import ArrowInvalid, parquet

    try:
        with parquet.ParquetFile(path) as file:
            found = file.schema_arrow.names
            if "text" not in found:
                raise ValueError(
                    f"{path}: no column 'text' among {', '.join(found)}: rename the one that holds the text"
                )
            for rows in file.iter_batches(_PARQUET_ROWS, columns=["text"]):
                yield from rows["text"].to_pylist()
    except (OSError, ArrowInvalid) as error:
        raise ValueError(f"{path}: it can't be read ({' '.join(str(error).split())}): fetch it again") from error
