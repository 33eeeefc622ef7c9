"""One request from its checked fields to its response: a place in the queue, the engine, a stream or a whole answer, and what
the answer cost, in OpenAI's counts and by what the cache saw and kept. Here are the two completions endpoints, of texts and of
chats; `responses.py` has the third.
"""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, chat_completion
from openai.types.chat import chat_completion_chunk as chunks
from openai.types.chat import chat_completion_message_function_tool_call as tool_calls
from openai.types.completion_choice import Logprobs
from openai.types.completion_usage import PromptTokensDetails
from pydantic import BaseModel

from kvfold.engine.engine import Answer, Piece
from kvfold.engine.request import Usage
from kvfold.serve.calls import AnswerReader, Part
from kvfold.serve.fields import Base, ChatRequest, CompletionRequest, read
from kvfold.serve.prompts import tool_choice
from kvfold.serve.replies import (
    DONE,
    PING,
    ApiError,
    Stream,
    error_event,
    event,
    filled,
    invalid,
    log_failure,
    unless_gone,
)
from kvfold.serve.serving import LONG_CHARACTERS, Job, Serving

DEFAULT_MAX_TOKENS = 16
"""Of completions; a chat goes on as long as there is room."""


class Call:
    """One request to one endpoint."""

    prefix = ""
    """Of its id."""
    forms: tuple[tuple[type[BaseModel], str], ...] = ()
    """OpenAI's type of what a stream carries at once and of a whole answer, each with its name."""
    answers: int
    """Its prompts times its `n`."""
    characters: int
    """How much there is to prepare, roughly."""

    def __init__(self, serving: Serving, body: Base, model: str, name: str):
        """`model`: as the client calls it. `name`: of the request."""
        self.serving, self.body, self.model = serving, body, model
        self.id, self.created = self.prefix + name, int(time.time())
        self.n = max(1, body.n or 1)  # the engine refuses what is less
        form = body.response_format or {"type": "text"}
        self.structured = bool(body.structured_outputs) or form.get("type") != "text"
        self.num_tokens = 0
        """Sent so far."""
        self.ended: list[Usage] = []
        """Of all answers that have ended."""

    def submit(self, job: Job) -> None:
        """Make token ids and hand them to the engine; on a worker thread."""

    def whole(self, index: int, answer: Answer) -> Any:
        """One whole answer, as a choice."""

    def news(self, index: int, piece: Piece) -> list[Any]:
        """What is new of one answer, as choices."""

    def extras(self, first: Answer) -> dict[str, Any]:
        """What whole answers have besides choices and usage."""
        return {}

    async def answer(self, job: Job) -> BaseModel:
        """All answers, once they are whole."""
        answers = [Answer() for _ in range(self.answers)]
        async for batch in job.batches():
            for index, piece in batch:
                answers[index].add(piece)
        self.serving.log_text(self.id, "answer", [one.text for one in answers])
        choices = [self.whole(index, one) for index, one in enumerate(answers)]
        return self._filled(1, choices, usage=self.usage(job), **self.extras(answers[0]))

    async def events(self, job: Job) -> AsyncIterator[bytes]:
        """The same as events."""
        options = self.body.stream_options
        always = bool(options and options.continuous_usage_stats)
        async for batch in job.batches(self.serving.settings.ping_s):
            if not batch:
                yield PING
            for index, piece in batch:
                for choice in self.news(index, piece):
                    chunk = self._filled(0, [choice])
                    if always:
                        chunk.usage = self.usage(job)
                    yield event(chunk)
        if options and options.include_usage:
            yield event(self._filled(0, [], usage=self.usage(job)))

    def _filled(self, form: int, choices: list[Any], **more: Any) -> Any:
        kind, name = self.forms[form]
        return filled(
            kind, id=self.id, object=name, created=self.created, model=self.model, choices=choices, **more
        )  # fmt: skip

    def end(self, choice: Any, piece: Piece, reason: str | None = None) -> None:
        """Say in its last choice how an answer ended, where `reason` is None as OpenAI's API says it: an answer whose time was
        over was cut off like one whose tokens were.
        """
        choice.finish_reason = reason or ("stop" if piece.finish_reason == "stop" else "length")
        if piece.finish_reason == "timeout":
            choice.stop_reason = "timeout"
        self.ended.append(piece.usage)

    def usage(self, job: Job) -> CompletionUsage:
        """So far."""
        cached = max((one.cached_tokens for one in self.ended), default=0)
        usage: Any = CompletionUsage(
            prompt_tokens=job.prompt_tokens, completion_tokens=self.num_tokens,
            total_tokens=job.prompt_tokens + self.num_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached), completion_tokens_details=None,
        )  # fmt: skip
        if self.ended:
            usage.kvfold = held(self.ended)
        return usage


def held(ended: Sequence[Usage]) -> dict[str, Any]:
    """Tokens seen, tokens kept (the mean over KV heads) and bytes held at the end, summed over answers, and how many times fewer
    were kept than seen.
    """
    seen, kept = sum(one.seen_tokens for one in ended), sum(one.kept_tokens for one in ended)
    return {
        "seen_tokens": seen, "kept_tokens": round(kept, 2), "kv_bytes": sum(one.kv_bytes for one in ended),
        "compression": round(seen / kept, 3) if kept else None,
    }  # fmt: skip


async def respond(serving: Serving, request: Request, kind: type[Base], call: type[Call]) -> Response:
    """The response to a body of one kind, whole or as a stream. Raises `ApiError` for what is refused before an answer begins."""
    body = await read(request, kind, serving.settings.body_timeout_s)
    model, name, stream = serving.check(body), serving.request_id(request, body), bool(body.stream)
    asked = call(serving, body, model, name)
    job = serving.open(name, asked.answers, streams=stream)
    headers = {"X-Request-Id": name}
    handed_over = False
    try:
        await serving.prepare(lambda: asked.submit(job), characters=asked.characters)
        if stream:
            response = Stream(_until_done(asked, job), leave=lambda: serving.leave(job), headers=headers)
            handed_over = True
            return response
        answer = await unless_gone(request, asked.answer(job))
        return Response(
            answer.model_dump_json(exclude_unset=True, by_alias=True), media_type="application/json", headers=headers
        )
    finally:
        if not handed_over:
            serving.leave(job)


async def _until_done(asked: Call, job: Job) -> AsyncIterator[bytes]:
    try:
        async for one in asked.events(job):
            yield one
    except ApiError as error:
        yield error_event(error)
    except Exception as error:
        log_failure(error)
        yield error_event(ApiError(500, "the server failed; its log says more"))
    yield DONE


@dataclass(kw_only=True, slots=True)
class _Text:
    """One answer to one prompt, as far as it was sent."""

    ids: list[int]
    """The prompt."""
    echo: str = ""
    """What is put before the answer."""
    offset: int = 0
    """Characters before the next token, for log probabilities."""
    begun: bool = False


class TextCall(Call):
    """/v1/completions: texts or token ids in, texts out; several prompts and several answers each."""

    prefix, forms = "cmpl-", ((Completion, "text_completion"),) * 2
    body: CompletionRequest

    def __init__(self, serving: Serving, body: CompletionRequest, model: str, name: str):
        super().__init__(serving, body, model, name)
        self.prompts = _prompts(body.prompt)
        self.answers = len(self.prompts) * self.n
        self.characters = sum(map(len, self.prompts)) + LONG_CHARACTERS * self.structured
        self.texts: list[_Text] = []

    def submit(self, job: Job) -> None:
        """See `Call`."""
        serving, body = self.serving, self.body
        sampling = body.sampling(serving.settings.defaults)
        if body.max_tokens == 0:
            sampling["max_tokens"] = 1  # the engine makes one, which is then left out
        if body.logprobs is not None:
            sampling["logprobs"] = body.logprobs
            if body.echo:
                sampling.setdefault("prompt_logprobs", body.logprobs)
        asked = []
        for prompt in self.prompts:
            if isinstance(prompt, str):
                text, ids = prompt, serving.tokens.encode(prompt, special=body.add_special_tokens is not False)
            else:
                text, ids = serving.tokens.decode(prompt) if body.echo else "", prompt
            asked.append(serving.asked(sampling, ids, default_max_tokens=DEFAULT_MAX_TOKENS))
            self.texts += [_Text(ids=list(ids), echo=text if body.echo else "") for _ in range(self.n)]
            serving.log_text(self.id, "prompt", prompt)
        job.prompt_tokens = sum(len(one["prompt"]) for one in asked)
        job.submit(asked)

    def whole(self, index: int, piece: Piece) -> CompletionChoice:
        """See `Call`; or what is new of one answer."""
        state, body = self.texts[index], self.body
        if body.max_tokens == 0:
            piece.text, piece.token_ids, piece.logprobs = "", [], []
        text = piece.text if state.begun else state.echo + piece.text
        fields: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": None}
        if body.logprobs is not None:
            fields["logprobs"] = self._logprobs(state, piece)
        if body.prompt_logprobs is not None and not state.begun:
            fields["prompt_logprobs"] = self.serving.tokens.prompt_logprobs(piece.prompt_logprobs)
        if body.return_token_ids:
            fields["token_ids"] = piece.token_ids
            if not state.begun:
                fields["prompt_token_ids"] = state.ids
        state.begun = True
        self.num_tokens += len(piece.token_ids)
        choice = filled(CompletionChoice, **fields)
        if piece.finish_reason is not None:
            self.end(choice, piece, "length" if body.max_tokens == 0 else None)
        return choice

    def _logprobs(self, state: _Text, piece: Piece) -> Logprobs:
        echoes = self.body.echo and not state.begun
        logprobs, state.offset = self.serving.tokens.completion_logprobs(
            [*piece.prompt_logprobs, *piece.logprobs] if echoes else piece.logprobs, state.offset,
            first=state.ids[0] if echoes else None, as_ids=bool(self.body.return_tokens_as_token_ids),
        )  # fmt: skip
        return logprobs

    def news(self, index: int, piece: Piece) -> list[CompletionChoice]:
        """See `Call`."""
        return [self.whole(index, piece)]


def _prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts of a request, each a text or token ids. Raises `ApiError`."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        first = prompt[0]
        if isinstance(first, int) and not isinstance(first, bool):
            return [prompt]
        if isinstance(first, str | list) and all(isinstance(one, type(first)) for one in prompt):
            return prompt
    raise invalid("prompt", "prompt must be a text, token ids, or a list of 1 or more of either")


class ChatCall(Call):
    """One chat answered by the engine: what chat completions and responses have in common."""

    body: ChatRequest
    prompt_ids: list[int]

    def __init__(self, serving: Serving, body: ChatRequest, model: str, name: str):
        super().__init__(serving, body, model, name)
        self.answers = self.n
        self.tools = tool_choice(body.tools, body.tool_choice, body.parallel_tool_calls)
        if self.tools.forced and self.structured:
            message = "tool_choice and response_format can't both say what the answer is: leave one out"
            raise invalid("tool_choice", message)
        self.structured |= self.tools.forced
        texts = (message.get("content") for message in body.messages)
        length = sum(len(text) if isinstance(text, str | list) else 0 for text in texts)
        self.characters = length + LONG_CHARACTERS * (self.structured or bool(body.tools))

    def submit(self, job: Job) -> None:
        """See `Call`."""
        serving, body = self.serving, self.body
        ids, in_reasoning = serving.template.render(body, self.tools.tools, structured=self.structured)
        self.prompt_ids, self._in_reasoning = ids, in_reasoning
        sampling = body.sampling(serving.settings.defaults)
        if self.tools.forced:
            sampling["structured_outputs"] = {"json": self.tools.schema()}
        if body.logprobs:
            sampling["logprobs"] = body.top_logprobs or 0
        serving.log_text(self.id, "messages", body.messages)
        job.prompt_tokens = len(ids)
        job.submit([serving.asked(sampling, ids, default_max_tokens=None)])

    def reader(self) -> AnswerReader:
        """For one answer."""
        reasons = self.serving.template.reasons and not self.structured
        return AnswerReader(choice=self.tools, reasons=reasons, in_reasoning=self._in_reasoning)

    def logprobs(self, piece: Piece) -> list[Any]:
        """As chat completions have them; none where none were asked for."""
        if not self.body.logprobs:
            return []
        as_ids = bool(self.body.return_tokens_as_token_ids)
        return self.serving.tokens.chat_logprobs(piece.logprobs, as_ids=as_ids)


@dataclass(kw_only=True, slots=True)
class _Message:
    """One answer, as far as it was sent."""

    reader: AnswerReader
    logprobs: list[Any] = field(default_factory=list)
    """Those of text that is held back."""
    token_ids: list[int] = field(default_factory=list)
    begun: bool = False


class MessageCall(ChatCall):
    """/v1/chat/completions: messages in; content, reasoning and tool calls out, whole or as they come."""

    prefix = "chatcmpl-"
    forms = ((ChatCompletionChunk, "chat.completion.chunk"), (ChatCompletion, "chat.completion"))

    def __init__(self, serving: Serving, body: ChatRequest, model: str, name: str):
        super().__init__(serving, body, model, name)
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs", "top_logprobs needs logprobs: set logprobs to true")
        self.messages: list[_Message] = []

    def submit(self, job: Job) -> None:
        """See `Call`."""
        super().submit(job)
        self.messages = [_Message(reader=self.reader()) for _ in range(self.answers)]

    def end(self, choice: Any, piece: Piece, reason: str | None = None) -> None:
        """See `Call`; with calls made of the model's own will, or required ones, that is the reason."""
        called = self.messages[choice.index].reader.num_calls and self.tools.mode != "named"
        super().end(choice, piece, "tool_calls" if piece.finish_reason == "stop" and called else reason)

    def extras(self, first: Answer) -> dict[str, Any]:
        """See `Call`."""
        found: dict[str, Any] = {}
        if self.body.prompt_logprobs is not None:
            found["prompt_logprobs"] = self.serving.tokens.prompt_logprobs(first.prompt_logprobs)
        if self.body.return_token_ids:
            found["prompt_token_ids"] = self.prompt_ids
        return found

    def whole(self, index: int, answer: Answer) -> chat_completion.Choice:
        """See `Call`."""
        reader = self.messages[index].reader
        self.num_tokens += len(answer.token_ids)
        parts = reader.feed(answer.text) + reader.finish()

        def text(kind: str, call: int = 0) -> str:
            return "".join(part.text for part in parts if part.kind == kind and part.index == call)

        content = text("content")
        message: Any = filled(
            ChatCompletionMessage, role="assistant", content=content if content or not reader.num_calls else None,
            refusal=None,
        )  # fmt: skip
        if reasoning := text("reasoning"):
            message.reasoning_content = message.reasoning = reasoning
        if reader.num_calls:
            message.tool_calls = [
                tool_calls.ChatCompletionMessageFunctionToolCall(
                    id=part.id, type="function",
                    function=tool_calls.Function(name=part.text, arguments=text("arguments", part.index)),
                )
                for part in parts if part.kind == "call"
            ]  # fmt: skip
        choice: Any = filled(chat_completion.Choice, index=index, message=message, logprobs=None)
        self.end(choice, answer)
        if self.body.logprobs:
            choice.logprobs = chat_completion.ChoiceLogprobs(content=self.logprobs(answer))
        if self.body.return_token_ids:
            choice.token_ids = answer.token_ids
        return choice

    def news(self, index: int, piece: Piece) -> list[chunks.Choice]:
        """See `Call`."""
        state, last = self.messages[index], piece.finish_reason is not None
        self.num_tokens += len(piece.token_ids)
        deltas: list[chunks.ChoiceDelta] = []
        if not state.begun:
            state.begun = True
            deltas.append(filled(chunks.ChoiceDelta, role="assistant", content=""))
        parts = state.reader.feed(piece.text) + (state.reader.finish() if last else [])
        deltas += [_delta(part) for part in parts]
        state.logprobs += self.logprobs(piece)
        if self.body.return_token_ids:
            state.token_ids += piece.token_ids
        if last and not parts:
            deltas.append(filled(chunks.ChoiceDelta))
        choices: list[Any] = [filled(chunks.Choice, index=index, delta=delta, finish_reason=None) for delta in deltas]
        if parts or last:
            if self.body.logprobs:
                choices[-1].logprobs, state.logprobs = filled(chunks.ChoiceLogprobs, content=state.logprobs), []
            if self.body.return_token_ids:
                choices[-1].token_ids, state.token_ids = state.token_ids, []
        if last:
            self.end(choices[-1], piece)
        return choices


def _delta(part: Part) -> chunks.ChoiceDelta:
    """One part as a piece of a message."""
    if part.kind == "content":
        return filled(chunks.ChoiceDelta, content=part.text)
    if part.kind == "reasoning":
        return filled(chunks.ChoiceDelta, reasoning_content=part.text, reasoning=part.text)
    function = {"name": part.text, "arguments": ""} if part.kind == "call" else {"arguments": part.text}
    begun: dict[str, Any] = {"id": part.id, "type": "function"} if part.kind == "call" else {}
    call = chunks.ChoiceDeltaToolCall(
        index=part.index, function=chunks.ChoiceDeltaToolCallFunction(**function), **begun
    )
    return filled(chunks.ChoiceDelta, tool_calls=[call])
