"""/v1/chat/completions: messages in; content, reasoning and tool calls out, whole or as they come."""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import (
    Choice as ChunkChoice,
)
from openai.types.chat.chat_completion_chunk import (
    ChoiceDelta,
    ChoiceDeltaToolCall,
    ChoiceDeltaToolCallFunction,
)
from openai.types.chat.chat_completion_message_function_tool_call import ChatCompletionMessageFunctionToolCall, Function

from kvfold.engine.engine import Answer, Piece
from kvfold.engine.request import Usage
from kvfold.serve.answers import respond, usage_of
from kvfold.serve.calls import AnswerReader, Part
from kvfold.serve.errors import ApiError
from kvfold.serve.fields import ChatRequest
from kvfold.serve.prompts import Prompt, tool_choice
from kvfold.serve.serving import LONG_CHARACTERS, Job, Serving, finish_reason
from kvfold.serve.streaming import PING, event, filled


@dataclass(kw_only=True, slots=True)
class _Choice:
    """One answer, as far as it was sent."""

    reader: AnswerReader
    num_tokens: int = 0
    logprobs: list[Any] = field(default_factory=list)
    """Those of text that is held back."""
    token_ids: list[int] = field(default_factory=list)
    begun: bool = False


class ChatCall:
    """One chat answered by the engine: what chat completions and responses have in common."""

    def __init__(self, serving: Serving, body: ChatRequest):
        self.serving, self.body = serving, body
        self.n = body.n if isinstance(body.n, int) and body.n > 0 else 1
        self.answers = self.n
        self.tools = tool_choice(body.tools, body.tool_choice, body.parallel_tool_calls)
        if self.tools.forced and (body.structured_outputs or _is_structured(body.response_format)):
            raise ApiError(
                400, "tool_choice and response_format can't both say what the answer is: leave one out",
                param="tool_choice",
            )  # fmt: skip
        self.structured = self.tools.forced or bool(body.structured_outputs) or _is_structured(body.response_format)
        texts = (message.get("content") for message in body.messages)
        length = sum(len(text) if isinstance(text, str | list) else 0 for text in texts)
        self.characters = length + LONG_CHARACTERS * (self.structured or bool(body.tools))
        self.prompt: Prompt | None = None
        self.ended: list[Usage] = []

    def submit(self, job: Job, log_as: str) -> None:
        """Render, make tokens, hand to the engine; on a worker thread."""
        serving, body = self.serving, self.body
        kwargs = dict(body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            kwargs.setdefault("reasoning_effort", body.reasoning_effort)
        self.prompt = serving.template.render(
            body.messages, tools=self.tools.tools, documents=body.documents or (), kwargs=kwargs,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=bool(body.continue_final_message),
            add_special_tokens=bool(body.add_special_tokens), structured=self.structured,
        )  # fmt: skip
        sampling = body.sampling(serving.settings.defaults)
        if self.tools.forced:
            sampling["structured_outputs"] = {"json": self.tools.schema()}
        if body.logprobs:
            sampling["logprobs"] = body.top_logprobs or 0
        serving.log_text(log_as, "messages", body.messages)
        asked = serving.asked(sampling, self.prompt.ids, default_max_tokens=None)
        job.prompt_tokens = len(self.prompt.ids)
        job.submit([asked])

    def reader(self) -> AnswerReader:
        """For one answer."""
        reasons = self.prompt.reasons and not self.structured
        return AnswerReader(choice=self.tools, reasons=reasons, in_reasoning=self.prompt.in_reasoning)

    def finish_reason(self, piece: Piece | Answer, num_calls: int) -> str:
        """With calls made of the model's own will, or required ones, that is the reason."""
        reason = finish_reason(piece)
        return "tool_calls" if reason == "stop" and num_calls and self.tools.mode != "named" else reason


def _is_structured(response_format: dict[str, Any] | None) -> bool:
    return bool(response_format) and response_format.get("type") != "text"


class _Chat(ChatCall):
    """One request to this endpoint."""

    def __init__(self, serving: Serving, body: ChatRequest, model: str, name: str):
        super().__init__(serving, body)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: set logprobs to true", param="top_logprobs")
        self.model, self.id, self.created = model, f"chatcmpl-{name}", int(time.time())

    def submit(self, job: Job, log_as: str | None = None) -> None:
        """See `ChatCall`."""
        super().submit(job, log_as or self.id)

    def _logprobs(self, piece: Piece | Answer) -> list[Any]:
        as_ids = bool(self.body.return_tokens_as_token_ids)
        return self.serving.tokens.chat_logprobs(piece.logprobs, as_ids=as_ids)

    # -- whole ---------------------------------------------------------------------------------------------------

    async def answer(self, job: Job) -> ChatCompletion:
        """All answers, once they are whole."""
        found = [Answer() for _ in range(self.answers)]
        async for batch in self.serving.batches(job):
            for index, piece in batch:
                found[index].add(piece)
        self.ended = [one.usage for one in found]
        num_tokens = sum(len(one.token_ids) for one in found)
        answer = filled(
            ChatCompletion,
            id=self.id, object="chat.completion", created=self.created, model=self.model,
            choices=[self._whole(index, one) for index, one in enumerate(found)],
            usage=usage_of(job.prompt_tokens, num_tokens, self.ended),
        )  # fmt: skip
        if self.body.prompt_logprobs is not None:
            answer.prompt_logprobs = self.serving.tokens.prompt_logprobs(found[0].prompt_logprobs)
        if self.body.return_token_ids:
            answer.prompt_token_ids = self.prompt.ids
        self.serving.log_text(self.id, "answer", [one.text for one in found])
        return answer

    def _whole(self, index: int, answer: Answer) -> Choice:
        reader = self.reader()
        parts = reader.feed(answer.text) + reader.finish()
        text = {kind: "".join(part.text for part in parts if part.kind == kind) for kind in ("reasoning", "content")}
        calls = calls_of(parts)
        message = filled(
            ChatCompletionMessage,
            role="assistant",
            content=text["content"] if text["content"] or not calls else None,
            refusal=None,
        )
        if text["reasoning"]:
            message.reasoning_content = message.reasoning = text["reasoning"]
        if calls:
            message.tool_calls = [
                ChatCompletionMessageFunctionToolCall(
                    id=call.id, type="function", function=Function(name=call.text, arguments=arguments)
                )
                for call, arguments in calls
            ]
        choice = filled(
            Choice, index=index, message=message, finish_reason=self.finish_reason(answer, len(calls)), logprobs=None
        )
        if self.body.logprobs:
            choice.logprobs = ChoiceLogprobs(content=self._logprobs(answer))
        if self.body.return_token_ids:
            choice.token_ids = answer.token_ids
        if answer.finish_reason == "timeout":
            choice.stop_reason = "timeout"
        return choice

    # -- streamed ------------------------------------------------------------------------------------------------

    async def events(self, job: Job) -> AsyncIterator[bytes]:
        """The same as a stream."""
        choices = [_Choice(reader=self.reader()) for _ in range(self.answers)]
        options = self.body.stream_options
        always = bool(options and options.continuous_usage_stats)
        async for batch in self.serving.batches(job, self.serving.settings.ping_s):
            if not batch:
                yield PING
            for index, piece in batch:
                for choice in self._chunks(index, choices[index], piece):
                    chunk = self._chunk([choice])
                    if always:
                        chunk.usage = self._usage(job, choices)
                    yield event(chunk)
        if options and options.include_usage:
            yield event(self._chunk([], usage=self._usage(job, choices)))

    def _chunk(self, choices: Sequence[ChunkChoice], **extra: Any) -> ChatCompletionChunk:
        return filled(
            ChatCompletionChunk,
            id=self.id, object="chat.completion.chunk", created=self.created, model=self.model, choices=list(choices),
            **extra,
        )  # fmt: skip

    def _usage(self, job: Job, choices: Sequence[_Choice]) -> Any:
        return usage_of(job.prompt_tokens, sum(one.num_tokens for one in choices), self.ended)

    def _chunks(self, index: int, state: _Choice, piece: Piece) -> list[ChunkChoice]:
        """What is new of one answer."""
        state.num_tokens += len(piece.token_ids)
        deltas: list[ChoiceDelta] = []
        if not state.begun:
            state.begun = True
            deltas.append(filled(ChoiceDelta, role="assistant", content=""))
        last = piece.finish_reason is not None
        parts = state.reader.feed(piece.text)
        if last:
            parts += state.reader.finish()
        deltas += [delta_of(part) for part in parts]
        if self.body.logprobs:
            state.logprobs += self._logprobs(piece)
        if self.body.return_token_ids:
            state.token_ids += piece.token_ids
        if last and not parts:
            deltas.append(filled(ChoiceDelta))
        found = [filled(ChunkChoice, index=index, delta=delta, finish_reason=None) for delta in deltas]
        if found and (parts or last):
            if self.body.logprobs:
                found[-1].logprobs = filled(ChoiceLogprobs, content=state.logprobs)
                state.logprobs = []
            if self.body.return_token_ids:
                found[-1].token_ids, state.token_ids = state.token_ids, []
        if last:
            found[-1].finish_reason = self.finish_reason(piece, state.reader.num_calls)
            if piece.finish_reason == "timeout":
                found[-1].stop_reason = "timeout"
            self.ended.append(piece.usage)
        return found


def calls_of(parts: Sequence[Part]) -> list[tuple[Part, str]]:
    """Each call with its whole arguments."""
    calls: list[tuple[Part, str]] = []
    for part in parts:
        if part.kind == "call":
            calls.append((part, ""))
        elif part.kind == "arguments":
            calls[-1] = (calls[-1][0], calls[-1][1] + part.text)
    return calls


def delta_of(part: Part) -> ChoiceDelta:
    """One part as a piece of a message."""
    if part.kind == "content":
        return filled(ChoiceDelta, content=part.text)
    if part.kind == "reasoning":
        return filled(ChoiceDelta, reasoning_content=part.text, reasoning=part.text)
    if part.kind == "call":
        call = ChoiceDeltaToolCall(
            index=part.index, id=part.id, type="function",
            function=ChoiceDeltaToolCallFunction(name=part.text, arguments=""),
        )  # fmt: skip
    else:
        call = ChoiceDeltaToolCall(index=part.index, function=ChoiceDeltaToolCallFunction(arguments=part.text))
    return filled(ChoiceDelta, tool_calls=[call])


def add_routes(router: APIRouter, serving: Serving, extra: dict[str, Any]) -> None:
    """`extra`: what FastAPI is told about the body."""

    @router.post("/v1/chat/completions", openapi_extra=extra, response_model=None, tags=["answers"])
    async def chat_completions(request: Request) -> Response:
        """Answer a chat."""
        return await respond(serving, request, ChatRequest, _Chat)
