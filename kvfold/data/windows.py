"""Windows of text on which methods are compared: the documents of a file joined and tokenised once, cut, and thinned out.
And the beginning of a text, each token with the characters that it stands for.

Letters: W windows, T tokens of a window.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvfold.data.texts import TextFile
from kvfold.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class TextWindows:
    """Windows of one file, all of one length."""

    name: str
    """The file's name."""
    digest: str
    """SHA-256 of the file's bytes."""
    ids_WT: Tensor
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


def text_beginning(text: TextFile, tokenizer: Any, *, tokens: int) -> tuple[Tensor, list[str]]:
    """Ids [T] of the first `tokens` tokens, fewer where the text has fewer, and the characters of each: joined they are the
    text. Of several tokens that share a character the first has it; a bos that the tokenizer adds has none.
    """
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
