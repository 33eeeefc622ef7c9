"""The text of an answer, read as it comes: reasoning, content, and tool calls with their arguments piece by piece.

What may still turn out to be a marker or a call is held back. Formats read: `<think>...</think>`; `<tool_call>` around one
JSON object a call; and an answer that is nothing but JSON, one object or a list of them, with the name of an offered
function. Under a forced choice the grammar of `prompts.py` leaves only JSON.
"""

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from kvfold.serve.prompts import REASONING, ToolChoice

CALL = ("<tool_call>", "</tool_call>")
_ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Something new in an answer."""

    kind: str
    """`reasoning`, `content`, `call` (a new one, with its name) or `arguments` (more of the newest call's)."""
    text: str
    """What is new; a `call` has its function's name."""
    index: int = 0
    """Which call."""
    id: str | None = None
    """A new call's id."""


def held_back(text: str, marker: str) -> int:
    """Characters at the text's end that may be the beginning of `marker`."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0


class AnswerReader:
    """Reads one answer."""

    def __init__(self, *, choice: ToolChoice, reasons: bool = False, in_reasoning: bool = False):
        self._choice = choice
        self._text = ""
        self.num_calls = 0
        """Calls found so far."""
        self._calls: JsonCalls | None = None
        if choice.forced:
            self._step = self._forced
            self._calls = JsonCalls(choice.name)
        elif in_reasoning:
            self._step = self._in_reasoning
        elif reasons:
            self._step = self._before_reasoning
        else:
            self._step = self._begin_content

    def feed(self, text: str) -> list[Part]:
        """What is certain now that more text has come."""
        self._text += text
        return self._run(last=False)

    def finish(self) -> list[Part]:
        """The rest, at the end."""
        return self._run(last=True)

    def _run(self, *, last: bool) -> list[Part]:
        parts: list[Part] = []
        while True:
            step = self._step
            parts += [part for part in step(last) if part.text or part.kind == "call"]
            if self._step == step:
                return parts

    # -- reasoning -----------------------------------------------------------------------------------------------

    def _before_reasoning(self, last: bool) -> Iterator[Part]:
        begun = self._text.lstrip()
        if begun.startswith(REASONING[0]):
            self._text, self._step = begun.removeprefix(REASONING[0]), self._in_reasoning
        elif last or (begun and not REASONING[0].startswith(begun)):
            self._step = self._begin_content
        yield from ()

    def _in_reasoning(self, last: bool) -> Iterator[Part]:
        before, marker, after = self._text.partition(REASONING[1])
        if marker:
            self._text, self._step = after, self._after_reasoning
            yield Part(kind="reasoning", text=before)
            return
        certain = len(before) - (0 if last else held_back(before, REASONING[1]))
        self._text = before[certain:]
        yield Part(kind="reasoning", text=before[:certain])

    def _after_reasoning(self, last: bool) -> Iterator[Part]:
        self._text = self._text.lstrip("\n")
        if self._text or last:
            self._step = self._begin_content
        yield from ()

    # -- content -------------------------------------------------------------------------------------------------

    def _begin_content(self, last: bool) -> Iterator[Part]:
        """Before the content's first letter, which decides whether it may be nothing but a call."""
        begun = self._text.lstrip()
        if self._choice.tools and begun[:1] in ("{", "["):
            self._calls, self._step = JsonCalls(), self._bare
        elif begun or last:
            self._step = self._content
        elif not self._choice.tools:
            text, self._text = self._text, ""
            yield Part(kind="content", text=text)

    def _content(self, last: bool) -> Iterator[Part]:
        if not self._choice.tools:
            text, self._text = self._text, ""
            yield Part(kind="content", text=text)
            return
        before, marker, after = self._text.partition(CALL[0])
        if marker:
            self._text, self._calls, self._step = after, JsonCalls(), self._tagged
            yield Part(kind="content", text=before.rstrip())
            return
        certain = len(before)
        if not last:  # blank lines before a call are no content
            certain = len(before[: certain - held_back(before, CALL[0])].rstrip())
        text, self._text = before[:certain], before[certain:]
        if text.strip() or not self.num_calls:
            yield Part(kind="content", text=text)

    # -- calls ---------------------------------------------------------------------------------------------------

    def _tagged(self, last: bool) -> Iterator[Part]:
        """Between the tags of one call."""
        before, marker, after = self._text.partition(CALL[1])
        certain = len(before) if marker or last else len(before) - held_back(before, CALL[1])
        self._text = before[certain:]
        yield from self._numbered(self._calls.feed(before[:certain]))
        if marker:
            yield from self._unread(CALL[0] + self._calls.raw + CALL[1])
            self._text, self._step = after, self._content
        elif last:
            yield from self._unread(CALL[0] + self._calls.raw)
            self._text, self._step = "", self._over

    def _bare(self, last: bool) -> Iterator[Part]:
        """In an answer that may be nothing but JSON calls."""
        text, self._text = self._text, ""
        found = self._calls.feed(text)
        named = [part for part in found if part.kind == "call"]
        foreign = named and not self.num_calls and named[0].text not in self._choice.names
        if foreign or (not self._calls.num_calls and (self._calls.failed or last)):
            self._text, self._step = self._calls.raw, self._content
        else:
            yield from self._numbered(found)

    def _forced(self, last: bool) -> Iterator[Part]:
        text, self._text = self._text, ""
        yield from self._numbered(self._calls.feed(text))

    def _over(self, last: bool) -> Iterator[Part]:
        self._text = ""
        yield from ()

    def _unread(self, raw: str) -> Iterator[Part]:
        """A tagged text that was no call after all is content."""
        if not self._calls.num_calls:
            yield Part(kind="content", text=raw)

    def _numbered(self, parts: list[Part]) -> Iterator[Part]:
        for part in parts:
            if part.kind == "call":
                self.num_calls += 1
                yield Part(kind="call", text=part.text, index=self.num_calls - 1, id=f"call_{secrets.token_hex(12)}")
            else:
                yield Part(kind=part.kind, text=part.text, index=self.num_calls - 1)


class JsonCalls:
    """Finds `{"name": ..., "arguments": {...}}` in JSON that comes letter by letter, alone or in a list."""

    def __init__(self, name: str | None = None):
        """`name`: the text is that function's arguments and nothing else."""
        self.raw = ""
        """All that was read."""
        self.num_calls = 0
        self.failed = False
        """Whether what was read is no call."""
        self._name = name
        self._value = ""
        """The key or value that is being read."""
        self._key: str | None = None
        self._known = name
        """Name of the call that is being read, once it was told."""
        self._waiting = ""
        """Arguments that came before the name."""
        self._depth = 0
        """Objects and lists that are open around the next letter, in the call; 0 = between calls."""
        self._in_text = self._escaped = False
        self._expects_key = True

    def feed(self, text: str) -> list[Part]:
        """Calls and pieces of arguments in more text."""
        self.raw += text
        if self._name is not None:
            parts = [] if self.num_calls or not text.strip() else [Part(kind="call", text=self._name)]
            self.num_calls += len(parts)
            return [*parts, Part(kind="arguments", text=text)] if self.num_calls else []
        parts: list[Part] = []
        if not self.failed:
            for letter in text:
                self._read(letter, parts)
        return _joined(parts)

    def _read(self, letter: str, parts: list[Part]) -> None:
        if self._depth == 0:
            if letter == "{":
                self._depth, self._expects_key, self._key, self._known, self._value = 1, True, None, None, ""
            elif not letter.isspace() and letter not in "[],":
                self.failed = True
            return
        if self._in_text:
            self._more(letter, parts)
            if self._escaped:
                self._escaped = False
            elif letter == "\\":
                self._escaped = True
            elif letter == '"':
                self._in_text = False
            return
        if self._depth == 1 and letter in ":,}":
            if letter == ":":
                self._key, self._value, self._expects_key = self._plain(), "", False
            else:
                self._end_value(parts)
                self._depth -= letter == "}"
            return
        if letter == '"':
            self._in_text = True
        elif letter in "{[":
            self._depth += 1
        elif letter in "}]":
            self._depth -= 1
        self._more(letter, parts)

    def _more(self, letter: str, parts: list[Part]) -> None:
        """One more letter of the key or value that is being read."""
        if not self._value and letter.isspace():
            return
        self._value += letter
        if not self._expects_key and self._key in _ARGUMENTS and self._known and self._value[0] != '"':
            parts.append(Part(kind="arguments", text=letter))

    def _plain(self) -> object:
        try:
            return json.loads(self._value)
        except ValueError:
            return None

    def _end_value(self, parts: list[Part]) -> None:
        if self._key == "name" and self._known is None and isinstance(self._plain(), str):
            self._known = self._plain()
            self.num_calls += 1
            parts.append(Part(kind="call", text=self._known))
            if self._waiting:
                parts.append(Part(kind="arguments", text=self._waiting))
                self._waiting = ""
        elif self._key in _ARGUMENTS:
            # Some models write the arguments as a text that holds JSON.
            quoted = self._value.startswith('"')
            value = self._plain() if quoted else self._value
            if not self._known:
                self._waiting = value.strip() if isinstance(value, str) else self._value
            elif quoted and isinstance(value, str):
                parts.append(Part(kind="arguments", text=value))
        self._key, self._value, self._expects_key = None, "", True


def _joined(parts: list[Part]) -> list[Part]:
    """Neighbouring pieces of arguments in one."""
    found: list[Part] = []
    for part in parts:
        if found and part.kind == found[-1].kind == "arguments":
            found[-1] = Part(kind="arguments", text=found[-1].text + part.text)
        else:
            found.append(part)
    return found
