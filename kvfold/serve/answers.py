"""One request from its checked fields to its response: a place in the queue, the engine, a stream or a whole answer; and what
the answer cost, in OpenAI's counts and by what the cache saw and kept.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import Response
from openai.types import CompletionUsage
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails
from pydantic import BaseModel

from kvfold.engine.request import Usage
from kvfold.serve.body import read
from kvfold.serve.errors import ApiError, log_failure
from kvfold.serve.serving import Job, Serving
from kvfold.serve.streaming import DONE, Stream, error_event, unless_gone


class Asked(Protocol):
    """One request to one endpoint."""

    answers: int
    """Its prompts times its `n`."""
    characters: int
    """How much there is to prepare, roughly."""

    def submit(self, job: Job) -> None:
        """Make token ids and hand them to the engine; on a worker thread."""

    async def answer(self, job: Job) -> BaseModel:
        """The whole answer."""

    def events(self, job: Job) -> AsyncIterator[bytes]:
        """The answer as events."""


async def respond(
    serving: Serving, request: Request, kind: type[BaseModel], asked_of: Callable[[Serving, Any, str, str], Asked]
) -> Response:
    """The response to a body of one kind, whole or as a stream. `asked_of`: from the body, the model's name and the request's id
    what is asked. Raises `ApiError` for what is refused before an answer begins.
    """
    body = await read(request, kind, serving.settings.body_timeout_s)
    model, name, stream = serving.check(body), serving.request_id(request, body), bool(body.stream)
    asked = asked_of(serving, body, model, name)
    job = serving.jobs.open(name, asked.answers, streams=stream)
    headers = {"X-Request-Id": name}
    handed_over = False
    try:
        await serving.jobs.prepare(lambda: asked.submit(job), characters=asked.characters)
        if stream:
            response = Stream(_until_done(asked, job), leave=lambda: serving.jobs.leave(job), headers=headers)
            handed_over = True
            return response
        answer = await unless_gone(request, asked.answer(job))
        return Response(answer.model_dump_json(exclude_unset=True), media_type="application/json", headers=headers)
    finally:
        if not handed_over:
            serving.jobs.leave(job)


async def _until_done(asked: Asked, job: Job) -> AsyncIterator[bytes]:
    try:
        async for one in asked.events(job):
            yield one
    except ApiError as error:
        yield error_event(error)
    except Exception as error:
        log_failure(error)
        yield error_event(ApiError(500, "the server failed; its log says more"))
    yield DONE


def usage_of(
    prompt_tokens: int, completion_tokens: int, ended: Sequence[Usage] = (), *, reasoning_tokens: int | None = None
) -> CompletionUsage:
    """`ended`: of all answers to the request that have ended. Under `kvfold`: tokens seen, tokens kept (the mean over KV
    heads) and bytes held at the end, summed over answers, and how many times fewer were kept than seen.
    """
    seen, kept = sum(one.seen_tokens for one in ended), sum(one.kept_tokens for one in ended)
    details = None if reasoning_tokens is None else CompletionTokensDetails(reasoning_tokens=reasoning_tokens)
    usage = CompletionUsage(
        prompt_tokens=prompt_tokens, completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=max((one.cached_tokens for one in ended), default=0)),
        completion_tokens_details=details,
    )  # fmt: skip
    if ended:
        usage.kvfold = {
            "seen_tokens": seen, "kept_tokens": round(kept, 2), "kv_bytes": sum(one.kv_bytes for one in ended),
            "compression": round(seen / kept, 3) if kept else None,
        }  # fmt: skip
    return usage
