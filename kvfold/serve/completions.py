"""/v1/completions: texts or token ids in, texts out; several prompts and several answers each."""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from openai.types import Completion, CompletionChoice
from openai.types.completion_choice import Logprobs

from kvfold.engine.engine import Answer, Piece
from kvfold.engine.request import Usage
from kvfold.serve.answers import respond, usage_of
from kvfold.serve.errors import ApiError
from kvfold.serve.fields import CompletionRequest
from kvfold.serve.serving import LONG_CHARACTERS, Job, Serving, finish_reason
from kvfold.serve.streaming import PING, event, filled

DEFAULT_MAX_TOKENS = 16


@dataclass(kw_only=True, slots=True)
class _Choice:
    """One answer to one prompt, as far as it was sent."""

    ids: list[int]
    """The prompt."""
    echo: str = ""
    """What is put before the answer."""
    offset: int = 0
    """Characters before the next token, for log probabilities."""
    num_tokens: int = 0
    begun: bool = False


class _Completion:
    """One request to this endpoint."""

    def __init__(self, serving: Serving, body: CompletionRequest, model: str, name: str):
        self.serving, self.body, self.model, self.id = serving, body, model, f"cmpl-{name}"
        self.created = int(time.time())
        self.prompts = prompts_of(body.prompt)
        self.n = body.n if isinstance(body.n, int) and body.n > 0 else 1
        self.answers = len(self.prompts) * self.n
        self.characters = sum(len(one) for one in self.prompts) + LONG_CHARACTERS * bool(
            body.structured_outputs or body.response_format
        )
        self.choices: list[_Choice] = []
        self.ended: list[Usage] = []

    def submit(self, job: Job) -> None:
        """Tokens of all prompts, then to the engine; on a worker thread."""
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
            ids = prompt
            if isinstance(prompt, str):
                ids = serving.tokens.encode(prompt, special=body.add_special_tokens is not False)
            asked.append(serving.asked(sampling, ids, default_max_tokens=DEFAULT_MAX_TOKENS))
            echo = ""
            if body.echo:
                echo = prompt if isinstance(prompt, str) else serving.tokens.decode(ids)
            self.choices += [_Choice(ids=list(ids), echo=echo) for _ in range(self.n)]
            serving.log_text(self.id, "prompt", prompt)
        job.prompt_tokens = sum(len(one["prompt"]) for one in asked)
        job.submit(asked)

    def choice(self, index: int, piece: Piece | Answer) -> CompletionChoice:
        """What is new of one answer, or the whole."""
        state, body = self.choices[index], self.body
        silent = body.max_tokens == 0
        text = "" if silent else piece.text
        fields: dict[str, Any] = {
            "index": index, "text": text if state.begun else state.echo + text, "logprobs": None, "finish_reason": None,
        }  # fmt: skip
        if body.logprobs is not None:
            fields["logprobs"] = self._logprobs(state, piece, silent)
        if body.prompt_logprobs is not None and not state.begun:
            fields["prompt_logprobs"] = self.serving.tokens.prompt_logprobs(piece.prompt_logprobs)
        if body.return_token_ids:
            fields["token_ids"] = [] if silent else list(piece.token_ids)
            if not state.begun:
                fields["prompt_token_ids"] = state.ids
        state.begun = True
        state.num_tokens += 0 if silent else len(piece.token_ids)
        if piece.finish_reason is not None:
            fields["finish_reason"] = "length" if silent else finish_reason(piece)
            if piece.finish_reason == "timeout":
                fields["stop_reason"] = "timeout"
            self.ended.append(piece.usage)
        return filled(CompletionChoice, **fields)

    def _logprobs(self, state: _Choice, piece: Piece | Answer, silent: bool) -> Logprobs:
        tokens, as_ids = self.serving.tokens, bool(self.body.return_tokens_as_token_ids)
        found = [] if silent else list(piece.logprobs)
        first = None
        if self.body.echo and not state.begun:
            found = [*piece.prompt_logprobs, *found]
            first = state.ids[0]
        logprobs = tokens.completion_logprobs(found, state.offset, first=first, as_ids=as_ids)
        last = [one.token for one in found] or ([first] if first is not None else [])
        if last:
            state.offset = logprobs.text_offset[-1] + len(tokens.text_of(last[-1]))
        return logprobs

    def whole(self, choices: Sequence[CompletionChoice], **extra: Any) -> Completion:
        """One object of the answer."""
        return filled(
            Completion,
            id=self.id,
            object="text_completion",
            created=self.created,
            model=self.model,
            choices=list(choices),
            **extra,
        )

    def usage(self, job: Job) -> Any:
        """So far."""
        return usage_of(job.prompt_tokens, sum(one.num_tokens for one in self.choices), self.ended)

    async def answer(self, job: Job) -> Completion:
        """All answers, once they are whole."""
        found = [Answer() for _ in range(self.answers)]
        async for batch in self.serving.batches(job):
            for index, piece in batch:
                found[index].add(piece)
        choices = [self.choice(index, one) for index, one in enumerate(found)]
        self.serving.log_text(self.id, "answer", [one.text for one in choices])
        return self.whole(choices, usage=self.usage(job))

    async def events(self, job: Job) -> AsyncIterator[bytes]:
        """The same as a stream."""
        options = self.body.stream_options
        always = bool(options and options.continuous_usage_stats)
        async for batch in self.serving.batches(job, self.serving.settings.ping_s):
            if not batch:
                yield PING
            for index, piece in batch:
                chunk = self.whole([self.choice(index, piece)])
                if always:
                    chunk.usage = self.usage(job)
                yield event(chunk)
        if options and options.include_usage:
            yield event(self.whole([], usage=self.usage(job)))


def prompts_of(prompt: Any) -> list[str | list[int]]:
    """The prompts of a request, each a text or token ids. Raises `ApiError`."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        first = prompt[0]
        if isinstance(first, int) and not isinstance(first, bool):
            return [prompt]
        if isinstance(first, str) and all(isinstance(one, str) for one in prompt):
            return prompt
        if isinstance(first, list) and all(isinstance(one, list) for one in prompt):
            return prompt
    raise ApiError(400, "prompt must be a text, token ids, or a list of 1 or more of either", param="prompt")


def add_routes(router: APIRouter, serving: Serving, extra: dict[str, Any]) -> None:
    """`extra`: what FastAPI is told about the body."""

    @router.post("/v1/completions", openapi_extra=extra, response_model=None, tags=["answers"])
    async def completions(request: Request) -> Response:
        """Continue one text or several."""
        return await respond(serving, request, CompletionRequest, _Completion)
