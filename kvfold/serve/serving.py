"""What all endpoints share: one engine, its tokenizer and template, the requests in flight, and the checks of each."""

import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import Request

from kvfold.engine.engine import Engine, Piece
from kvfold.errors import UserError
from kvfold.serve import watch
from kvfold.serve.errors import ApiError
from kvfold.serve.fields import Base
from kvfold.serve.jobs import Job, Jobs
from kvfold.serve.metrics import Metrics
from kvfold.serve.prompts import ChatTemplate
from kvfold.serve.settings import ServerSettings
from kvfold.serve.structured import check_structured
from kvfold.serve.tokens import Tokens

log = logging.getLogger("kvfold.serve")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:+/=-]{1,128}")


class Serving:
    """One engine behind one server."""

    def __init__(self, engine: Engine, settings: ServerSettings):
        """Raises `UserError` where the engine has no tokenizer."""
        if engine.tokenizer is None:
            raise UserError("a server needs a tokenizer, and the engine has none: load one and give it to the engine")
        self.engine, self.settings = engine, settings
        self.methods = watch.methods(engine)
        context = watch.context_tokens(engine)
        asked = settings.max_model_len
        if asked is not None and context is not None and asked > context:
            raise UserError(f"max_model_len must be at most the model's context of {context} tokens, got {asked}")
        self.max_model_len = asked or context or 1 << 31
        self.tokens = Tokens(engine.tokenizer, self.max_model_len)
        self.template = ChatTemplate(self.tokens, settings.chat_template)
        self.metrics = Metrics(settings.model_names[0])
        self.jobs = Jobs(engine, settings, self.metrics.saw)
        self.created = int(time.time())
        self.full_bytes_per_token = watch.full_bytes_per_token(engine)

    # -- one request ---------------------------------------------------------------------------------------------

    def check(self, body: Base) -> str:
        """The model's name as this client calls it. Raises `ApiError` for another model and for what can't be honoured."""
        body.refuse_unsupported()
        name = self.model_name(body.model)
        for field in ("logprobs", "top_logprobs", "prompt_logprobs"):
            value = getattr(body, field, None)
            if value is not None and value is not True and not 0 <= value <= self.settings.max_logprobs:
                raise ApiError(
                    400,
                    f"{field} must be at least 0 and at most {self.settings.max_logprobs}, got {value}",
                    param=field,
                )
        return name

    def model_name(self, name: str | None) -> str:
        """A served name, the first where none is asked for. Raises `ApiError` for others."""
        names = self.settings.model_names
        if name is not None and name not in names:
            raise ApiError(
                404,
                f"model must be one of {', '.join(names)}, got {name[:80]!r}",
                param="model",
                code="model_not_found",
            )
        return name or names[0]

    def request_id(self, request: Request, body: Base | None = None) -> str:
        """The client's own name for its request, or a new one."""
        for name in (body.request_id if body else None, request.headers.get("x-request-id")):
            if name and _REQUEST_ID.fullmatch(name):
                return name
        return secrets.token_hex(12)

    def asked(
        self, sampling: Mapping[str, Any], ids: Sequence[int], *, default_max_tokens: int | None
    ) -> dict[str, Any]:
        """The engine's request for one prompt. Raises `ApiError` where prompt and answer don't fit into the context."""
        room = self.max_model_len - len(ids)
        if room < 1:
            raise self.tokens.too_long(len(ids))
        asked = {"max_tokens": default_max_tokens, **sampling, "prompt": list(ids)}
        most = asked["max_tokens"]
        if most is None and self.max_model_len == (watch.context_tokens(self.engine) or self.max_model_len):
            pass  # all that context and memory allow is the engine's own reading
        elif most is None:
            asked["max_tokens"] = room
        elif isinstance(most, int) and most > room:
            raise ApiError(
                400, f"max_tokens must be at most {room} behind a prompt of {len(ids)} tokens in a context of "
                f"{self.max_model_len}, got {most}", param="max_tokens", code="context_length_exceeded",
            )  # fmt: skip
        asked["timeout"] = self.settings.request_timeout_s
        check_structured(asked)
        return asked

    def log_text(self, name: str, what: str, text: object) -> None:
        """Prompts and answers are logged only where the operator asked for it."""
        if self.settings.log_requests:
            log.info("%s %s %r", name, what, text)

    async def batches(self, job: Job, ping_s: float | None = None) -> AsyncIterator[list[tuple[int, Piece]]]:
        """`Job.batches`; raises `ApiError` for an answer that failed."""
        async for batch in job.batches(ping_s):
            for _, piece in batch:
                if piece.finish_reason in ("error", "abort"):
                    raise self.failure(piece)
            yield batch

    def failure(self, piece: Piece) -> ApiError:
        """Why an answer ended without being one."""
        if piece.finish_reason == "abort":
            return ApiError(503, "the server is stopping: the answer was cut off", headers={"Retry-After": "10"})
        message = piece.error or "the engine failed"
        broken = message.startswith("the model failed") or watch.failure(self.engine) is not None
        return ApiError(500 if broken else 400, message)


def finish_reason(piece: Piece) -> str:
    """As OpenAI's API says it: an answer whose time was over was cut off like one whose tokens were."""
    return "stop" if piece.finish_reason == "stop" else "length"
