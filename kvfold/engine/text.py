"""From tokens to text as they come: incremental detokenisation, and stop strings that are never shown by mistake."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

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
