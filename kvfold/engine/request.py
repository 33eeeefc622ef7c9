"""A request's life inside the engine: its tokens, its sequence in the store, how far it was read, how it ended. No torch."""

import math
import os
from dataclasses import dataclass, field
from typing import Literal

from kvfold.engine.params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]
"""`stop`: an end token or a stop string; `length`: max_tokens or the context; `abort`: cancelled; `timeout`: its deadline."""


@dataclass(kw_only=True, slots=True, eq=False)
class Request:
    """One sequence that the engine runs. An `n` of 4 makes four of them."""

    id: str
    tokens: list[int]
    """Prompt, then answer."""
    prompt_tokens: int
    """Length of the prompt."""
    params: SamplingParams
    method: str
    """The method's text form, of those that the engine has loaded."""
    max_tokens: int
    """Tokens of the answer at most, once the context is taken into account."""
    seed: int = field(default_factory=lambda: int.from_bytes(os.urandom(8), "little"))
    priority: int = 0
    deadline: float = math.inf
    """On the engine's clock, in seconds."""
    arrival: float = 0.0
    """On the engine's clock."""
    reuse: bool = True
    """Whether it may begin from a stored prefix; not where the prompt's own log probabilities are wanted."""

    handle: int | None = None
    """Its sequence in the store; None while it waits."""
    seen: int = 0
    """Tokens that the store has seen of it."""
    read_until: int = 0
    """Tokens to be read as a prompt; what lies behind is fed one by one."""
    cached_tokens: int = 0
    """Tokens that a stored prefix saved it from reading."""
    rank: tuple = ()
    """Its place in the order, smaller first; set when it is admitted."""
    preemptions: int = 0
    predicted_bytes: int = 0
    """Estimated at admission for its prompt, to be compared with what it held."""
    kept_tokens: float = 0.0
    """Mean over KV heads of the entries held at its end."""
    kv_bytes: int = 0
    """Bytes held at its end."""
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def outputs(self) -> list[int]:
        """The answer so far."""
        return self.tokens[self.prompt_tokens :]

    @property
    def num_outputs(self) -> int:
        """Length of the answer so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def final_tokens(self) -> int:
        """Tokens that the store will have seen at the end, at most: the last token is not fed."""
        return self.prompt_tokens + self.max_tokens - 1

    @property
    def certain_tokens(self) -> int:
        """Tokens that the store will have seen at the end, at least."""
        params = self.params
        may_end = not params.ignore_eos or params.stop or params.stop_token_ids or params.structured
        return self.prompt_tokens + (params.min_tokens if may_end else self.max_tokens) - 1

    @property
    def is_reading(self) -> bool:
        """Whether a part of the prompt is still to be read."""
        return self.seen < self.read_until

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, however that was."""
        return self.finish_reason is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What an answer cost."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens that a stored prefix saved."""
    seen_tokens: int
    """Tokens that the cache has seen."""
    kept_tokens: float
    """Mean over KV heads of the entries that it still held at the end."""
    kv_bytes: int
    """Bytes that the cache held for it at the end."""
