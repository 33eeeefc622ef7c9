"""How one server is set up: its name for the model, who may ask, and the limits that keep it answering. No torch."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from kvfold.errors import UserError

_AT_LEAST = {
    "max_model_len": 1,
    "max_body_bytes": 1024,
    "max_queue": 0,
    "max_answers": 1,
    "max_connections": 1,
    "max_logprobs": 0,
}
_POSITIVE = (
    "request_timeout_s", "header_timeout_s", "body_timeout_s", "send_timeout_s", "idle_timeout_s", "ping_s",
    "shutdown_timeout_s",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Everything about a server that is not the engine's business."""

    model_names: tuple[str, ...]
    """Names under which clients may ask for the model; answers carry the first one."""
    host: str = "127.0.0.1"
    """Address to listen on. Only this machine reaches a loopback address."""
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    """A client must send one of these as its bearer token; none = everybody may ask."""
    allowed_origins: tuple[str, ...] = ()
    """Web pages of other origins that may ask, e.g. `https://chat.example.org`; `*` = all."""
    max_model_len: int | None = None
    """Tokens of prompt and answer together, at most; None = the model's context."""
    chat_template: str | None = None
    """A Jinja template in place of the tokenizer's own."""
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Sampling fields that hold where a request names none, such as the generation config's temperature."""
    max_body_bytes: int = 8 << 20
    """Size of a request's body, at most."""
    max_queue: int = 256
    """Answers that may wait for a place in the engine; more requests get status 429."""
    max_answers: int = 128
    """Answers to one request at most: its prompts times its `n`."""
    max_logprobs: int = 20
    """Likeliest tokens that a request may ask for at each position."""
    max_connections: int = 1024
    """Connections that may be open at once; more get status 503."""
    request_timeout_s: float = 600.0
    """Seconds after which an answer ends with what it has."""
    header_timeout_s: float = 10.0
    """Seconds in which a client must have sent a request's headers."""
    body_timeout_s: float = 30.0
    """Seconds in which a client must have sent a request's body."""
    send_timeout_s: float = 30.0
    """Seconds that a client may take no byte of its answer before it is given up."""
    idle_timeout_s: float = 60.0
    """Seconds that a connection may stay open between two requests."""
    ping_s: float = 15.0
    """Seconds without a token after which a stream carries a comment, so that proxies keep it open."""
    shutdown_timeout_s: float = 30.0
    """Seconds that running requests have to finish once the server is told to stop."""
    log_requests: bool = False
    """Write prompts and answers to the log."""
    page: bool = True
    """Serve the live page at `/`."""

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise UserError("a server needs 1 name for its model or more, got none: give for example 'llama'")
        if not 0 <= self.port <= 65535:
            raise UserError(f"port must be at least 0 and at most 65535, got {self.port} (for example 8000)")
        if not all(key.strip() for key in self.api_keys):
            raise UserError("api_key must have 1 character or more, got an empty one: leave it out for no key")
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be more than 0 seconds, got {getattr(self, name)} (for example 30)")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
