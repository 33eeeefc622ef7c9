"""From tokens to what a caller gets: text as it comes, without stop strings or halves of characters; pieces of an answer, or
the whole; an answer while it is being made; and a file of requests answered into a file, one line for each line, in order.

A record of such a file holds the number of its line and a fingerprint of what was asked, so that a second run goes on
behind what is there, and refuses an output that belongs to another input. A line that can't be read or answered becomes
a record with an `error`; the others go on.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from kvfold.engine.request import FinishReason, Request, Usage
from kvfold.engine.sampler import Sampled, SamplingState, TokenLogprob, matcher_error
from kvfold.errors import UserError

if TYPE_CHECKING:
    from kvfold.engine.engine import Engine

CONTEXT_TOKENS = 8
"""Last tokens of the prompt that the first of the answer are decoded behind: some decoders drop a text's leading space."""


class StopFinder:
    """Looks for several strings in a text that comes piece by piece, in time linear in the text.

    Source: Knuth, Morris, Pratt 1977, "Fast pattern matching in strings".
    Differs: none.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(self._stops)

    @property
    def pending(self) -> int:
        """Characters at the text's end that may be the beginning of a stop string."""
        return max(self._matched, default=0)

    def feed(self, text: str) -> tuple[int, int] | None:
        """Look at more text. Where the first stop string ends in it: the end's place in `text`, and the string's length."""
        for place, letter in enumerate(text):
            found = 0
            for number, (stop, borders) in enumerate(self._stops):
                matched = self._matched[number]
                while matched and stop[matched] != letter:
                    matched = borders[matched - 1]
                matched += stop[matched] == letter
                if matched == len(stop):
                    found = max(found, matched)
                    matched = borders[-1]
                self._matched[number] = matched
            if found:
                return place + 1, found
        return None


def _borders(text: str) -> list[int]:
    """For each beginning of `text`: length of the longest shorter beginning that is also its end."""
    borders, matched = [0] * len(text), 0
    for place in range(1, len(text)):
        while matched and text[place] != text[matched]:
            matched = borders[matched - 1]
        matched += text[place] == text[matched]
        borders[place] = matched
    return borders


class TextStream:
    """The text of one answer. What it gives is final: no stop string, no half of a character."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], *, stop: Sequence[str] = (),
        include_stop: bool = False, skip_special_tokens: bool = True,
    ):  # fmt: skip
        self._tokenizer, self._skip, self._include = tokenizer, skip_special_tokens, include_stop
        context = list(prompt[-CONTEXT_TOKENS:])
        self._stream = DecodeStream(ids=context, skip_special_tokens=skip_special_tokens)
        self._finder = StopFinder(stop)
        self._undecoded: list[int] = []
        self._held = ""
        self.stopped = False
        """Whether a stop string was found; nothing comes after it."""

    def add(self, token: int, *, may_stop: bool = True) -> str:
        """The text that is certain now that one more token has come."""
        self._undecoded.append(token)
        text = self._stream.step(self._tokenizer.backend_tokenizer, token)
        if text is None:
            return ""
        self._undecoded.clear()
        if not may_stop:
            return text
        return self._looked_through(text)

    def _looked_through(self, text: str) -> str:
        found = self._finder.feed(text)
        if found is None:
            text = self._held + text
            certain = len(text) - self._finder.pending
            self._held = text[certain:]
            return text[:certain]
        self.stopped = True
        end = len(self._held) + found[0]
        text, self._held = (self._held + text)[: end if self._include else end - found[1]], ""
        return text

    def flush(self) -> str:
        """The rest, once the answer has ended otherwise: what was held back, and bytes of a character that never came whole."""
        if self.stopped:
            return ""
        rest = self._tokenizer.decode(self._undecoded, skip_special_tokens=self._skip) if self._undecoded else ""
        text, self._held, self._undecoded = self._held + rest, "", []
        return text


@dataclass(kw_only=True, slots=True)
class Piece:
    """What is new of one answer."""

    index: int = 0
    """Which of a request's `n` answers."""
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    """Text that is certain: stop strings are left out, characters are whole."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the prompt from its second token on, with the first piece."""
    finish_reason: FinishReason | None = None
    """None while more is to come."""
    error: str | None = None
    usage: Usage | None = None
    """With the last piece."""


@dataclass(kw_only=True, slots=True)
class Answer(Piece):
    """One whole answer: all its pieces."""

    others: "list[Answer]" = field(default_factory=list)
    """The request's further answers, where `n` asked for them."""

    def add(self, piece: Piece) -> None:
        """One more piece of this answer."""
        self.token_ids += piece.token_ids
        self.text += piece.text
        self.logprobs += piece.logprobs
        self.prompt_logprobs += piece.prompt_logprobs
        self.finish_reason, self.error, self.usage = piece.finish_reason, piece.error, piece.usage


Deliver = Callable[[Piece], object]


@dataclass(kw_only=True, slots=True, eq=False)
class Live:
    """One answer that is being made."""

    request: Request
    sampling: SamplingState
    deliver: Deliver
    text: TextStream | None
    streams: bool
    """Whether pieces are delivered as they come, or all together at the end."""
    new: Piece
    """What is not delivered yet; its text is in `shown`."""
    shown: list[str] = field(default_factory=list)

    def take(self, sampled: Sampled) -> tuple[FinishReason | None, str | None]:
        """The next token. Gives the reason why the answer ends with it, and the error where it ends in one."""
        if sampled.error is not None:
            return "error", sampled.error
        request, params, matcher = self.request, self.request.params, self.sampling.matcher
        request.tokens.append(sampled.token)
        self.new.token_ids.append(sampled.token)
        if sampled.logprob is not None:
            self.new.logprobs.append(sampled.logprob)
        ends = sampled.token in self.sampling.end_ids and request.num_outputs >= params.min_tokens
        hidden = ends and params.skip_special_tokens and not params.include_stop_str_in_output
        if self.text is not None and not hidden:
            self.shown.append(self.text.add(sampled.token, may_stop=request.num_outputs > params.min_tokens))
        if ends or (self.text is not None and self.text.stopped):
            return "stop", None
        if matcher is not None and matcher.is_error():
            return "error", f"structured output failed: {matcher_error(matcher)}"
        if matcher is not None and matcher.is_stopped():  # it matches, and nothing may follow
            return "stop", None
        return ("length" if request.num_outputs >= request.max_tokens else None), None

    def piece(self) -> Piece:
        """What was not delivered yet, which is then taken for delivered."""
        request, piece = self.request, self.new
        if request.is_finished:
            self.shown.append(self.text.flush() if self.text is not None else "")
            piece.usage = Usage(
                prompt_tokens=request.prompt_tokens, completion_tokens=request.num_outputs,
                cached_tokens=request.cached_tokens, seen_tokens=request.seen, kept_tokens=request.kept_tokens,
                kv_bytes=request.kv_bytes,
            )  # fmt: skip
        piece.text, piece.finish_reason, piece.error = "".join(self.shown), request.finish_reason, request.error
        self.new = Piece(index=piece.index)
        self.shown.clear()
        return piece


LOOKAHEAD = 1024
"""Lines that are read and submitted ahead of the first one that is not answered yet."""


def answer_file(
    engine: "Engine", source: str | Path, target: str | Path, *, defaults: Mapping[str, Any] | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:  # fmt: skip
    """Answer every line of `source`, a JSON object of OpenAI's field names, into `target`. `defaults` hold where a line says
    nothing; `report` is told the lines that are done, and all. Gives the numbers of lines answered now, of those among them
    that are errors, and of lines that were there already.
    """
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise UserError(f"input {source} must be a file of JSON lines, got none: give one that is there")
    with source.open("rb") as file:
        total = sum(1 for line in file if line.strip())
    there = _lines_done(source, target)
    counts = {"answered": 0, "errors": 0, "skipped": there}
    under_way: deque[tuple[int, bytes]] = deque()

    def asked() -> Iterator[Any]:
        for number, line in islice(_lines(source), there, None):
            under_way.append((number, line))
            yield _asked(line, defaults or {})

    with target.open("ab") as out:
        for answers in engine.in_order(asked(), LOOKAHEAD):
            record = _record(*under_way.popleft(), answers)
            out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            out.flush()
            counts["answered"] += 1
            counts["errors"] += any("error" in choice for choice in record["choices"])
            report(there + counts["answered"], total)
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


def _asked(line: bytes, defaults: Mapping[str, Any]) -> dict[str, Any] | UserError:
    """What one line asks of the engine, or why it can't be read."""
    try:
        asked = json.loads(line)
    except ValueError as error:
        return UserError(f"the line must be a JSON object, got none ({error})")
    asked = {**defaults, **(asked if isinstance(asked, Mapping) else {"prompt": asked})}
    return {name: value for name, value in asked.items() if name != "id"}


def _record(number: int, line: bytes, answers: list[Answer]) -> dict[str, Any]:
    """What stands in the output for one line."""
    record: dict[str, Any] = {"line": number, "asked": _fingerprint(line)}
    with suppress(ValueError, KeyError, TypeError):
        record["id"] = json.loads(line)["id"]
    record["choices"] = []
    for index, answer in enumerate(answers):
        choice = {"index": index} | {name: getattr(answer, name) for name in ("text", "token_ids", "finish_reason")}
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
