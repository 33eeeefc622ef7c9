"""The web application around one engine: every endpoint and what FastAPI is told of it; and `kvfold serve`, from what was typed
to a server that answers until it is told to stop. What runs it is in `http.py`.
"""

import gc
import json
import logging
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.types import ASGIApp

import kvfold
from kvfold.engine.engine import Engine
from kvfold.errors import UserError, one_line
from kvfold.models.load import load, load_tokenizer
from kvfold.serve import fields, watch
from kvfold.serve.answers import Call, MessageCall, TextCall, respond
from kvfold.serve.fields import Base, read
from kvfold.serve.http import Guard, Server
from kvfold.serve.replies import ApiError, add_handlers, invalid
from kvfold.serve.responses import ResponseCall
from kvfold.serve.serving import ServerSettings, Serving

log = logging.getLogger("kvfold.serve")
_ANSWERS: tuple[tuple[str, str, type[Base], type[Call], str], ...] = (
    ("/v1/completions", "completions", fields.CompletionRequest, TextCall, "Continue one text or several."),
    ("/v1/chat/completions", "chat_completions", fields.ChatRequest, MessageCall, "Answer a chat."),
    ("/v1/responses", "responses", fields.ResponsesRequest, ResponseCall, "Answer a conversation, item by item."),
)
"""Path, name, body, what answers it, and what it does."""
_ERRORS = {
    "400": "A field is malformed or not supported", "401": "The key is missing or wrong", "403": "Another origin or host",
    "404": "No such model", "408": "The body came too slowly", "413": "The body is too large",
    "415": "The body is no JSON", "429": "Too many requests wait", "503": "The server is stopping",
}  # fmt: skip


def create_app(engine: Engine, settings: ServerSettings) -> FastAPI:
    """The application. `app.state.serving` is what its endpoints share. Raises `UserError` where engine and settings
    don't fit together.
    """
    serving = Serving(engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        serving.close()

    app = _GuardedApp(
        title="kvfold", version=kvfold.__version__, max_body_size=settings.max_body_bytes, lifespan=lifespan,
        redoc_url=None, docs_url=None, generate_unique_id_function=lambda route: route.name,
    )  # fmt: skip
    app.state.serving = serving
    add_handlers(app)
    for add_routes in (_add_answers, _add_models, _add_tokens, _add_health, watch.add_routes):
        add_routes(app, serving)
    return app


class _GuardedApp(FastAPI):
    """Guarded outside of FastAPI's own middleware, so that no response leaves unseen."""

    def build_middleware_stack(self) -> ASGIApp:
        """See Starlette."""
        serving: Serving = self.state.serving
        return Guard(super().build_middleware_stack(), serving.settings, serving.metrics.responded)


def _takes(kind: type[BaseModel]) -> dict[str, Any]:
    """For the OpenAPI schema: the body that an endpoint reads itself, and how it can fail."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    schema = _inlined(schema, schema.pop("$defs", {}))
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"requestBody": body, "responses": {status: {"description": text} for status, text in _ERRORS.items()}}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inlined(one, definitions) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    return {key: _inlined(value, definitions) for key, value in schema.items()}


def _add_answers(app: FastAPI, serving: Serving) -> None:
    def answered(kind: type[Base], call: type[Call]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            return await respond(serving, request, kind, call)

        return answer

    for path, name, kind, call, text in _ANSWERS:
        app.add_api_route(
            path, answered(kind, call), methods=["POST"], name=name, description=text, openapi_extra=_takes(kind),
            response_model=None, tags=["answers"],
        )  # fmt: skip


def _add_models(app: FastAPI, serving: Serving) -> None:
    def model(name: str) -> dict[str, Any]:
        return {
            "id": name, "created": serving.created, "object": "model", "owned_by": "kvfold",
            "root": serving.settings.model_names[0], "max_model_len": serving.max_model_len,
            "kvfold": {"methods": list(serving.engine.methods)},
        }  # fmt: skip

    @app.get("/v1/models", tags=["models"])
    async def models() -> dict[str, Any]:
        """The names under which the model may be asked for."""
        return {"object": "list", "data": [model(name) for name in serving.settings.model_names]}

    @app.get("/v1/models/{name:path}", tags=["models"], responses={404: {"description": "No such model"}})
    async def model_of(name: str) -> dict[str, Any]:
        """One of them."""
        return model(serving.model_name(name))

    async def no_embeddings() -> None:
        """Not what this server's model is for."""
        message = "this model generates text and gives no embeddings: use a server with an embedding model"
        raise ApiError(400, message, code="unsupported_endpoint")

    for path in ("/v1/embeddings", "/embeddings", "/v1/rerank", "/v1/score", "/pooling", "/classify"):
        name = path.strip("/").replace("/", "_")
        app.add_api_route(
            path, no_embeddings, methods=["POST"], name=name, include_in_schema=path == "/v1/embeddings", tags=["models"],
            responses={400: {"description": "This model gives none"}}, response_model=None,
        )  # fmt: skip


def _add_tokens(app: FastAPI, serving: Serving) -> None:
    @app.post("/tokenize", openapi_extra=_takes(fields.TokenizeRequest), response_model=None, tags=["tokens"])
    async def tokenize(request: Request) -> JSONResponse:
        """Token ids of a text or a chat."""
        body = await read(request, fields.TokenizeRequest, serving.settings.body_timeout_s)
        serving.model_name(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "the body must have a prompt or messages, one of the two")

        def ids() -> list[int]:
            if body.prompt is not None:
                return serving.tokens.encode(body.prompt, special=body.add_special_tokens is not False)
            return serving.template.render(body, body.tools or ())[0]

        found = await serving.prepare(ids, characters=len(body.prompt or "") or 1 << 20)
        texts = [serving.tokens.text_of(one) for one in found] if body.return_token_strs else None
        answer = {"count": len(found), "max_model_len": serving.max_model_len, "tokens": found, "token_strs": texts}
        return JSONResponse(answer)

    @app.post("/detokenize", openapi_extra=_takes(fields.DetokenizeRequest), response_model=None, tags=["tokens"])
    async def detokenize(request: Request) -> JSONResponse:
        """The text of token ids."""
        body = await read(request, fields.DetokenizeRequest, serving.settings.body_timeout_s)
        serving.model_name(body.model)
        most, vocab = serving.max_model_len, serving.tokens.vocab_size
        if not isinstance(body.tokens, list) or len(body.tokens) > most:
            raise invalid("tokens", f"tokens must be a list of at most {most} token ids")
        if not all(type(one) is int and 0 <= one < vocab for one in body.tokens):
            raise invalid("tokens", f"tokens must hold token ids from 0 to {vocab - 1}")
        return JSONResponse({"prompt": serving.tokens.decode(body.tokens)})


def _add_health(app: FastAPI, serving: Serving) -> None:
    async def alive() -> Response:
        """Status 200 while requests are taken, 503 once they are not."""
        broken = "the server is stopping" if serving.stopping else serving.engine.stopped
        if broken is not None:
            raise ApiError(503, broken)
        return Response(status_code=200)

    app.add_api_route("/health", alive, methods=["GET"], name="health", tags=["server"])
    app.add_api_route("/ping", alive, methods=["GET"], name="ping", tags=["server"])
    app.add_api_route("/ping", alive, methods=["POST"], include_in_schema=False)

    @app.get("/version", tags=["server"])
    async def version() -> dict[str, str]:
        """This server's version."""
        return {"version": kvfold.__version__}

    @app.get("/load", tags=["server"])
    async def load() -> dict[str, int]:
        """Answers being made or waiting."""
        return {"server_load": serving.answers}


DEMO_METHODS = ("dms:128", "full", "window:171+4", "h2o:87+88", "tova:175")
"""What `--demo` loads: the gates that come with kvfold, nothing folded, and methods that need no gates."""
DEMO_ADAPTER = "smollm2-135m-dms-4x"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def serve(
    model: str | None, *, demo: Path | None = None, host: str = "127.0.0.1", port: int = 8000,
    api_key: Sequence[str] = (), served_model_name: Sequence[str] = (), max_model_len: int | None = None,
    max_num_seqs: int = 256, max_num_batched_tokens: int = 512, chat_template: str | None = None,
    generation_config: str = "auto", dtype: str | None = None, device: str | None = None, kv_memory: str = "2GB",
    method: Sequence[str] = (), adapter: str | None = None, say: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Serve until SIGINT or SIGTERM. The names are vLLM's.

    `demo`: the file of a small model, served with the gates that come with kvfold, where no `model` is named. `method`: text
    forms that requests may name, the first is the default; none = the model's own. `chat_template`: a file, or the template
    itself. `api_key`: none = the words of the environment's KVFOLD_API_KEY. `generation_config`: `auto` takes sampling
    defaults from the checkpoint, `vllm` takes none, anything else is a folder or file to take them from. `say` is told
    where the server listens. Raises `UserError`, in one line, for whatever can't be served.
    """
    if device and "," in device:
        raise UserError(
            "serving takes 1 device, got several: run a server on each device, or a layout that vLLM knows under vLLM"
        )
    if (model is None) == (demo is None):
        raise UserError("serve needs a model or --demo, one of the two: give a folder, a .gguf file or a hub name")
    source = str(model or demo)
    if demo is not None:
        adapter, method = adapter or DEMO_ADAPTER, method or DEMO_METHODS
    keys = tuple(api_key) or tuple(os.environ.get("KVFOLD_API_KEY", "").split())
    settings = ServerSettings(
        model_names=tuple(served_model_name), host=host, port=port, api_keys=keys, max_model_len=max_model_len,
        chat_template=_template(chat_template),
    )  # fmt: skip
    _set_up_log()
    loaded, tokenizer = load(source, adapter=adapter, dtype=dtype, device=device), load_tokenizer(source)
    settings = replace(settings, defaults=generation_defaults(generation_config, loaded, source))
    if not settings.is_local and not settings.api_keys:
        log.warning("%s is open to everybody who reaches it: --api-key lets in only who knows the key", host)
    with Engine(
        loaded, tokenizer, kv_memory, list(method) or None, max_running=max_num_seqs,
        prefill_tokens=max_num_batched_tokens,
    ) as engine:  # fmt: skip
        server = Server(create_app(engine, settings), say)
        gc.collect()
        gc.freeze()  # what is loaded by now stays: no collection between two steps needs to look at it
        try:
            server.run()
        except KeyboardInterrupt:
            log.info("stopped")


def _set_up_log() -> None:
    """Log lines go to stderr: when, what, nothing else. Nobody's text is among them unless it was asked for."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for name, level in (("kvfold.serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def generation_defaults(choice: str, model: Any, source: str) -> dict[str, Any]:
    """Sampling fields that a checkpoint recommends. Raises `UserError` for a `choice` that can't be read."""
    if choice == "vllm":
        return {}
    path = Path(source if choice == "auto" else choice)
    path = path if choice != "auto" and path.is_file() else path / "generation_config.json"
    if choice == "auto" and not path.is_file():
        recommended = model.generation_config.to_diff_dict() if model.generation_config is not None else {}
    else:  # transformers writes what it was loaded with into the model; a folder's own file says what its authors meant
        try:
            recommended = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"generation_config {path} must be a file with a JSON object: {one_line(error)}") from None
    defaults = {name: recommended[name] for name in (*_SAMPLING, "max_new_tokens") if recommended.get(name) is not None}
    return {"max_tokens" if name == "max_new_tokens" else name: value for name, value in defaults.items()}


def _template(given: str | None) -> str | None:
    """The template's text: a file's, or what was given itself."""
    if given is None or "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"chat_template {given}: no such file, and no template ({error})") from None
