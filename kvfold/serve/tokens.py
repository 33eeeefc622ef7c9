"""Texts to token ids and back, and log probabilities as OpenAI's two APIs write them.

Everything goes through the tokenizer's backend, whose calls keep no state: worker threads may share it.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from openai.types.chat import ChatCompletionTokenLogprob
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

from kvfold.engine.sampler import TokenLogprob
from kvfold.serve.errors import ApiError
from kvfold.serve.streaming import filled


class Tokens:
    """One tokenizer, as the server uses it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_model_len: int):
        self.tokenizer, self.max_model_len = tokenizer, max_model_len
        self._backend = tokenizer.backend_tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._longest = max((len(token) for token in self._backend.get_vocab()), default=1)
        self.vocab_size = self._backend.get_vocab_size()
        self.text_of = lru_cache(65_536)(self._text_of)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text. Raises `ApiError` at once for one that can't fit into the context, however it is cut."""
        if len(text) > self._longest * self.max_model_len:
            raise self.too_long(f"at least {len(text) // self._longest}")
        return self._backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens, special ones included."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def too_long(self, length: object) -> ApiError:
        """The error for a prompt of so many tokens, in the words by which clients know that they must shorten it."""
        return ApiError(
            400, f"This model's maximum context length is {self.max_model_len} tokens, and the prompt has {length}: shorten it",
            param="prompt", code="context_length_exceeded",
        )  # fmt: skip

    def _text_of(self, token: int) -> str:
        return self._backend.decode([token], skip_special_tokens=False)

    def bytes_of(self, token: int) -> list[int]:
        """The bytes that a token stands for: tokens can hold a part of a character."""
        text = self.text_of(token)
        if "\ufffd" in text:
            piece = self._backend.id_to_token(token) or ""
            if piece.startswith("<0x") and piece.endswith(">"):
                return [int(piece[3:-1], 16)]
            if all(letter in _BYTE_OF for letter in piece):
                return [_BYTE_OF[letter] for letter in piece]
        return list(text.encode())

    # -- log probabilities ---------------------------------------------------------------------------------------

    def chat_logprobs(self, found: Sequence[TokenLogprob], *, as_ids: bool = False) -> list[ChatCompletionTokenLogprob]:
        """As chat completions have them."""
        return [
            ChatCompletionTokenLogprob(
                token=self._name(one.token, as_ids), logprob=_finite(one.logprob), bytes=self.bytes_of(one.token),
                top_logprobs=[
                    TopLogprob(token=self._name(token, as_ids), logprob=_finite(value), bytes=self.bytes_of(token))
                    for token, value in one.top
                ],
            )
            for one in found
        ]  # fmt: skip

    def completion_logprobs(
        self, found: Sequence[TokenLogprob], offset: int, *, first: int | None = None, as_ids: bool = False
    ) -> Logprobs:
        """As completions have them. `offset`: characters before. `first`: a token before all, which has no probability."""
        tokens = [] if first is None else [first]
        tokens += [one.token for one in found]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(self.text_of(token))
        nothing = [] if first is None else [None]
        return filled(
            Logprobs,
            text_offset=offsets,
            token_logprobs=nothing + [_finite(one.logprob) for one in found],
            tokens=[self._name(token, as_ids) for token in tokens],
            top_logprobs=nothing + [self._top(one, as_ids) for one in found],
        )

    def _top(self, one: TokenLogprob, as_ids: bool) -> dict[str, float]:
        """By token, likeliest first; the chosen one is always among them."""
        top = {self._name(token, as_ids): _finite(value) for token, value in reversed(one.top)}
        top = dict(reversed(top.items()))  # of tokens that look alike the likelier one stays
        top.setdefault(self._name(one.token, as_ids), _finite(one.logprob))
        return top

    def prompt_logprobs(self, found: Sequence[TokenLogprob]) -> list[dict[str, Any] | None]:
        """As vLLM writes those of a prompt: by token id, nothing for the first."""
        rows: list[dict[str, Any] | None] = [None]
        for one in found:
            ranked = [(token, value, rank) for rank, (token, value) in enumerate(one.top, start=1)]
            if one.token not in {token for token, _ in one.top}:
                ranked.append((one.token, one.logprob, None))
            rows.append({
                str(token): {"logprob": _finite(value), "rank": rank, "decoded_token": self.text_of(token)}
                for token, value, rank in ranked
            })  # fmt: skip
        return rows

    def _name(self, token: int, as_ids: bool) -> str:
        return f"token_id:{token}" if as_ids else self.text_of(token)


def _finite(value: float) -> float:
    """JSON has no word for minus infinity."""
    return max(value, -9999.0)


def _byte_alphabet() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes: printable ones stand for themselves, others come from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
assert set(_BYTE_OF) == set(ByteLevel.alphabet())
