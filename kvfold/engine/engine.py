"""The engine: one thread that steps, an inbox of requests, an outbox for each.

`generate` answers a list, `stream` one request as it comes, `submit` is what both are made of. A request's mistakes are
its own: a schema that can't be met, a prompt too long or a call that fails end that request with one line, and the others
go on. What runs when is the scheduler's business, what a token is the sampler's.
"""

import asyncio
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvfold.cache.pages import CacheFull
from kvfold.engine.budget import Budget, KeptRatios
from kvfold.engine.request import FinishReason, Question, Request, Usage, parse_question
from kvfold.engine.runner import Runner
from kvfold.engine.sampler import SamplingState, TokenLogprob, sample, token_logprobs
from kvfold.engine.scheduler import PREFILL_TOKENS, Scheduler
from kvfold.engine.structured import Grammars
from kvfold.engine.text import TextStream
from kvfold.models.decoder import FoldForCausalLM
from kvfold.sizes import parse_size


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
class _Live:
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


class Engine:
    """Answers many requests at once from one compressed cache."""

    def __init__(
        self, model: FoldForCausalLM, tokenizer: PreTrainedTokenizerBase | None = None, kv_memory: str | int = "2GB",
        methods: Sequence[str] | None = None, *, max_running: int = 256, prefill_tokens: int = PREFILL_TOKENS,
        page_slots: int = 16, estimate_scale: float = 1.0, poison: bool = False,
    ):  # fmt: skip
        """`kv_memory`: never exceeded, and taken at once. `methods`: text forms that requests may name; the first is the
        default; None = the model's own. `estimate_scale` and `poison` are for tests.
        """
        self.model, self.tokenizer = model.eval(), tokenizer
        own = model.config.layout
        layouts = [own] if methods is None else [own.with_time(text) for text in methods]
        self._layouts = {layout.time_text(): layout for layout in layouts}
        self._default = layouts[0].time_text()
        self._context = getattr(model.config, "max_position_embeddings", None) or math.inf
        memory_bytes = parse_size(kv_memory) if isinstance(kv_memory, str) else kv_memory
        if memory_bytes < 1:
            raise ValueError(f"kv_memory must be at least 1 byte, got {memory_bytes} (for example '2GB')")
        ratios = getattr(model.config, "kept_ratios", None)
        self._runner = Runner(
            model, self._layouts, memory_bytes, max_sequences=2 * max_running, page_slots=page_slots, poison=poison,
            ratios={own.time_text(): KeptRatios.from_json(ratios)} if ratios else None,
        )  # fmt: skip
        self._budget = Budget(
            self._runner.costs, self._runner.pool_bytes, prefill_tokens=prefill_tokens, scale=estimate_scale
        )
        self._scheduler = Scheduler(
            self._budget, self._runner, max_running=min(max_running, self._runner.max_sequences),
            prefill_tokens=prefill_tokens,
        )  # fmt: skip
        self._vocab_size, self._eos_ids = model.config.vocab_size, _end_tokens(model, tokenizer)
        self._grammars = None if tokenizer is None else Grammars(tokenizer, self._vocab_size, list(self._eos_ids))
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._live: dict[Request, _Live] = {}
        self._submitted = 0
        self._counts = {"prompt_tokens": 0, "completion_tokens": 0, "finished": 0, "steps": 0}
        self._broken: str | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    # -- asking --------------------------------------------------------------------------------------------------

    def generate(self, asked: Iterable[str | Sequence[int] | Mapping[str, Any]]) -> list[Answer]:
        """Answers in the order of the requests. What is wrong with one of them stands in its answer's `error`."""
        outbox: queue.SimpleQueue[tuple[int, Piece]] = queue.SimpleQueue()
        answers: list[list[Answer]] = []
        jobs: list[_Live] = []
        left = 0
        try:
            for number, one in enumerate(asked):
                try:
                    lives = self._prepare(one, lambda piece, number=number: outbox.put((number, piece)), streams=False)
                except ValueError as error:
                    answers.append([Answer(finish_reason="error", error=str(error))])
                    continue
                answers.append([Answer() for _ in lives])
                jobs += lives
            left = len(jobs)
            self._send(jobs)  # all at once, so that the first one's reading knows where others part from it
            while left:
                number, piece = outbox.get()
                answers[number][piece.index].add(piece)
                left -= piece.finish_reason is not None
        finally:
            if left:
                self.cancel([live.request for live in jobs])
        for group in answers:
            group[0].others = group[1:]
        return [group[0] for group in answers]

    async def stream(self, asked: str | Sequence[int] | Mapping[str, Any]) -> AsyncIterator[Piece]:
        """One request's pieces as they come; left early, the request is cancelled. Raises `ValueError` for a bad request."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue()
        job = self.submit(asked, lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece))
        left = len(job)
        try:
            while left:
                piece = await pieces.get()
                left -= piece.finish_reason is not None
                yield piece
        finally:
            if left:
                self.cancel(job)

    def submit(
        self, asked: str | Sequence[int] | Mapping[str, Any], deliver: Deliver, *, streams: bool = True
    ) -> list[Request]:
        """Start a request; `deliver` gets its pieces on the engine's thread, or one whole piece if it does not stream. Gives
        what `cancel` takes, one for each of the `n` answers. Raises `ValueError`, in one line, for a request that can't be run.
        """
        lives = self._prepare(asked, deliver, streams=streams)
        self._send(lives)
        return [live.request for live in lives]

    def _prepare(
        self, asked: str | Sequence[int] | Mapping[str, Any], deliver: Deliver, *, streams: bool
    ) -> list[_Live]:
        question = parse_question(asked)
        ids, method = self._ids(question), self._method(question.time)
        lives = [self._new(question, ids, method, index, deliver, streams) for index in range(question.params.n)]
        refusal = self._budget.refusal(lives[0].request)
        if refusal is not None:
            raise ValueError(refusal)
        return lives

    def _send(self, lives: list[_Live]) -> None:
        self._start()
        self._inbox.put(lambda: [self._enter(live) for live in lives])

    def cancel(self, job: Sequence[Request]) -> None:
        """End a request; its pages are free before the next step. What has ended already is left alone."""
        self._inbox.put(lambda: [self._end(one, "abort") for one in job if one in self._live])

    def _ids(self, question: Question) -> list[int]:
        prompt, tokenizer = question.prompt, self.tokenizer
        if tokenizer is None and (question.messages or isinstance(prompt, str)):
            raise ValueError("a text needs a tokenizer, and the engine has none: give token ids")
        if question.messages:
            try:
                ids = tokenizer.apply_chat_template(
                    list(question.messages), add_generation_prompt=True, tokenize=True, return_dict=True
                )["input_ids"]
            except Exception as error:  # a template is a program of the checkpoint's: it may raise anything
                raise ValueError(f"messages don't fit the chat template: {' '.join(str(error).split())}") from error
        else:
            ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise ValueError("prompt must have 1 token or more, got none")
        if max(ids) >= self._vocab_size:
            raise ValueError(f"prompt must hold token ids below {self._vocab_size}, got {max(ids)}")
        if len(ids) >= self._context:
            raise ValueError(
                f"prompt must be shorter than the model's context of {self._context} tokens, got {len(ids)}"
            )
        return ids

    def _method(self, time_text: str | None) -> str:
        if time_text is None:
            return self._default
        name = self.model.config.layout.with_time(time_text).time_text()
        if name not in self._layouts:
            raise ValueError(f"time must be one of the methods loaded, {', '.join(self._layouts)}, got '{time_text}'")
        return name

    def _new(
        self, question: Question, ids: list[int], method: str, index: int, deliver: Deliver, streams: bool
    ) -> _Live:
        params, room = question.params, self._context - len(ids)
        now = time.monotonic()
        self._submitted += 1
        request = Request(
            id=f"{self._submitted:09d}", tokens=list(ids), prompt_tokens=len(ids), params=params, method=method,
            max_tokens=int(min(room, 2**31 if params.max_tokens is None else params.max_tokens)),
            priority=question.priority, arrival=now, reuse=params.prompt_logprobs is None,
            deadline=math.inf if question.timeout is None else now + question.timeout,
        )  # fmt: skip
        if params.seed is not None:
            request.seed = params.seed + index
        if params.max_tokens is None:
            request.max_tokens = max(1, self._budget.most_tokens(request))
        needs = params.stop or params.structured or any(isinstance(word, str) for word in params.bad_words)
        if self.tokenizer is None and needs:
            raise ValueError(
                "stop, bad_words and structured output need a tokenizer, and the engine has none: leave them out"
            )
        named = [token for token, _ in params.logit_bias] + list(
            params.stop_token_ids + (params.allowed_token_ids or ())
        )
        if named and max(named) >= self._vocab_size:
            raise ValueError(f"token ids must be below {self._vocab_size}, got {max(named)}")
        text = None
        if self.tokenizer is not None:
            text = TextStream(
                self.tokenizer, ids, stop=params.stop, include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
            )  # fmt: skip
        sampling = SamplingState(request=request, eos_ids=self._eos_ids, bad_words=self._bad_words(params.bad_words))
        if params.structured is not None:
            sampling.matcher = self._grammars.compile(*params.structured)
        return _Live(request=request, sampling=sampling, deliver=deliver, index=index, text=text, streams=streams)

    def _bad_words(self, words: Sequence[str | tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
        """Each as it is written at the beginning of a text and behind a space."""
        found = {word for word in words if not isinstance(word, str)}
        for word in words:
            if isinstance(word, str):
                for text in (word, " " + word.lstrip()):
                    found.add(tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]))
        return tuple(sorted(found))

    # -- the thread ----------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop; what still runs ends as `abort`."""
        if self._thread is not None:
            self._inbox.put(None)
            self._thread.join()
            self._thread = None
        self._broken = self._broken or "the engine is closed"
        self._scheduler.drop_prefixes()

    def _start(self) -> None:
        with self._lock:
            if self._broken:
                raise RuntimeError(f"the engine can't take requests: {self._broken}")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kvfold engine", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        try:
            while self._drain():
                self._step()
        except BaseException as error:  # a mistake of ours: nobody may wait for an answer that never comes
            self._broken = f"{type(error).__name__}: {' '.join(str(error).split())}"
        for request in list(self._live):
            self._end(request, "error" if self._broken else "abort", self._broken)

    def _drain(self) -> bool:
        """Do what the inbox says, waiting for it if nothing runs. False = stop."""
        while True:
            try:
                message = self._inbox.get(block=not self._live)
            except queue.Empty:
                return True
            if message is None:
                return False
            message()

    def _enter(self, live: _Live) -> None:
        self._live[live.request] = live
        try:
            self._scheduler.submit(live.request)
        except ValueError as error:
            self._end(live.request, "error", str(error))

    def _step(self) -> None:
        step = self._scheduler.plan(time.monotonic())
        self._counts["steps"] += 1
        for request in step.ended:
            self._deliver_end(request)
        ready: list[tuple[_Live, Tensor]] = []
        by_method: dict[str, list[tuple[Request, int]]] = {}
        for request in step.decode:
            by_method.setdefault(request.method, []).append((request, 1))
        for group in by_method.values():
            ready += self._forward(group)
        if step.prefill:
            ready += self._forward(step.prefill)
        if ready:
            states = [live.sampling for live, _ in ready]
            for (live, _), sampled in zip(ready, sample(torch.stack([row for _, row in ready]), states), strict=True):
                self._take(live, sampled)

    def _forward(self, group: list[tuple[Request, int]]) -> list[tuple[_Live, Tensor]]:
        """One call; the logits [V] of those whose next token is to be chosen."""
        group = [(request, tokens) for request, tokens in group if request.handle is not None]
        if not group:
            return []
        requests, method = [request for request, _ in group], group[0][0].method
        fed = [request.tokens[request.seen : request.seen + number] for request, number in group]
        reading = {request for request in requests if request.is_reading}
        every = any(request.params.prompt_logprobs is not None and request in reading for request in requests)
        try:
            logits_BTV = self._runner.forward(method, [request.handle for request in requests], fed, every=every)
        except CacheFull:
            # The plan was checked, so this is rounding between pieces of a call: the last in the order makes room.
            self._scheduler.preempt(max(requests, key=lambda request: request.rank))
            logits_BTV = None
        except Exception as error:
            for request in requests:
                self._end(request, "error", f"the model failed: {type(error).__name__}: {' '.join(str(error).split())}")
            return []
        ready = []
        for row, request in enumerate(requests):
            if request.handle is None:
                continue
            before, request.seen = request.seen, self._runner.seen(method, request.handle)
            live = self._live[request]
            if every and request in reading and logits_BTV is not None:
                self._note_prompt(live, logits_BTV[row], before)
            if request in reading:
                self._counts["prompt_tokens"] += request.seen - before
                self._scheduler.was_read(request)
            if request.seen == len(request.tokens):
                ready.append((live, logits_BTV[row, -1]))
        return ready

    def _note_prompt(self, live: _Live, logits_TV: Tensor, before: int) -> None:
        """Log probabilities of the prompt's tokens that follow those just read."""
        request = live.request
        if request.params.prompt_logprobs is None:
            return
        if before == 0:
            live.prompt_logprobs.clear()
        last = min(request.seen + 1, request.prompt_tokens)
        targets = request.tokens[before + 1 : last]
        start = logits_TV.shape[0] - (request.seen - before)
        if targets:
            rows = logits_TV[start : start + len(targets)]
            live.prompt_logprobs += token_logprobs(rows, targets, request.params.prompt_logprobs)

    def _take(self, live: _Live, sampled: Any) -> None:
        """The next token of one answer: append it, look for an end, deliver."""
        request, params = live.request, live.request.params
        if sampled.error is not None:
            self._end(request, "error", sampled.error)
            return
        token, matcher = sampled.token, live.sampling.matcher
        request.tokens.append(token)
        self._counts["completion_tokens"] += 1
        ends = token in live.sampling.end_ids and request.num_outputs >= params.min_tokens
        live.token_ids.append(token)
        if sampled.logprob is not None:
            live.logprobs.append(sampled.logprob)
        if live.text is not None and (not ends or params.include_stop_str_in_output or not params.skip_special_tokens):
            live.shown.append(live.text.add(token, may_stop=request.num_outputs > params.min_tokens))
        reason: FinishReason | None = None
        if ends or (live.text is not None and live.text.stopped) or (matcher is not None and matcher.is_complete):
            reason = "stop"
        elif matcher is not None and matcher.error:
            self._end(request, "error", f"structured output failed: {matcher.error}")
            return
        elif request.num_outputs >= request.max_tokens:
            reason = "length"
        if reason is not None:
            self._scheduler.finish(request, reason)
        self._deliver(live)

    # -- ends ----------------------------------------------------------------------------------------------------

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        if not request.is_finished:
            self._scheduler.finish(request, reason, error)
        self._deliver_end(request)

    def _deliver_end(self, request: Request) -> None:
        live = self._live.get(request)
        if live is not None:
            self._deliver(live)

    def _deliver(self, live: _Live) -> None:
        """Hand over what is new, unless it is to come as a whole."""
        request, usage, last = live.request, None, live.request.is_finished
        if last:
            del self._live[request]
            self._counts["finished"] += 1
            live.shown.append(live.text.flush() if live.text is not None else "")
            usage = Usage(
                prompt_tokens=request.prompt_tokens, completion_tokens=request.num_outputs,
                cached_tokens=request.cached_tokens, seen_tokens=request.seen, kept_tokens=request.kept_tokens,
                kv_bytes=request.kv_bytes,
            )  # fmt: skip
        elif not live.streams:
            return
        piece = Piece(
            index=live.index, token_ids=tuple(live.token_ids), text="".join(live.shown), logprobs=tuple(live.logprobs),
            prompt_logprobs=tuple(live.prompt_logprobs), finish_reason=request.finish_reason, error=request.error, usage=usage,
        )  # fmt: skip
        for new in (live.token_ids, live.shown, live.logprobs, live.prompt_logprobs):
            new.clear()
        try:
            live.deliver(piece)
        except Exception:
            # Whoever asked is gone, an event loop that was closed: nobody reads on.
            if not last:
                self._scheduler.finish(request, "abort")
                self._live.pop(request, None)

    def stats(self) -> dict[str, Any]:
        """Where the engine stands: requests, bytes, prefixes, estimates, tokens."""
        scheduler, prefixes = self._scheduler, self._scheduler.prefixes
        return {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "most_running": scheduler.most_running,
            "free_bytes": self._runner.free_bytes,
            "pool_bytes": self._runner.pool_bytes,
            "preemptions": scheduler.preemptions,
            "prefixes": len(prefixes),
            "prefix_queries": prefixes.queries,
            "prefix_hits": prefixes.hits,
            "estimate_error": self._budget.mean_error,
            **self._counts,
        }


def _end_tokens(model: FoldForCausalLM, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Tokens that end an answer, as the generation config, the config and the tokenizer name them."""
    found: list[int] = []
    for one in (model.generation_config, model.config, tokenizer):
        ids = getattr(one, "eos_token_id", None)
        found += [] if ids is None else ids if isinstance(ids, list) else [ids]
    return tuple(sorted(set(found)))
