"""What a caller gets: pieces of an answer as they come, or the whole; and an answer while it is being made."""

from collections.abc import Callable
from dataclasses import dataclass, field

from kvfold.engine.request import FinishReason, Request, Usage
from kvfold.engine.sampler import Sampled, SamplingState, TokenLogprob
from kvfold.engine.text import TextStream


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What is new of one answer."""

    index: int = 0
    """Which of a request's `n` answers."""
    token_ids: tuple[int, ...] = ()
    text: str = ""
    """Text that is certain: stop strings are left out, characters are whole."""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt from its second token on, with the first piece."""
    finish_reason: FinishReason | None = None
    """None while more is to come."""
    error: str | None = None
    usage: Usage | None = None
    """With the last piece."""


@dataclass(kw_only=True, slots=True)
class Answer:
    """One whole answer."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    usage: Usage | None = None
    others: "list[Answer]" = field(default_factory=list)
    """The request's further answers, where `n` asked for them."""

    def add(self, piece: Piece) -> None:
        """One more piece of this answer."""
        self.token_ids += piece.token_ids
        self.text += piece.text
        self.logprobs += piece.logprobs
        self.prompt_logprobs += piece.prompt_logprobs
        self.finish_reason, self.error, self.usage = piece.finish_reason, piece.error, piece.usage


Deliver = Callable[[Piece], None]


@dataclass(kw_only=True, slots=True, eq=False)
class Live:
    """One answer that is being made."""

    request: Request
    sampling: SamplingState
    deliver: Deliver
    index: int
    text: TextStream | None
    streams: bool
    """Whether pieces are delivered as they come, or all together at the end."""
    token_ids: list[int] = field(default_factory=list)
    """This and the rest: what is not delivered yet."""
    shown: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    def take(self, sampled: Sampled) -> tuple[FinishReason | None, str | None]:
        """The next token. Gives the reason why the answer ends with it, and the error where it ends in one."""
        if sampled.error is not None:
            return "error", sampled.error
        request, params, matcher = self.request, self.request.params, self.sampling.matcher
        request.tokens.append(sampled.token)
        self.token_ids.append(sampled.token)
        if sampled.logprob is not None:
            self.logprobs.append(sampled.logprob)
        ends = sampled.token in self.sampling.end_ids and request.num_outputs >= params.min_tokens
        hidden = ends and params.skip_special_tokens and not params.include_stop_str_in_output
        if self.text is not None and not hidden:
            self.shown.append(self.text.add(sampled.token, may_stop=request.num_outputs > params.min_tokens))
        if ends or (self.text is not None and self.text.stopped):
            return "stop", None
        if matcher is not None and matcher.error:
            return "error", f"structured output failed: {matcher.error}"
        if matcher is not None and matcher.is_complete:
            return "stop", None
        return ("length" if request.num_outputs >= request.max_tokens else None), None

    def piece(self) -> Piece:
        """What was not delivered yet, which is then taken for delivered."""
        request, usage = self.request, None
        if request.is_finished:
            self.shown.append(self.text.flush() if self.text is not None else "")
            usage = Usage(
                prompt_tokens=request.prompt_tokens, completion_tokens=request.num_outputs,
                cached_tokens=request.cached_tokens, seen_tokens=request.seen, kept_tokens=request.kept_tokens,
                kv_bytes=request.kv_bytes,
            )  # fmt: skip
        piece = Piece(
            index=self.index, token_ids=tuple(self.token_ids), text="".join(self.shown), logprobs=tuple(self.logprobs),
            prompt_logprobs=tuple(self.prompt_logprobs), finish_reason=request.finish_reason, error=request.error,
            usage=usage,
        )  # fmt: skip
        for new in (self.token_ids, self.shown, self.logprobs, self.prompt_logprobs):
            new.clear()
        return piece
