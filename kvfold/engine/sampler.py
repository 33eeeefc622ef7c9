"""The next token of every request of a step, in one batch: bans, biases, penalties, truncation, a draw, log probabilities;
and, by llguidance, which tokens may come next where an answer must match a JSON schema, a regex or a grammar.

A request's draw depends on its seed and the token's index alone: one uniform number, looked up in the cumulated
probabilities in the vocabulary's order. (In the order of probability, rounding would swap tokens that are nearly alike.)
Letters: B requests, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvfold.engine.request import Request
from kvfold.errors import UserError, one_line


class Grammars:
    """Compiles what requests ask for; the tokenizer's tables are made once, when they are first needed."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: list[int]):
        self._tokenizer, self._vocab_size, self._eos_ids = tokenizer, vocab_size, eos_ids
        self._tables: Any = None

    def compile(self, kind: str, text: str) -> Any:
        """llguidance's `LLMatcher` for `json`, `regex` or `grammar` (Lark): how far an answer has come. Raises `UserError` for
        what is malformed or can't be met.
        """
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError as error:
            raise UserError("structured output needs llguidance: pip install 'kvfold[serve]'") from error
        if self._tables is None:
            backend = self._tokenizer.backend_tokenizer.to_str()
            self._tables = LLTokenizer(backend, n_vocab=self._vocab_size, eos_token=self._eos_ids)
        makers: dict[str, Callable[[str], str]] = {
            "json": LLMatcher.grammar_from_json_schema,
            "regex": LLMatcher.grammar_from_regex,
            "grammar": LLMatcher.grammar_from_lark,
        }
        try:
            matcher = LLMatcher(self._tables, makers[kind](text), log_level=0)
            wrong = matcher_error(matcher)
        except ValueError as error:
            wrong = one_line(error)
        if wrong:
            raise UserError(f"{kind} can't be used for structured output: {wrong}")
        return matcher


def matcher_error(matcher: Any) -> str:
    """What went wrong with an answer that must match, in one line; empty where nothing did."""
    return " ".join(matcher.get_error().split()) if matcher.is_error() else ""


def matcher_allows(matcher: Any, vocab_size: int, device: torch.device | str = "cpu") -> Tensor:
    """Tokens that may come next, bool [V]."""
    packed = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1  # the lowest bit is the first token
    return bits.flatten()[:vocab_size].bool().to(device)


BANNED = -torch.inf


@dataclass(kw_only=True, slots=True, eq=False)
class SamplingState:
    """What the sampler remembers of one request."""

    request: Request
    eos_ids: tuple[int, ...] = ()
    """The model's end tokens."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Runs of tokens that the answer must not contain."""
    matcher: Any = None
    """llguidance's, where the answer must match something."""
    counts_V: Tensor | None = None
    """Times that each token was generated, int32; None where no penalty asks."""
    prompt_V: Tensor | None = None
    """Tokens of the prompt, bool."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end this answer."""
        params = self.request.params
        return params.stop_token_ids + (() if params.ignore_eos else self.eos_ids)

    @property
    def counts(self) -> bool:
        """Whether a penalty depends on what was said before."""
        params = self.request.params
        return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)

    def remember(self, vocab_size: int, device: torch.device) -> None:
        """Make the counts, from the tokens as they stand."""
        prompt, answer = (
            torch.tensor(ids, dtype=torch.int64, device=device)
            for ids in (self.request.tokens[: self.request.prompt_tokens], self.request.outputs)
        )
        self.counts_V = torch.bincount(answer, minlength=vocab_size).int()
        self.prompt_V = torch.zeros(vocab_size, dtype=torch.bool, device=device).index_fill_(0, prompt, True)

    def accept(self, token: int) -> None:
        """The token was chosen."""
        if self.counts_V is not None:
            self.counts_V[token] += 1
        if self.matcher is not None:
            self.matcher.consume_token(token)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """What was chosen for one request."""

    token: int
    logprob: "TokenLogprob | None" = None
    error: str | None = None
    """Why nothing could be chosen; None where something was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """Natural logarithms of the model's own probabilities, before anything was changed."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens, likeliest first."""


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1), the same on every machine."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


@torch.inference_mode()
def sample(logits_BV: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
    """The next token of each request; the states are told. `logits_BV` as the model gave them."""
    raw_BV = logits_BV.float()
    scores_BV = adjusted(raw_BV, states)
    best_B, token_B = scores_BV.max(dim=-1)
    drawn = [row for row, state in enumerate(states) if state.request.params.temperature > 0]
    if drawn:
        chosen = scores_BV if len(drawn) == len(states) else scores_BV[drawn]
        token_B = token_B.clone()
        token_B[drawn] = draw(chosen, [states[row].request for row in drawn])
    logprobs = _logprobs_of_rows(raw_BV, token_B, states)
    found = []
    for state, token, best, logprob in zip(states, token_B.tolist(), best_B.tolist(), logprobs, strict=True):
        error = None
        if best != best:
            error = "the model's logits are not numbers (NaN)"
        elif best == BANNED:
            error = "no token is left: what the request allows, bans and must match can't be met together"
        else:
            state.accept(token)
        found.append(Sampled(token=token, logprob=logprob, error=error))
    return found


def adjusted(raw_BV: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Logits with biases and penalties, -inf at what is banned; a copy, or `raw_BV` itself where nothing changes."""
    rows, tokens, biases, bans = [], [], [], []
    for row, state in enumerate(states):
        for token, bias in state.request.params.logit_bias:
            rows.append(row)
            tokens.append(token)
            biases.append(bias)
        bans += [(row, token) for token in _banned(state)]
    masked = [row for row, state in enumerate(states) if state.matcher or state.request.params.allowed_token_ids]
    counted = [row for row, state in enumerate(states) if state.counts]
    if not (rows or bans or masked or counted):
        return raw_BV
    scores_BV, device = raw_BV.clone(), raw_BV.device
    if rows:
        scores_BV.index_put_((_ids(rows, device), _ids(tokens, device)), scores_BV.new_tensor(biases), accumulate=True)
    if counted:
        scores_BV[counted] = _penalised(scores_BV[counted], [states[row] for row in counted])
    for row in masked:
        scores_BV[row].masked_fill_(~_allowed(states[row], raw_BV[row]), BANNED)
    if bans:
        banned_rows, banned = zip(*bans, strict=True)
        scores_BV[_ids(banned_rows, device), _ids(banned, device)] = BANNED
    return scores_BV


def _ids(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def _banned(state: SamplingState) -> list[int]:
    """Tokens that may not come next: ends that would come too early, and last tokens of bad words."""
    request = state.request
    banned = (
        list(state.eos_ids + request.params.stop_token_ids) if request.num_outputs < request.params.min_tokens else []
    )
    for word in state.bad_words:
        begun = word[:-1]
        if len(begun) <= request.num_outputs and tuple(request.tokens[len(request.tokens) - len(begun) :]) == begun:
            banned.append(word[-1])
    return banned


def _allowed(state: SamplingState, like_V: Tensor) -> Tensor:
    """bool [V], of `allowed_token_ids` and structured output."""
    allowed = torch.ones_like(like_V, dtype=torch.bool)
    listed = state.request.params.allowed_token_ids
    if listed is not None:
        allowed = torch.zeros_like(allowed).index_fill_(0, _ids(listed, like_V.device), True)
    if state.matcher is not None:
        allowed &= matcher_allows(state.matcher, len(like_V), like_V.device)
    return allowed


def _penalised(scores_BV: Tensor, states: Sequence[SamplingState]) -> Tensor:
    for state in states:
        if state.counts_V is None:
            state.remember(scores_BV.shape[1], scores_BV.device)
    counts_BV = torch.stack([state.counts_V for state in states])
    said_BV = torch.stack([state.prompt_V for state in states]) | (counts_BV > 0)
    repetition, presence, frequency = (
        scores_BV.new_tensor([getattr(state.request.params, name) for state in states])[:, None]
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
    )
    repeated = torch.where(scores_BV > 0, scores_BV / repetition, scores_BV * repetition)
    scores_BV = torch.where(said_BV, repeated, scores_BV)
    return scores_BV - frequency * counts_BV - presence * (counts_BV > 0)


def draw(scores_BV: Tensor, requests: Sequence[Request]) -> Tensor:
    """One token each, int64 [B], under temperature, top-k, top-p and min-p, in this order."""
    params = [request.params for request in requests]
    heat = scores_BV.new_tensor([one.temperature for one in params])[:, None]
    scores_BV = truncated(
        scores_BV / heat, [one.top_k for one in params], [one.top_p for one in params], [one.min_p for one in params]
    )
    # In double precision, so that a sum over the vocabulary rounds less than the logits do.
    sums_BV = torch.softmax(scores_BV.double(), dim=-1).cumsum(dim=-1)
    point_B = sums_BV.new_tensor([uniform(request.seed, request.num_outputs) for request in requests])
    point_B1 = (point_B * sums_BV[:, -1])[:, None]
    return torch.searchsorted(sums_BV, point_B1, right=True)[:, 0].clamp_(max=scores_BV.shape[1] - 1)


def truncated(scores_BV: Tensor, top_k: Sequence[int], top_p: Sequence[float], min_p: Sequence[float]) -> Tensor:
    """-inf at tokens that the three cut off; of tokens alike at top-k's border all stay."""
    rows = [row for row, k in enumerate(top_k) if 0 < k < scores_BV.shape[1]]
    if rows:
        ks = [top_k[row] for row in rows]
        top = scores_BV[rows].topk(max(ks), dim=-1).values
        least = top.gather(1, _ids(ks, scores_BV.device)[:, None] - 1)
        scores_BV = scores_BV.clone()
        scores_BV[rows] = scores_BV[rows].masked_fill(scores_BV[rows] < least, BANNED)
    rows = [row for row, p in enumerate(top_p) if p < 1]
    if rows:
        ordered, order = scores_BV[rows].sort(dim=-1, descending=True, stable=True)
        chance = torch.softmax(ordered.double(), dim=-1)
        before = chance.cumsum(dim=-1) - chance
        gone = before >= before.new_tensor([top_p[row] for row in rows])[:, None]
        scores_BV = scores_BV.clone()
        kept = ordered.masked_fill(gone, BANNED)
        scores_BV[rows] = torch.empty_like(kept).scatter_(1, order, kept)
    rows = [row for row, p in enumerate(min_p) if p > 0]
    if rows:
        part = scores_BV[rows]
        share = part.new_tensor([min_p[row] for row in rows])[:, None]
        scores_BV = scores_BV.clone()
        scores_BV[rows] = part.masked_fill(part < part.amax(dim=-1, keepdim=True) + share.log(), BANNED)
    return scores_BV


def token_logprobs(logits_TV: Tensor, tokens: Sequence[int], most: int) -> list[TokenLogprob]:
    """Of one chosen token per row, with the `most` likeliest ones."""
    log_TV = torch.log_softmax(logits_TV.float(), dim=-1)
    chosen = log_TV.gather(1, _ids(tokens, log_TV.device)[:, None])[:, 0].tolist()
    top = log_TV.topk(min(most, log_TV.shape[1]), dim=-1)
    return [
        TokenLogprob(token=token, logprob=logprob, top=tuple(zip(ids, values, strict=True)))
        for token, logprob, ids, values in zip(tokens, chosen, top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def _logprobs_of_rows(raw_BV: Tensor, token_B: Tensor, states: Sequence[SamplingState]) -> list[TokenLogprob | None]:
    found: list[TokenLogprob | None] = [None] * len(states)
    rows = [row for row, state in enumerate(states) if state.request.params.logprobs is not None]
    if rows:
        wanted = [states[row].request.params.logprobs for row in rows]
        for row, number, one in zip(
            rows, wanted, token_logprobs(raw_BV[rows], token_B[rows].tolist(), max(wanted)), strict=True
        ):
            found[row] = TokenLogprob(token=one.token, logprob=one.logprob, top=one.top[:number])
    return found
