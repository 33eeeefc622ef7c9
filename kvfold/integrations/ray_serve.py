"""kvfold under plain Ray. For Ray Serve: a front that speaks HTTP, and as many engines behind it as there is room and need for.
For Ray Data: a dataset of requests, answered by a pool of engines.

The front reads a request, names its prompt for the router and passes on what the chosen replica answers. A replica is an
engine with the whole application of kvfold.serve mounted on it, called without a socket (replicas.py). `serve run` builds it
from a file: examples/serve-ray.yaml. Routers and policies are alpha in Ray; the policy is loaded in Serve's controller and
lives in replicas.py, where it brings no torch. Nothing here is imported unless Ray is there.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, get_origin

from pydantic import ConfigDict, ValidationError, create_model
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from kvfold.engine.engine import Engine
from kvfold.errors import UserError
from kvfold.integrations.replicas import Call, FreePages, Part, PrefixMemory, answered, chain, prompt_bytes, ranked
from kvfold.integrations.vllm import warn_untested
from kvfold.layout.planner import parse_size
from kvfold.models.adapters import read_adapter
from kvfold.models.load import load, load_config, load_tokenizer
from kvfold.serve import watch
from kvfold.serve.app import create_app
from kvfold.serve.replies import DONE, ApiError, busy, error_event
from kvfold.serve.serving import ServerSettings

if TYPE_CHECKING:
    from pyarrow import Table
    from ray.data import Dataset

TESTED = ("2.60", "2.61")
"""Ray versions that this is tested with: from the first, below the second."""

SLACK = 8
"""A replica with so many requests more than the least loaded is not sent more for its prefixes' sake."""

FORWARDED = ("/v1/", "/tokenize", "/detokenize", "/health", "/ping", "/version")
"""Paths that mean the same whichever replica answers. The others tell of one replica alone."""

REPLICA = "x-kvfold-replica"
"""Response header that names the replica."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RaySettings:
    """What `args` of an application may say."""

    model: str
    """A folder, a .gguf file or a hub name, there on every machine."""
    adapter: str | None = None
    """Gates to load with it, by name or folder."""
    methods: tuple[str, ...] = ()
    """Text forms of methods along time that requests may name, the first is the default; none = the model's own."""
    kv_memory: str = "2GB"
    """For keys and values of one replica."""
    dtype: str | None = None
    """The model's; None = the checkpoint's."""
    device: str | None = None
    """Where a replica runs; None = a GPU where it is given one, else the CPU."""
    max_num_seqs: int = 256
    """Requests that run at once in one replica."""
    replicas: int = 1
    """Engines to begin with, and the fewest."""
    max_replicas: int | None = None
    """Engines at most; None = as many as `replicas`, always."""
    target_use: float = 0.7
    """Where there may be more: the share of its KV memory that a replica should have in use or in demand."""
    fronts: int = 1
    """Processes that speak HTTP."""
    cpus: float = 1.0
    """CPUs that Ray sets aside for a replica."""
    gpus: float = 0.0
    """GPUs that Ray sets aside for a replica: 0 or 1."""
    route_by_prefix: bool = True
    """Send a request where its beginning was sent before; false = Serve's own router, by load alone."""
    slack: int = SLACK
    """Requests that a replica may have more than the least loaded before prefixes count no more."""
    health_period_s: float = 5.0
    """Seconds between two questions whether a replica's engine still runs."""
    server: Mapping[str, Any] = field(default_factory=dict)
    """Other settings of the server, as in `ServerSettings`: `host`, which must be the address that Ray listens on, `api_keys`,
    `max_queue`, `request_timeout_s` and so on."""

    def __post_init__(self) -> None:
        most = self.replicas if self.max_replicas is None else self.max_replicas
        if not 1 <= self.replicas <= most:
            raise UserError(f"replicas must be at least 1 and at most max_replicas, got {self.replicas} and {most}")
        if not 0 < self.target_use <= 1:
            raise UserError(f"target_use must be over 0 and at most 1, got {self.target_use} (for example 0.7)")
        if self.gpus not in (0, 1):
            raise UserError(f"gpus must be 0 or 1, got {self.gpus}: an engine runs on one device")
        if self.slack < 1:
            raise UserError(f"slack must be at least 1, got {self.slack} (for example 8)")
        parse_size(self.kv_memory)
        self.server_settings()

    @classmethod
    def parse(cls, args: Mapping[str, Any]) -> "RaySettings":
        """From the `args` of a file. Raises `UserError`, in one line, for what can't be meant."""
        if "model" not in args:
            raise UserError("args of kvfold under Ray Serve need a model: give a folder, a .gguf file or a hub name")
        return cls(**_understood(cls, args, "args"))

    def server_settings(self) -> ServerSettings:
        """Those of a replica's application."""
        named = {"model_names": (os.path.basename(self.model.rstrip("/")),)}
        return ServerSettings(**(named | _understood(ServerSettings, self.server, "server")))


def _understood(kind: type, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a file gives for the fields of a dataclass, lists as tuples. Raises `UserError` for an unknown name, or a value of
    another kind than the field's.
    """
    known = {one.name: one.type for one in fields(kind)}
    values = dict(given)
    for name, value in given.items():
        if get_origin(known.get(name)) is tuple and isinstance(value, str | list):
            values[name] = (value,) if isinstance(value, str) else tuple(value)
    rules = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    forms: dict[str, Any] = {name: (one, None) for name, one in known.items()}
    shape = create_model(kind.__name__, __config__=rules, **forms)
    try:
        shape.model_validate(values)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        what = f"{where} of kvfold under Ray Serve: {wrong['loc'][0]}: {wrong['msg'].lower()}"
        unknown = wrong["type"] == "extra_forbidden"
        raise UserError(
            what + (f": use {', '.join(sorted(known))}" if unknown else f", got {wrong['input']!r}")
        ) from None
    return values


class Replica:
    """One engine."""

    def __init__(self, settings: Mapping[str, Any]):
        """`settings`: fields of `RaySettings`. Raises `UserError` for what can't be loaded."""
        wanted = RaySettings.parse(settings)
        device = wanted.device or ("cuda" if wanted.gpus else None)
        model = load(wanted.model, adapter=wanted.adapter, dtype=wanted.dtype, device=device)
        self.engine = Engine(
            model, load_tokenizer(wanted.model), wanted.kv_memory, list(wanted.methods) or None,
            max_running=wanted.max_num_seqs,
        )  # fmt: skip
        self.app = create_app(self.engine, wanted.server_settings())
        self._name = serve.get_replica_context().replica_id.unique_id

    async def answer(self, call: Call) -> AsyncIterator[Part]:
        """The application's response. Cancelled, the engine stops working for it."""
        async for part in answered(self.app, call):
            if part.status:
                part = replace(part, headers=(*part.headers, (REPLICA.encode(), self._name.encode())))
            yield part

    async def about(self) -> dict[str, Any]:
        """Who this replica is, and where its engine stands."""
        return {"replica": self._name, "pid": os.getpid(), **self.engine.stats()}

    def check_health(self) -> None:
        """Ray asks from time to time, and puts another in the place of a replica that raises."""
        if self.engine.stopped is not None:
            raise RuntimeError(f"the engine takes no requests: {self.engine.stopped}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For `FreePages`: bytes held by running requests and wanted by waiting ones, as a share of the pool."""
        demand = await watch.on_engine(self.engine, lambda: watch.demand_bytes(self.engine))
        return {"pool_use": (demand or 0) / self.engine.stats()["pool_bytes"]}

    def __del__(self) -> None:
        """Ray's word for the end of a replica's life."""
        if hasattr(self, "app"):
            self.app.state.serving.close()
            self.engine.close()


class Front:
    """What clients talk to. It has no model."""

    def __init__(self, replicas: DeploymentHandle, settings: Mapping[str, Any]):
        self._replicas = replicas.options(method_name="answer", stream=True)
        self._limits = RaySettings.parse(settings).server_settings()

    async def __call__(self, request: Request) -> Response:
        """A replica's response, or an error in OpenAI's form that says whether to try again."""
        try:
            if not request.url.path.startswith(FORWARDED):
                raise ApiError(404, f"no such page: {request.url.path}")
            return await self._passed_on(await self._call(request))
        except ApiError as error:
            return error.response()

    async def _call(self, request: Request) -> Call:
        limits, body = self._limits, bytearray()
        try:
            async with asyncio.timeout(limits.body_timeout_s):
                async for more in request.stream():
                    body += more
                    if len(body) > limits.max_body_bytes:
                        raise ApiError(413, f"the body must have at most {limits.max_body_bytes} bytes")
        except TimeoutError:
            raise ApiError(408, f"the body must arrive within {limits.body_timeout_s:g} seconds") from None
        except ClientDisconnect:
            raise ApiError(400, "the client left before its request was whole") from None
        path, whole = request.url.path, bytes(body)
        return Call(
            method=request.method, path=path, query=request.url.query.encode(), headers=tuple(request.headers.raw),
            body=whole, prompt=prompt_bytes(path, whole) if whole else b"",
        )  # fmt: skip

    async def _passed_on(self, call: Call) -> Response:
        stream = self._replicas.remote(call)
        try:
            first = await anext(stream)
        except (RayError, RayServeException) as error:
            raise lost(error) from error
        except asyncio.CancelledError:
            stream.cancel()
            raise
        response = StreamingResponse(_rest(first, stream), first.status)
        response.raw_headers = [one for one in first.headers if one[0].lower() != b"content-length"]
        return response


async def _rest(first: Part, stream: Any) -> AsyncIterator[bytes]:
    """The body; where a replica dies in between, a stream of events ends with the error as its last event."""
    whole = False
    try:
        yield first.body
        async for part in stream:
            yield part.body
        whole = True
    except (RayError, RayServeException) as error:
        whole = True
        if not any(name.lower() == b"content-type" and b"event-stream" in value for name, value in first.headers):
            raise
        yield error_event(lost(error))
        yield DONE
    finally:
        if not whole:
            stream.cancel()


def lost(error: Exception) -> ApiError:
    """What a client is told whose replica did not answer. It may ask again: the next replica knows nothing of the request."""
    if isinstance(error, BackPressureError):
        return busy(429, "all replicas are full: try again in 1 second", 1)
    if isinstance(error, DeploymentUnavailableError):
        return busy(503, "no replica can be started: see Ray Serve's log", 10)
    return ApiError(
        503, "the replica that worked on this request was lost: ask again", code="replica_lost", headers={"Retry-After": "1"}
    )  # fmt: skip


class PrefixRouter(RequestRouter):
    """Sends a request where most of its prompt was sent before, unless that replica is crowded.

    Each router knows what it sent itself. Where it knows nothing, a hash decides, the same in all routers.
    """

    def initialize_state(self, slack: int = SLACK) -> None:
        """See Ray."""
        self._slack, self._memory = slack, PrefixMemory()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """See Ray. A replica that is gone took its prefixes along."""
        super().update_replicas(replicas)
        self._memory.keep_only(replica.replica_id.unique_id for replica in replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See Ray: one replica a rank, so that the next is asked only when the one before is full."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        loads = {name: self.replica_queue_len_cache.get(one.replica_id) or 0 for name, one in by_id.items()}
        return [[by_id[name]] for name in ranked(self._chain(pending_request), self._memory, loads, self._slack)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """See Ray."""
        self._memory.note(self._chain(pending_request), replica_id.unique_id)

    def _chain(self, request: PendingRequest | None) -> tuple[bytes, ...]:
        """Keys of what the front named as the request's prompt; none for calls of another kind."""
        call = request.args[0] if request is not None and request.args else None
        return chain(getattr(call, "prompt", b""))


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application, as `import_path: kvfold.integrations.ray_serve:build` names it in a file for `serve run`.

    `args`: fields of `RaySettings`. Raises `UserError`, in one line, for settings that can't be meant and for a model
    or an adapter that can't be read.
    """
    warn_untested("Ray", ("ray",), TESTED)
    wanted = RaySettings.parse(args)
    layout = load_config(wanted.model).layout
    if wanted.adapter is not None:
        read_adapter(wanted.adapter)
    for text in wanted.methods:
        layout.with_time(text)
    given, most = asdict(wanted), wanted.max_replicas or wanted.replicas
    room = wanted.max_num_seqs + wanted.server_settings().max_queue
    options: dict[str, Any] = {}
    if wanted.route_by_prefix:
        options["request_router_config"] = RequestRouterConfig(
            request_router_class=PrefixRouter, request_router_kwargs={"slack": wanted.slack}
        )
    if most > wanted.replicas:
        policy = AutoscalingPolicy(policy_function=FreePages, policy_kwargs={"target_use": wanted.target_use})
        options["autoscaling_config"] = AutoscalingConfig(
            min_replicas=wanted.replicas, max_replicas=most, policy=policy, metrics_interval_s=2, look_back_period_s=6,
            upscale_delay_s=4, downscale_delay_s=120,
        )  # fmt: skip
    else:
        options["num_replicas"] = wanted.replicas
    replica = serve.deployment(
        Replica, name="Replica", max_ongoing_requests=room, health_check_period_s=wanted.health_period_s,
        ray_actor_options={"num_cpus": wanted.cpus, "num_gpus": wanted.gpus}, **options,
    )  # fmt: skip
    front = serve.deployment(
        Front, name="Front", num_replicas=wanted.fronts, max_ongoing_requests=most * room,
        ray_actor_options={"num_cpus": 0},
    )  # fmt: skip
    return front.bind(replica.bind(given), given)


def answered_dataset(
    requests: "Dataset", model: str, *, engines: int = 1, batch_rows: int = 256, kv_memory: str = "2GB",
    methods: Sequence[str] = (), adapter: str | None = None, max_running: int = 256, cpus: float = 1.0, gpus: float = 0.0,
) -> "Dataset":  # fmt: skip
    """`requests`: a column for each of OpenAI's field names (`prompt` or `messages`, `max_tokens`, ...); a field that a row
    leaves empty is not said. Gives all columns and `text`, `finish_reason`, `error`, `prompt_tokens`, `completion_tokens`; what
    is wrong with a row stands in its `error`, and the others go on.

    `batch_rows`: requests that an engine gets at once; more than `max_running`, so that it is never short of work. A batch of
    an engine that dies is answered again by another.
    """
    from ray.data import ActorPoolStrategy

    options = {"kv_memory": kv_memory, "methods": tuple(methods) or None, "max_running": max_running}
    return requests.map_batches(
        _Answering, batch_format="pyarrow", batch_size=batch_rows, num_cpus=cpus, num_gpus=gpus,
        compute=ActorPoolStrategy(size=engines), fn_constructor_args=(model, adapter, "cuda" if gpus else None, options),
    )  # fmt: skip


class _Answering:
    """One engine of the pool."""

    def __init__(self, model: str, adapter: str | None, device: str | None, options: dict[str, Any]):
        self._engine = Engine(load(model, adapter=adapter, device=device), load_tokenizer(model), **options)

    def __call__(self, batch: "Table") -> "Table":
        from pyarrow import array, table

        answers = self._engine.generate([_said(row) for row in batch.to_pylist()])
        columns = {name: batch[name] for name in batch.column_names}
        # Columns that may be empty in all rows of a batch have their type all the same, so that batches fit together.
        for name in ("text", "finish_reason", "error"):
            columns[name] = array([getattr(one, name) for one in answers], "string")
        for name in ("prompt_tokens", "completion_tokens"):
            columns[name] = array([getattr(one.usage, name, 0) for one in answers], "int64")
        return table(columns)


def _said(value: Any) -> Any:
    """Without the fields that are empty: a table has them in every row, and in every message of it."""
    if isinstance(value, dict):
        return {name: _said(one) for name, one in value.items() if one is not None}
    return [_said(one) for one in value] if isinstance(value, list) else value
