"""Reading files of text and of questions, and saying in one line what is wrong with a file that can't be read.

A `.json` or `.jsonl` file holds one JSON object a line with its text under `text`; any other file is one document of
plain text. Each may be gzipped (`.gz`). `TextStream` reads a little at a time, for files that memory has no room for, parquet
besides. A line of a file of multiple-choice questions has `input`, the question; `choices`, the answers to choose from;
`gold`, the index of the right one; and perhaps `prefix`, what comes before every question. How documents become tokens, and
how a question is worded for a model, is not this file's business.
"""

import gzip
import hashlib
import io
import json
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from kvfold.errors import UserError, one_line

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE = Path(__file__).parent / "assets" / "sample" / "persuasion.txt"
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
    texts = _text_lines(path, data.split(b"\n")) if holds_lines(path) else [_decoded(path, data)]
    documents = tuple(document for document in texts if document.strip())
    if not documents:
        raise UserError(f"{path}: there is no text in it: give a file with text")
    name = path.name.removesuffix(".gz")
    return TextFile(name=Path(name).stem, documents=documents, digest=hashlib.sha256(data).hexdigest())


def holds_lines(path: Path) -> bool:
    """Whether a file of this name holds a JSON object a line, each a text or a question."""
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


_TEXT_RULE = "each line is one object with its text under 'text'"


def _text_lines(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    """The text of each line's object. Raises `UserError` where it has none."""
    for number, record in json_lines(path, lines, _TEXT_RULE):
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{path} line {number}: no text under 'text': {_TEXT_RULE}")
        yield text


_RULE = (
    "each line is one object with 'input', 'choices' (2 or more texts), 'gold' (the index of one) and perhaps 'prefix'"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question."""

    prefix: str
    """What comes before it; "" for nothing."""
    input: str
    """The question itself."""
    choices: tuple[str, ...]
    """Two or more answers."""
    gold: int
    """Which of them is right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionFile:
    """The questions of one file."""

    name: str
    """The file's name without folder and endings."""
    questions: tuple[Question, ...]
    """In the order of the file; one or more."""
    digest: str
    """SHA-256 of the (unpacked) bytes, to know the same questions again."""


def read_question_file(path: str | Path) -> QuestionFile:
    """The questions of a file. Raises `UserError`, in one line, for a file that is missing, torn, empty or of another shape."""
    path = Path(path)
    data = file_bytes(path)
    questions = tuple(_question(path, number, record) for number, record in json_lines(path, data.split(b"\n"), _RULE))
    if not questions:
        raise UserError(f"{path}: there is no question in it: {_RULE}")
    return QuestionFile(
        name=Path(path.name.removesuffix(".gz")).stem, questions=questions, digest=hashlib.sha256(data).hexdigest()
    )


def _question(path: Path, number: int, record: Any) -> Question:
    def refuse(what: str) -> UserError:
        return UserError(f"{path} line {number}: {what}: {_RULE}")

    if not isinstance(record, dict):
        raise refuse("not an object")
    missing = [name for name in ("input", "choices", "gold") if name not in record]
    if missing:
        raise refuse(f"no '{missing[0]}'")
    text, choices, gold, prefix = record["input"], record["choices"], record["gold"], record.get("prefix", "")
    if not isinstance(text, str) or not text.strip() or not isinstance(prefix, str):
        raise refuse("'input' or 'prefix' is no text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise refuse("'choices' are not 2 or more texts")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise refuse(f"'gold' is {gold!r} and there are {len(choices)} choices")
    return Question(prefix=prefix, input=text, choices=tuple(choices), gold=gold)


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
        self.path, self._characters = path, characters

    def __iter__(self) -> Iterator[str]:
        lines = self._lines if holds_lines(self.path) else self._blocks
        texts = self._column() if self.path.suffix == ".parquet" else lines()
        return (text for text in texts if text and text.strip())

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO | gzip.GzipFile]:
        """The unpacked bytes; `share` follows."""
        path = self.path
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
            for text in _text_lines(self.path, (line.removesuffix(b"\n") for line in file)):
                self._note()
                yield text

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

        path = self.path
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


@dataclass(frozen=True, kw_only=True, slots=True)
class TextWindows:
    """Windows of one file, all of one length."""

    name: str
    """The file's name."""
    digest: str
    """SHA-256 of the file's bytes."""
    ids_WT: "Tensor"
    """Token ids, int64 [W, T], an opening bos included."""
    scored_bytes: tuple[int, ...]
    """UTF-8 bytes of the scored text of each window: all tokens but the first."""

    @property
    def num_windows(self) -> int:
        """W."""
        return self.ids_WT.shape[0]

    @property
    def context_tokens(self) -> int:
        """T."""
        return self.ids_WT.shape[1]


def text_windows(
    text: TextFile, tokenizer: Any, *, windows: int, context_tokens: int, most_context_tokens: int | None = None
) -> TextWindows:
    """`windows` windows of `context_tokens` tokens, evenly spaced over the consecutive windows of the text.

    Each is opened by the bos if the tokenizer adds one of its own accord. Warns where the text has fewer windows and takes
    those. Raises `UserError` where it has none, or a window is longer than the model's context (`most_context_tokens`).
    """
    import torch

    if windows < 1:
        raise UserError(f"{windows} windows: text is measured on 1 window or more: ask for 1 or more")
    if context_tokens < 2:
        raise UserError(
            f"a context of {context_tokens} tokens: a window has 2 or more, one to read and one to score: ask for more"
        )
    if most_context_tokens is not None and context_tokens > most_context_tokens:
        raise UserError(
            f"a context of {context_tokens} tokens: the model reads {most_context_tokens} at most: ask for a shorter context"
        )
    opening = opening_tokens(tokenizer)
    ids, ends = _tokenised(text.joined, tokenizer)
    body = context_tokens - len(opening)
    available = len(ids) // body
    if not available:
        raise UserError(
            f"{text.name}: the text has {len(ids)} tokens and a window takes {body}: give a longer text or a shorter context"
        )
    if available < windows:
        warnings.warn(
            f"{text.name}: the text has {available} windows of {context_tokens} tokens, not {windows}: all are taken",
            stacklevel=2,
        )
        windows = available
    starts = [index * available // windows * body for index in range(windows)]
    # Without an opening token the first token of a window is read but has nothing before it to be predicted from.
    first = 0 if opening else 1
    return TextWindows(
        name=text.name,
        digest=text.digest,
        ids_WT=torch.tensor([[*opening, *ids[start : start + body]] for start in starts]),
        scored_bytes=tuple(_bytes_between(text.joined, ends, start + first, start + body) for start in starts),
    )


_CHARACTERS_A_TOKEN = 32
"""More than a token of running text has."""


def text_beginning(text: TextFile, tokenizer: Any, *, tokens: int) -> tuple["Tensor", list[str]]:
    """Ids [T] of the first `tokens` tokens, fewer where the text has fewer, and the characters of each: joined they are the
    text. Of several tokens that share a character the first has it; a bos that the tokenizer adds has none.
    """
    import torch

    if tokens < 2:
        raise UserError(f"{tokens} tokens: a text to look at has 2 or more: ask for more")
    opening = opening_tokens(tokenizer)
    begun = text.joined[: _CHARACTERS_A_TOKEN * tokens]
    ids, ends = _tokenised(begun, tokenizer)
    ids, ends = ids[: tokens - len(opening)], [0, *ends]
    pieces = [begun[ends[index] : ends[index + 1]] for index in range(len(ids))]
    if len(opening) + len(ids) < 2:
        raise UserError(f"{text.name}: a text of {len(ids)} tokens: there is nothing to see: give a longer one")
    return torch.tensor([*opening, *ids]), [*[""] * len(opening), *pieces]


def opening_tokens(tokenizer: Any) -> list[int]:
    """The bos that a tokenizer puts before a text of its own accord, as a list of one; empty if it puts none."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []


def _tokenised(text: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids without special tokens, and for each the character at which it ends."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__}: it can't say which characters a token covers: use the model's fast tokenizer"
        )
    # verbose=False: a text longer than the model's context is no mistake here.
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    return encoded.input_ids, [end for _, end in encoded.offset_mapping]


def _bytes_between(text: str, ends: list[int], first: int, stop: int) -> int:
    """UTF-8 bytes of the text of tokens `first` to `stop` - 1."""
    start = ends[first - 1] if first else 0
    return len(text[start : ends[stop - 1]].encode("utf-8"))
