"""Reading multiple-choice questions from a file: one JSON object a line, plain or gzipped (`.gz`).

`input` is the question, `choices` the answers to choose from, `gold` the index of the right one, and `prefix` (which may be
missing) what comes before every question. How a question is worded for a model is not this file's business.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.data.texts import file_bytes, json_lines
from kvfold.errors import UserError

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


def is_question_file(name: str) -> bool:
    """Whether a name is one of a file of questions rather than of a task."""
    return name.removesuffix(".gz").endswith((".jsonl", ".json"))


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
