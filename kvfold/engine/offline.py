"""A file of requests in, a file of answers out: one line for each line, in order, resumable.

A record of the output holds the number of its line and a fingerprint of what was asked, so that a second run goes on
behind what is there, and refuses an output that belongs to another input. A line that can't be read or answered becomes
a record with an `error`; the others go on.
"""

import hashlib
import json
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from kvfold.engine.answers import Answer, Piece
from kvfold.engine.engine import Engine
from kvfold.errors import UserError

LOOKAHEAD = 1024
"""Lines that are read and submitted ahead of the first one that is not answered yet."""
REPORT_SECONDS = 0.5

Report = Callable[[dict[str, Any]], None]
"""Is told `done` and `total` lines, `tokens_per_s` of answers and `running` requests."""


def answer_file(
    engine: Engine,
    source: str | Path,
    target: str | Path,
    *,
    defaults: Mapping[str, Any] | None = None,
    report: Report = lambda facts: None,
) -> dict[str, int]:
    """Answer every line of `source`, a JSON object of OpenAI's field names, into `target`. `defaults` hold where a line says
    nothing. Gives the numbers of lines answered now, of those among them that are errors, and of lines that were there already.
    """
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise UserError(f"input {source} must be a file of JSON lines, got none: give one that is there")
    with source.open("rb") as file:
        total = sum(1 for line in file if line.strip())
    there = _lines_done(source, target)
    counts = {"answered": 0, "errors": 0, "skipped": there}
    run, began, tokens, reported = _Run(engine, defaults or {}), time.monotonic(), 0, 0.0
    with target.open("ab") as out:
        for record in run.records(source, there):
            out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            out.flush()
            counts["answered"] += 1
            counts["errors"] += any("error" in choice for choice in record["choices"])
            tokens += record["usage"]["completion_tokens"]
            now = time.monotonic()
            if now - reported > REPORT_SECONDS or there + counts["answered"] == total:
                reported, speed = now, tokens / max(1e-9, now - began)
                report({
                    "done": there + counts["answered"], "total": total, "tokens_per_s": speed,
                    "running": engine.stats()["running"],
                })  # fmt: skip
    return counts


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, numbered from 1 as an editor does."""
    with source.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.strip()


def _fingerprint(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[:16]


def _lines_done(source: Path, target: Path) -> int:
    """Lines of the output that are whole; a last one that was cut off is removed."""
    if not target.exists():
        return 0
    done, end = 0, 0
    with target.open("rb") as file:
        for line, asked in zip(file, _lines(source), strict=False):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                same = (record["line"], record["asked"]) == (asked[0], _fingerprint(asked[1]))
            except (ValueError, KeyError, TypeError):
                same = False
            if not same:
                raise UserError(
                    f"output {target} line {done + 1} must answer line {asked[0]} of {source}, got another: give a new file"
                )
            done, end = done + 1, end + len(line)
        file.seek(end)
        rest = file.read(1 << 20)
    if b"\n" in rest:
        raise UserError(f"output {target} must not be longer than {source}, got more lines: give a new file")
    if rest:
        with target.open("r+b") as file:
            file.truncate(end)
    return done


class _Run:
    """Requests in flight, and what came of them."""

    def __init__(self, engine: Engine, defaults: Mapping[str, Any]):
        self._engine, self._defaults = engine, defaults
        self._outbox: queue.SimpleQueue[tuple[int, Piece]] = queue.SimpleQueue()
        self._answers: dict[int, list[Answer]] = {}
        self._left: dict[int, int] = {}
        self._jobs: dict[int, list] = {}

    def records(self, source: Path, skipped: int) -> Iterator[dict[str, Any]]:
        """One record for each line behind the `skipped` ones, in order."""
        lines, ahead = islice(enumerate(_lines(source)), skipped, None), deque()
        try:
            while True:
                for place, (number, line) in islice(lines, LOOKAHEAD - len(ahead)):
                    self._ask(place, line)
                    ahead.append((place, number, line))
                if not ahead:
                    return
                place, number, line = ahead.popleft()
                while self._left[place]:
                    at, piece = self._outbox.get()
                    self._answers[at][piece.index].add(piece)
                    self._left[at] -= 1
                self._jobs.pop(place, None)
                del self._left[place]
                yield _record(number, line, self._answers.pop(place))
        finally:
            for job in self._jobs.values():
                self._engine.cancel(job)

    def _ask(self, place: int, line: bytes) -> None:
        try:
            asked = json.loads(line)
            asked = {**self._defaults, **asked} if isinstance(asked, Mapping) else {**self._defaults, "prompt": asked}
            asked.pop("id", None)
            job = self._engine.submit(asked, lambda piece: self._outbox.put((place, piece)), streams=False)
        except ValueError as error:  # json's own error is one
            broken = isinstance(error, json.JSONDecodeError | UnicodeDecodeError)
            said = f"the line must be a JSON object, got none ({error})" if broken else str(error)
            self._answers[place], self._left[place] = [Answer(finish_reason="error", error=said)], 0
            return
        self._jobs[place], self._left[place] = job, len(job)
        self._answers[place] = [Answer() for _ in job]


def _record(number: int, line: bytes, answers: list[Answer]) -> dict[str, Any]:
    """What stands in the output for one line."""
    record: dict[str, Any] = {"line": number, "asked": _fingerprint(line)}
    with suppress(ValueError, KeyError, TypeError):
        record["id"] = json.loads(line)["id"]
    record["choices"] = []
    for index, answer in enumerate(answers):
        choice = {
            "index": index,
            "text": answer.text,
            "token_ids": answer.token_ids,
            "finish_reason": answer.finish_reason,
        }
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(answer, name):
                choice[name] = [asdict(one) for one in getattr(answer, name)]
        if answer.error:
            choice["error"] = answer.error
        record["choices"].append(choice)
    record["usage"] = {"completion_tokens": sum(len(answer.token_ids) for answer in answers)}
    if answers[0].usage is not None:
        record["usage"] = asdict(answers[0].usage) | record["usage"]
    return record
