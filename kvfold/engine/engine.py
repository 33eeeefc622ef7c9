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
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvfold.cache.allocator import CacheFull
from kvfold.engine.answers import Answer, Deliver, Live, Piece, TextStream
from kvfold.engine.budget import Budget
from kvfold.engine.request import FinishReason, Question, Request, SamplingParams, parse_question
from kvfold.engine.runner import Runner
from kvfold.engine.sampler import Grammars, SamplingState, sample, token_logprobs
from kvfold.engine.scheduler import PREFILL_TOKENS, Scheduler
from kvfold.errors import UserError
from kvfold.layout.planner import parse_size
from kvfold.models.decoder import FoldForCausalLM
from kvfold.ops.native import free_openmp_threads

Asked = str | Sequence[int] | Mapping[str, Any]
"""A request: a text, token ids, or an object with OpenAI's field names (`request.SamplingParams`, `request.Question`)."""


class Engine:
    """Answers many requests at once from one compressed cache."""

    def __init__(
        self, model: FoldForCausalLM, tokenizer: PreTrainedTokenizerBase | None = None, kv_memory: str | int = "2GB",
        methods: Sequence[str] | None = None, *, max_running: int = 256, prefill_tokens: int = PREFILL_TOKENS,
        page_slots: int = 16, estimate_scale: float = 1.0, poison: bool = False,
    ):  # fmt: skip
        """`kv_memory`: taken at once, never exceeded. `methods`: text forms that requests may name, the first is the default;
        None = the model's own. `estimate_scale` and `poison` are for tests.
        """
        memory_bytes = parse_size(kv_memory) if isinstance(kv_memory, str) else kv_memory
        if memory_bytes < 1:
            raise UserError(f"kv_memory must be at least 1 byte, got {memory_bytes} (for example '2GB')")
        self.model, self.tokenizer = model.eval(), tokenizer
        own = model.config.layout
        layouts = [own] if methods is None else [own.with_time(text) for text in methods]
        by_method = {layout.time_text(): layout for layout in layouts}
        self.methods = tuple(by_method)
        """Text forms, the default first."""
        self._runner = Runner(
            model, by_method, memory_bytes, max_sequences=2 * max_running, page_slots=page_slots, poison=poison,
            ratios=_kept_ratios(model),
        )  # fmt: skip
        self._budget = Budget(
            self._runner.costs, self._runner.pool_bytes, prefill_tokens=prefill_tokens, scale=estimate_scale
        )
        self.max_running = min(max_running, self._runner.max_sequences)
        """Answers that can run at once."""
        self._scheduler = Scheduler(
            self._budget, self._runner, max_running=self.max_running, prefill_tokens=prefill_tokens
        )
        self.context = model.config.max_position_embeddings
        """Tokens that the model's positions reach."""
        self._vocab_size, self._eos_ids = model.config.vocab_size, _end_tokens(model, tokenizer)
        self._grammars = None if tokenizer is None else Grammars(tokenizer, self._vocab_size, list(self._eos_ids))
        self._live: dict[Request, Live] = {}
        self._numbers = count(1)
        self._counts: dict[str, float] = dict.fromkeys(("prompt_tokens", "completion_tokens", "finished", "steps"), 0)
        self._counts |= {"step_s": 0.0, "forward_s": 0.0}
        self._inbox: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self.stopped: str | None = None
        """Why nothing is taken any more; None while requests are."""
        self._thread: threading.Thread | None = None
        free_openmp_threads()  # of the thread that made the model; from here on the engine's own is the one that computes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop. What still runs ends as `abort`, and all pages are free."""
        with self._lock:
            thread, self.stopped = self._thread, self.stopped or "it is closed"
            self._inbox.put(None)
        if thread is not None:
            thread.join()
        self._scheduler.drop_prefixes()

    def stats(self) -> dict[str, Any]:
        """Requests, bytes, prefixes, estimates, tokens; seconds of all steps, and of the forwards in them."""
        scheduler, prefixes = self._scheduler, self._scheduler.prefixes
        return {
            "running": len(scheduler.running), "waiting": len(scheduler.waiting), "most_running": scheduler.most_running,
            "free_bytes": self._runner.free_bytes, "pool_bytes": self._runner.pool_bytes,
            "preemptions": scheduler.preemptions, "prefixes": len(prefixes), "prefix_queries": prefixes.queries,
            "prefix_hits": prefixes.hits, "estimate_error": self._budget.mean_error, **self._counts,
        }  # fmt: skip

    def generate(self, asked: Iterable[Asked]) -> list[Answer]:
        """Answers in the order of the requests. What is wrong with one of them stands in its answer's `error`."""
        groups = list(self.in_order(asked))
        for group in groups:
            group[0].others = group[1:]
        return [group[0] for group in groups]

    def in_order(self, asked: Iterable[Asked | UserError], ahead: int | None = None) -> Iterator[list[Answer]]:
        """The `n` answers to each request, in the order of the requests, so many of which are under way at once; None = all.
        What is wrong with a request, an error in its place included, stands in its answer's `error`.
        """
        waiting: deque[tuple[list[Request], queue.SimpleQueue[Piece], list[Answer]]] = deque()
        asked = iter(asked)
        try:
            while True:
                fresh: list[Live] = []
                for one in islice(asked, None if ahead is None else ahead - len(waiting)):
                    outbox: queue.SimpleQueue[Piece] = queue.SimpleQueue()
                    try:
                        if isinstance(one, UserError):
                            raise one
                        lives = self._prepare(one, outbox.put, streams=False)
                        answers = [Answer() for _ in lives]
                    except ValueError as error:
                        lives, answers = [], [Answer(finish_reason="error", error=str(error))]
                    waiting.append(([live.request for live in lives], outbox, answers))
                    fresh += lives
                if fresh:
                    self._send(fresh)  # all at once, so that the first one's reading knows where others part from it
                if not waiting:
                    return
                job, outbox, answers = waiting[0]
                for _ in job:
                    piece = outbox.get()
                    answers[piece.index].add(piece)
                waiting.popleft()
                yield answers
        finally:
            for job, *_ in waiting:
                self.cancel(job)

    async def stream(self, asked: Asked) -> AsyncIterator[Piece]:
        """One request's pieces as they come; left early, the request is cancelled. Raises `UserError` for a bad request."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()
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

    def submit(self, asked: Asked, deliver: Deliver, *, streams: bool = True) -> list[Request]:
        """Start a request; `deliver` gets its pieces on the engine's thread, or one whole piece if it does not stream. Gives
        what `cancel` takes, one for each of the `n` answers. Raises `UserError`, in one line, for a request that can't be run.
        """
        return self.submit_all([(asked, deliver)], streams=streams)[0]

    def submit_all(self, asked: Sequence[tuple[Asked, Deliver]], *, streams: bool = True) -> list[list[Request]]:
        """Start several requests at once: `submit` for each, and none where one of them can't be run."""
        groups = [self._prepare(one, deliver, streams=streams) for one, deliver in asked]
        self._send([live for lives in groups for live in lives])
        return [[live.request for live in lives] for lives in groups]

    def cancel(self, job: Sequence[Request]) -> None:
        """End a request; its pages are free before the next step. What has ended already is left alone."""
        self._inbox.put(partial(self._abort, job))

    def _prepare(self, asked: Asked, deliver: Deliver, *, streams: bool) -> list[Live]:
        """The answers to be made, on the caller's thread. Raises `UserError` for whatever is wrong."""
        question = parse_question(asked)
        params, ids, method = question.params, self._ids(question), self._method(question.time)
        self._check_ids(params)
        if self.tokenizer is None and (
            params.stop or params.structured or any(isinstance(x, str) for x in params.bad_words)
        ):
            raise UserError(
                "stop, bad_words and structured output need a tokenizer, and the engine has none: leave them out"
            )
        bad_words = self._bad_words(params.bad_words)
        matcher = None if params.structured is None else self._grammars.compile(*params.structured)
        lives = []
        for index in range(params.n):
            request, text = self._request(question, ids, method, index), None
            if self.tokenizer is not None:
                text = TextStream(
                    self.tokenizer, ids, stop=params.stop, include_stop=params.include_stop_str_in_output,
                    skip_special_tokens=params.skip_special_tokens,
                )  # fmt: skip
            sampling = SamplingState(request=request, eos_ids=self._eos_ids, bad_words=bad_words)
            sampling.matcher = None if matcher is None else matcher.deep_copy()
            new = Piece(index=index)
            lives.append(Live(request=request, sampling=sampling, deliver=deliver, text=text, streams=streams, new=new))
        refusal = self._budget.refusal(lives[0].request)
        if refusal is not None:
            raise UserError(refusal)
        return lives

    def _ids(self, question: Question) -> list[int]:
        prompt, tokenizer = question.prompt, self.tokenizer
        if tokenizer is None and (question.messages or isinstance(prompt, str)):
            raise UserError("a text needs a tokenizer, and the engine has none: give token ids")
        if question.messages:
            try:
                ids = tokenizer.apply_chat_template(
                    list(question.messages), add_generation_prompt=True, tokenize=True, return_dict=True
                )["input_ids"]
            except Exception as error:  # a template is a program of the checkpoint's: it may raise anything
                raise UserError(f"messages must fit the chat template, got: {_one_line(error)}") from error
        else:
            ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise UserError("prompt must have 1 token or more, got none")
        if max(ids) >= self._vocab_size:
            raise UserError(f"prompt must hold token ids below {self._vocab_size}, got {max(ids)}")
        if len(ids) >= self.context:
            raise UserError(f"prompt must be shorter than the model's context of {self.context} tokens, got {len(ids)}")
        return ids

    def _check_ids(self, params: SamplingParams) -> None:
        words = [token for word in params.bad_words if not isinstance(word, str) for token in word]
        biased = [token for token, _ in params.logit_bias]
        highest = max([*words, *biased, *params.stop_token_ids, *(params.allowed_token_ids or ())], default=0)
        if highest >= self._vocab_size:
            raise UserError(f"token ids must be below {self._vocab_size}, got {highest}")

    def _method(self, time_text: str | None) -> str:
        if time_text is None:
            return self.methods[0]
        name = self.model.config.layout.with_time(time_text).time_text()
        if name not in self.methods:
            raise UserError(f"time must be one of the methods loaded, {', '.join(self.methods)}, got '{time_text}'")
        return name

    def _request(self, question: Question, ids: list[int], method: str, index: int) -> Request:
        params, now = question.params, time.monotonic()
        wanted = math.inf if params.max_tokens is None else params.max_tokens
        request = Request(
            id=f"{next(self._numbers):012d}", tokens=list(ids), prompt_tokens=len(ids), params=params, method=method,
            max_tokens=int(min(wanted, self.context - len(ids), 2**31)), priority=question.priority, arrival=now,
            deadline=math.inf if question.timeout is None else now + question.timeout,
            reuse=params.prompt_logprobs is None,
        )  # fmt: skip
        if params.seed is not None:
            request.seed = params.seed + index
        if params.max_tokens is None:
            request.max_tokens = max(1, self._budget.most_tokens(request))
        return request

    def _bad_words(self, words: Sequence[str | tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
        """Token runs; a text as it is written at the beginning of a text and behind a space."""
        found = {word for word in words if not isinstance(word, str)}
        for word in words:
            if isinstance(word, str):
                for text in (word, " " + word.lstrip()):
                    found.add(tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]))
        return tuple(sorted(found - {()}))

    def _send(self, lives: list[Live]) -> None:
        with self._lock:
            if self.stopped:
                raise RuntimeError(f"the engine can't take requests: {self.stopped}")
            if self._thread is None:
                free_openmp_threads()
                self._thread = threading.Thread(target=self._run, name="kvfold engine", daemon=True)
                self._thread.start()
            self._inbox.put(partial(self._enter, lives))

    def _run(self) -> None:
        reason: FinishReason = "abort"
        said = "it is closed"
        try:
            while self._drain():
                start = time.perf_counter()
                self._step()
                self._counts["step_s"] += time.perf_counter() - start
        except BaseException as error:  # a mistake of ours: nobody may wait for an answer that never comes
            reason, said = "error", _one_line(error)
        with self._lock:
            self.stopped = self.stopped or said
            while not self._inbox.empty():
                message = self._inbox.get()
                if message is not None:
                    message()
        for request in list(self._live):
            self._end(request, reason, said if reason == "error" else None)

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

    def _enter(self, lives: Sequence[Live]) -> None:
        for live in lives:
            self._live[live.request] = live
            try:
                self._scheduler.submit(live.request)
            except ValueError as error:
                self._end(live.request, "error", str(error))

    def _abort(self, job: Sequence[Request]) -> None:
        for request in job:
            if request in self._live:
                self._end(request, "abort")

    def _step(self) -> None:
        step = self._scheduler.plan(time.monotonic())
        self._counts["steps"] += 1
        for request in step.ended:
            self._deliver(self._live[request])
        by_method: dict[str, list[tuple[Request, int]]] = {}
        for request in step.decode:
            by_method.setdefault(request.method, []).append((request, 1))
        ready: list[tuple[Live, Tensor]] = []
        for group in (*by_method.values(), step.prefill):
            ready += self._forward(group)
        if not ready:
            return
        logits_BV = torch.stack([logits_V for _, logits_V in ready])
        for (live, _), sampled in zip(ready, sample(logits_BV, [live.sampling for live, _ in ready]), strict=True):
            try:
                reason, error = live.take(sampled)
            except Exception as raised:  # a tokenizer's, say: this answer's alone
                reason, error = "error", _one_line(raised)
            self._counts["completion_tokens"] += error is None
            if reason is not None:
                self._end(live.request, reason, error)
            elif live.streams:
                self._deliver(live)

    def _forward(self, group: list[tuple[Request, int]]) -> list[tuple[Live, Tensor]]:
        """One call; the logits [V] of those whose next token is to be chosen."""
        # An earlier call of this step may have ended or preempted some.
        group = [(request, tokens) for request, tokens in group if request.handle is not None]
        if not group:
            return []
        requests, method, logits_BTV = [request for request, _ in group], group[0][0].method, None
        fed = [request.tokens[request.seen : request.seen + number] for request, number in group]
        reading = [request for request in requests if request.is_reading]
        every = any(request.params.prompt_logprobs is not None for request in reading)
        start = time.perf_counter()
        try:
            logits_BTV = self._runner.forward(method, [request.handle for request in requests], fed, every=every)
        except CacheFull as error:
            # The plan was checked, so that this is a call which was cut up and met gates that kept more than there was room.
            last = max(requests, key=lambda request: request.rank)
            if len(self._scheduler.running) == 1:
                self._end(last, "error", _one_line(error))
            else:
                self._scheduler.preempt(last)
        except Exception as error:
            for request in requests:
                self._end(request, "error", f"the model failed: {_one_line(error)}")
        self._counts["forward_s"] += time.perf_counter() - start
        ready = []
        for row, request in enumerate(requests):
            if request.handle is None:
                continue
            live, before = self._live[request], request.seen
            request.seen = self._runner.seen(method, request.handle)
            if request in reading:
                self._counts["prompt_tokens"] += request.seen - before
                if logits_BTV is not None and request.params.prompt_logprobs is not None:
                    _note_prompt(live, logits_BTV[row], before)
                self._scheduler.was_read(request)
            if logits_BTV is not None and request.seen == len(request.tokens):
                ready.append((live, logits_BTV[row, -1]))
        return ready

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        self._scheduler.finish(request, reason, error)
        self._deliver(self._live[request])

    def _deliver(self, live: Live) -> None:
        if live.request.is_finished:
            del self._live[live.request]
            self._counts["finished"] += 1
        try:
            live.deliver(live.piece())
        except Exception:
            # Whoever asked is gone, an event loop that was closed: nobody reads on.
            if not live.request.is_finished:
                self._scheduler.finish(live.request, "abort")
                del self._live[live.request]


def _note_prompt(live: Live, logits_TV: Tensor, before: int) -> None:
    """Log probabilities of the prompt's tokens that follow those just read; `before`: tokens seen before the call."""
    request = live.request
    if before == 0:
        live.new.prompt_logprobs.clear()  # a preempted request is read again
    targets = request.tokens[before + 1 : min(request.seen + 1, request.prompt_tokens)]
    start = logits_TV.shape[0] - (request.seen - before)
    if targets:
        rows = logits_TV[start : start + len(targets)]
        live.new.prompt_logprobs += token_logprobs(rows, targets, request.params.prompt_logprobs)


def _kept_ratios(model: FoldForCausalLM) -> dict[str, Mapping[str, Any]]:
    """As calibration wrote them for one method and one set of gates."""
    ratios = model.config.kept_ratios
    return {} if ratios is None else {model.config.layout.base().with_time(ratios["time"]).time_text(): ratios}


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _end_tokens(model: FoldForCausalLM, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Tokens that end an answer, as the generation config, the config and the tokenizer name them."""
    found: list[int] = []
    for one in (model.generation_config, model.config, tokenizer):
        ids = getattr(one, "eos_token_id", None)
        found += [] if ids is None else ids if isinstance(ids, list) else [ids]
    return tuple(sorted(set(found)))
