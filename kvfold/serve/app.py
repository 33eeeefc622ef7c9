"""The web application around one engine: every endpoint, its limits, its errors. What runs it is in `http.py`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from openai.types import Model
from pydantic import BaseModel
from starlette.types import ASGIApp

import kvfold
from kvfold.engine.engine import Engine
from kvfold.serve import chat, completions, live, responses, watch
from kvfold.serve.body import read
from kvfold.serve.errors import ApiError, add_handlers
from kvfold.serve.fields import ChatRequest, CompletionRequest, DetokenizeRequest, ResponsesRequest, TokenizeRequest
from kvfold.serve.http import Guard
from kvfold.serve.serving import Serving
from kvfold.serve.settings import ServerSettings


def create_app(engine: Engine, settings: ServerSettings) -> FastAPI:
    """The application. `app.state.serving` is what its endpoints share. Raises `UserError` where engine and settings
    don't fit together.
    """
    serving = Serving(engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        serving.jobs.close()

    app = _GuardedApp(
        title="kvfold", version=kvfold.__version__, max_body_size=settings.max_body_bytes, lifespan=lifespan,
        redoc_url=None, docs_url=None, generate_unique_id_function=lambda route: route.name,
    )  # fmt: skip
    app.state.serving = serving
    add_handlers(app)
    router = APIRouter()
    completions.add_routes(router, serving, takes(CompletionRequest))
    chat.add_routes(router, serving, takes(ChatRequest))
    responses.add_routes(router, serving, takes(ResponsesRequest))
    _add_models(router, serving)
    _add_tokens(router, serving)
    _add_health(router, serving)
    _add_refusals(router)
    live.add_routes(router, serving)
    app.include_router(router)
    return app


class _GuardedApp(FastAPI):
    """Guarded outside of FastAPI's own middleware, so that no response leaves unseen."""

    def build_middleware_stack(self) -> ASGIApp:
        """See Starlette."""
        serving: Serving = self.state.serving
        return Guard(super().build_middleware_stack(), serving.settings, serving.metrics.responded)


def takes(kind: type[BaseModel]) -> dict[str, Any]:
    """For the OpenAPI schema: the body that an endpoint reads itself, and how it can fail."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    schema = _inlined(schema, definitions)
    errors = {str(status): {"description": text} for status, text in (
        (400, "A field is malformed or not supported"), (401, "The key is missing or wrong"),
        (403, "Another origin or host"), (404, "No such model"), (408, "The body came too slowly"),
        (413, "The body is too large"), (415, "The body is no JSON"), (429, "Too many requests wait"),
        (503, "The server is stopping"),
    )}  # fmt: skip
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"requestBody": body, "responses": errors}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inlined(one, definitions) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    return {key: _inlined(value, definitions) for key, value in schema.items()}


def _add_models(router: APIRouter, serving: Serving) -> None:
    def model(name: str) -> dict[str, Any]:
        found = Model(id=name, created=serving.created, object="model", owned_by="kvfold")
        extra = {
            "root": serving.settings.model_names[0], "max_model_len": serving.max_model_len,
            "kvfold": {"methods": list(serving.methods)},
        }  # fmt: skip
        return found.model_dump(exclude_unset=True) | extra

    @router.get("/v1/models", tags=["models"])
    async def models() -> dict[str, Any]:
        """The names under which the model may be asked for."""
        return {"object": "list", "data": [model(name) for name in serving.settings.model_names]}

    @router.get("/v1/models/{name:path}", tags=["models"], responses={404: {"description": "No such model"}})
    async def model_of(name: str) -> dict[str, Any]:
        """One of them."""
        return model(serving.model_name(name))


def _add_tokens(router: APIRouter, serving: Serving) -> None:
    @router.post("/tokenize", openapi_extra=takes(TokenizeRequest), response_model=None, tags=["tokens"])
    async def tokenize(request: Request) -> JSONResponse:
        """Token ids of a text or a chat."""
        body = await read(request, TokenizeRequest, serving.settings.body_timeout_s)
        serving.model_name(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "the body must have a prompt or messages, one of the two")

        def ids() -> list[int]:
            if body.prompt is not None:
                return serving.tokens.encode(body.prompt, special=body.add_special_tokens is not False)
            prompt = serving.template.render(
                body.messages, tools=body.tools or (), kwargs=body.chat_template_kwargs,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=bool(body.continue_final_message),
                add_special_tokens=bool(body.add_special_tokens),
            )  # fmt: skip
            return prompt.ids

        found = await serving.jobs.prepare(ids, characters=len(body.prompt or "") or 1 << 20)
        answer = {"count": len(found), "max_model_len": serving.max_model_len, "tokens": found, "token_strs": None}
        if body.return_token_strs:
            answer["token_strs"] = [serving.tokens.text_of(one) for one in found]
        return JSONResponse(answer)

    @router.post("/detokenize", openapi_extra=takes(DetokenizeRequest), response_model=None, tags=["tokens"])
    async def detokenize(request: Request) -> JSONResponse:
        """The text of token ids."""
        body = await read(request, DetokenizeRequest, serving.settings.body_timeout_s)
        serving.model_name(body.model)
        most, vocab = serving.max_model_len, serving.tokens.vocab_size
        if not isinstance(body.tokens, list) or len(body.tokens) > most:
            raise ApiError(400, f"tokens must be a list of at most {most} token ids", param="tokens")
        if not all(type(one) is int and 0 <= one < vocab for one in body.tokens):
            raise ApiError(400, f"tokens must hold token ids from 0 to {vocab - 1}", param="tokens")
        return JSONResponse({"prompt": serving.tokens.decode(body.tokens)})


def _add_health(router: APIRouter, serving: Serving) -> None:
    engine = serving.engine

    async def alive() -> Response:
        """Status 200 while requests are taken, 503 once they are not."""
        broken = "the server is stopping" if serving.jobs.stopping else watch.failure(engine)
        if broken is not None:
            raise ApiError(503, broken)
        return Response(status_code=200)

    router.add_api_route("/health", alive, methods=["GET"], name="health", tags=["server"])
    router.add_api_route("/ping", alive, methods=["GET"], name="ping", tags=["server"])
    router.add_api_route("/ping", alive, methods=["POST"], include_in_schema=False)

    @router.get("/version", tags=["server"])
    async def version() -> dict[str, str]:
        """This server's version."""
        return {"version": kvfold.__version__}

    @router.get("/load", tags=["server"])
    async def load() -> dict[str, int]:
        """Answers being made or waiting."""
        return {"server_load": serving.jobs.answers}

    @router.get("/metrics", response_model=None, tags=["server"])
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        looked = await watch.on_engine(
            engine, lambda: (watch.pool_use(engine), watch.holdings(engine, watch.running(engine)))
        )
        use, holdings = looked or ({}, [])
        owners = [owner for owner, _ in watch.owners(engine)]
        text = serving.metrics.text(engine.stats(), use, holdings, owners)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.post("/reset_prefix_cache", response_model=None, tags=["server"])
    async def reset_prefix_cache() -> Response:
        """Forget all stored prefixes."""
        await watch.drop_prefixes(engine)
        return Response(status_code=200)


def _add_refusals(router: APIRouter) -> None:
    async def no_embeddings() -> None:
        """Not what this server's model is for."""
        raise ApiError(
            400, "this model generates text and gives no embeddings: use a server with an embedding model",
            code="unsupported_endpoint",
        )  # fmt: skip

    for path in ("/v1/embeddings", "/embeddings", "/v1/rerank", "/v1/score", "/pooling", "/classify"):
        name = path.strip("/").replace("/", "_")
        router.add_api_route(
            path, no_embeddings, methods=["POST"], name=name, include_in_schema=path == "/v1/embeddings", tags=["models"],
            responses={400: {"description": "This model gives none"}}, response_model=None,
        )  # fmt: skip
