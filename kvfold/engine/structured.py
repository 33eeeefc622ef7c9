"""Answers that must match a JSON schema, a regex or a grammar: which tokens may come next, by llguidance."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvfold.errors import UserError, one_line


class Grammars:
    """Compiles what requests ask for; the tokenizer's tables are made once, when they are first needed."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: list[int]):
        self._tokenizer, self._vocab_size, self._eos_ids = tokenizer, vocab_size, eos_ids
        self._tables: Any = None

    def compile(self, kind: str, text: str) -> "Matcher":
        """A matcher for `json`, `regex` or `grammar` (Lark). Raises `UserError` for what is malformed or can't be met."""
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError as error:
            raise UserError("structured output needs llguidance: pip install 'kvfold[serve]'") from error
        if self._tables is None:
            backend = self._tokenizer.backend_tokenizer.to_str()
            self._tables = LLTokenizer(backend, n_vocab=self._vocab_size, eos_token=self._eos_ids)
        make = {
            "json": LLMatcher.grammar_from_json_schema,
            "regex": LLMatcher.grammar_from_regex,
            "grammar": LLMatcher.grammar_from_lark,
        }[kind]
        try:
            found = Matcher(LLMatcher(self._tables, make(text), log_level=0), self._vocab_size)
        except ValueError as error:
            raise UserError(f"{kind} can't be used for structured output: {one_line(error)}") from error
        if found.error:
            raise UserError(f"{kind} can't be used for structured output: {found.error}")
        return found


class Matcher:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int):
        self._matcher, self._vocab_size = matcher, vocab_size

    @property
    def error(self) -> str:
        """What went wrong, in one line; empty where nothing did."""
        return " ".join(self._matcher.get_error().split()) if self._matcher.is_error() else ""

    @property
    def is_complete(self) -> bool:
        """Whether the answer matches and nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self, device: torch.device | str = "cpu") -> Tensor:
        """Tokens that may come next, bool [V]."""
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1  # the lowest bit is the first token
        return bits.flatten()[: self._vocab_size].bool().to(device)

    def accept(self, token: int) -> None:
        """The answer goes on with this token."""
        self._matcher.consume_token(token)

    def copy(self) -> "Matcher":
        """Another answer to the same request, as far as this one."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size)
