"""The text of an answer, read as it comes: reasoning, content, and tool calls with their arguments piece by piece.

What may still turn out to be a marker or a call is held back. Formats read: `<think>...</think>`; `<tool_call>` around one
JSON object a call; and an answer that is nothing but JSON, one object or a list of them, with the name of an offered
function. Under a forced choice the grammar of `prompts.py` leaves only JSON.
"""

import json
import secrets
from dataclasses import dataclass
from typing import Any

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


def _held_back(text: str, marker: str) -> int:
    """Characters at the text's end that may be the beginning of `marker`."""
    lengths = range(min(len(text), len(marker) - 1), 0, -1)
    return next((length for length in lengths if marker.startswith(text[-length:])), 0)


class AnswerReader:
    """Reads one answer, in steps: each gives what is new, and says by `self._step` what is to be read next."""

    def __init__(self, *, choice: ToolChoice, reasons: bool = False, in_reasoning: bool = False):
        self._choice = choice
        self._text = ""
        self.num_calls = 0
        """Calls found so far."""
        self._calls = JsonCalls(choice.name)
        if choice.forced:
            self._step = self._forced
        elif in_reasoning:
            self._step = self._in_reasoning
        else:
            self._step = self._before_reasoning if reasons else self._begin_content

    def feed(self, text: str, *, last: bool = False) -> list[Part]:
        """What is certain now that more text has come."""
        self._text += text
        parts: list[Part] = []
        while True:
            step = self._step
            parts += [part for part in step(last) if part.text or part.kind == "call"]
            if self._step == step:
                return parts

    def finish(self) -> list[Part]:
        """The rest, at the end."""
        return self.feed("", last=True)

    def _all(self) -> list[Part]:
        """All text as content."""
        text, self._text = self._text, ""
        return [Part(kind="content", text=text)]

    def _before_reasoning(self, last: bool) -> list[Part]:
        begun = self._text.lstrip()
        if begun.startswith(REASONING[0]):
            self._text, self._step = begun.removeprefix(REASONING[0]), self._in_reasoning
        elif last or (begun and not REASONING[0].startswith(begun)):
            self._step = self._begin_content
        return []

    def _in_reasoning(self, last: bool) -> list[Part]:
        before, marker, after = self._text.partition(REASONING[1])
        if marker:
            self._text, self._step = after, self._after_reasoning
            return [Part(kind="reasoning", text=before)]
        certain = len(before) - (0 if last else _held_back(before, REASONING[1]))
        self._text = before[certain:]
        return [Part(kind="reasoning", text=before[:certain])]

    def _after_reasoning(self, last: bool) -> list[Part]:
        self._text = self._text.lstrip("\n")
        if self._text or last:
            self._step = self._begin_content
        return []

    def _begin_content(self, last: bool) -> list[Part]:
        """Before the content's first letter, which decides whether it may be nothing but a call."""
        begun = self._text.lstrip()
        if self._choice.tools and begun[:1] in ("{", "["):
            self._calls, self._step = JsonCalls(), self._bare
        elif begun or last:
            self._step = self._content
        elif not self._choice.tools:
            return self._all()
        return []

    def _content(self, last: bool) -> list[Part]:
        if not self._choice.tools:
            return self._all()
        before, marker, after = self._text.partition(CALL[0])
        if marker:
            self._text, self._calls, self._step = after, JsonCalls(), self._tagged
            return [Part(kind="content", text=before.rstrip())]
        certain = len(before)
        if not last:  # blank lines before a call are no content
            certain = len(before[: certain - _held_back(before, CALL[0])].rstrip())
        text, self._text = before[:certain], before[certain:]
        return [Part(kind="content", text=text)] if text.strip() or not self.num_calls else []

    def _tagged(self, last: bool) -> list[Part]:
        """Between the tags of one call."""
        before, marker, after = self._text.partition(CALL[1])
        certain = len(before) if marker or last else len(before) - _held_back(before, CALL[1])
        self._text = before[certain:]
        parts = self._numbered(self._calls.feed(before[:certain]))
        if not (marker or last):
            return parts
        self._text, self._step = after, self._content if marker else self._over
        if not self._calls.num_calls:  # a tagged text that was no call after all is content
            parts.append(Part(kind="content", text=CALL[0] + self._calls.raw + marker))
        return parts

    def _bare(self, last: bool) -> list[Part]:
        """In an answer that may be nothing but JSON calls."""
        text, self._text = self._text, ""
        new = self._calls.feed(text)
        name = next((text for kind, text in new if kind == "call"), None)
        foreign = name is not None and not self.num_calls and name not in self._choice.names
        if foreign or (not self._calls.num_calls and (self._calls.failed or last)):
            self._text, self._step = self._calls.raw, self._content
            return []
        return self._numbered(new)

    def _forced(self, last: bool) -> list[Part]:
        text, self._text = self._text, ""
        return self._numbered(self._calls.feed(text))

    def _over(self, last: bool) -> list[Part]:
        self._text = ""
        return []

    def _numbered(self, new: list[list[str]]) -> list[Part]:
        parts = []
        for kind, text in new:
            self.num_calls += kind == "call"
            made = f"call_{secrets.token_hex(12)}" if kind == "call" else None
            parts.append(Part(kind=kind, text=text, index=self.num_calls - 1, id=made))
        return parts


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
        self._new: list[list[str]] = []
        self._key: str | None = None
        """Of the value that is being read; None = the key itself is."""
        self._value = ""
        """The key or value, as far as it was read."""
        self._known: str | None = None
        """Name of the call that is being read, once it was told."""
        self._waiting = ""
        """Arguments that came before the name."""
        self._depth = 0
        """Objects and lists that are open around the next letter, in the call; 0 = between calls."""
        self._in_text = self._escaped = False

    def feed(self, text: str) -> list[list[str]]:
        """Calls and pieces of arguments in more text, each `["call", name]` or `["arguments", text]`."""
        self.raw += text
        self._new = []
        if self._name is None:
            for letter in "" if self.failed else text:
                self._read(letter)
        else:
            if not self.num_calls and text.strip():
                self._call(self._name)
            if self.num_calls:
                self._arguments(text)
        return self._new

    def _call(self, name: str) -> None:
        self.num_calls += 1
        self._new.append(["call", name])

    def _arguments(self, text: str) -> None:
        if self._new and self._new[-1][0] == "arguments":
            self._new[-1][1] += text
        else:
            self._new.append(["arguments", text])

    def _read(self, letter: str) -> None:
        if self._depth == 0:
            if letter == "{":
                self._depth, self._key, self._known, self._value = 1, None, None, ""
            elif not letter.isspace() and letter not in "[],":
                self.failed = True
            return
        if self._in_text:
            self._in_text = self._escaped or letter != '"'
            self._escaped = letter == "\\" and not self._escaped
        elif self._depth == 1 and letter in ":,}":
            if letter == ":":
                self._key, self._value = self._plain(), ""
            else:
                self._end_value()
                self._depth -= letter == "}"
            return
        else:
            self._in_text = letter == '"'
            self._depth += (letter in "{[") - (letter in "}]")
        if self._value or not letter.isspace():
            self._value += letter
            if self._known and self._key in _ARGUMENTS and self._value[0] != '"':
                self._arguments(letter)

    def _plain(self) -> Any:
        try:
            return json.loads(self._value)
        except (ValueError, RecursionError):
            return None

    def _end_value(self) -> None:
        value = self._plain()
        if self._key == "name" and self._known is None and isinstance(value, str):
            self._known = value
            self._call(value)
            if self._waiting:
                self._arguments(self._waiting)
                self._waiting = ""
        elif self._key in _ARGUMENTS:
            # Some models write the arguments as a text that holds JSON.
            quoted = isinstance(value, str)
            if not self._known:
                self._waiting = value.strip() if quoted else self._value.strip()
            elif quoted:
                self._arguments(value)
        self._key, self._value = None, ""
