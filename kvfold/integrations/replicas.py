"""What lies between a front and several replicas, needing no Ray and no torch: a request as a value that another process
answers without a socket; which replica has most of its prompt in its cache already; and how many replicas there should be.

A prompt is cut into blocks of bytes; a block's key depends on all blocks before it. What a replica really holds is its own
business (prefixes are given up under pressure), so that a match is a guess, and load has the last word.
"""

import asyncio
import hashlib
import json
import math
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One request."""

    method: str
    path: str
    query: bytes = b""
    headers: Headers = ()
    body: bytes = b""
    prompt: bytes = b""
    """What a router may compare with other calls, see `prompt_bytes`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """As much of a response as was there: its head with the first part, some of its body."""

    status: int = 0
    """0 in all parts but the first."""
    headers: Headers = ()
    body: bytes = b""


async def answered(app: ASGIApp, call: Call) -> AsyncIterator[Part]:
    """The application's response, part by part: all that it has sent since the last. Left early, the application is told
    that the client is gone, as a server would. Raises `RuntimeError` where the application fails in between.
    """
    sent: list[Message] = []
    news, gone = asyncio.Event(), asyncio.Event()
    body_left = True

    async def receive() -> Message:
        nonlocal body_left
        if body_left:
            body_left = False
            return {"type": "http.request", "body": call.body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        news.set()

    task = asyncio.ensure_future(app(_scope(call), receive, send))
    task.add_done_callback(lambda _: news.set())
    head: Message | None = None
    begun = whole = False
    try:
        while not whole:
            await news.wait()
            news.clear()
            failed, body = task.done(), b""
            taken, sent[:] = list(sent), []
            for message in taken:
                if message["type"] == "http.response.start":
                    head = message
                elif message["type"] == "http.response.body":
                    body += message.get("body", b"")
                    whole = not message.get("more_body", False)
            if begun and body:
                yield Part(body=body)
            elif not begun and head is not None and (body or whole):
                # The head waits for the first of the body, so that nothing has begun where an answer fails early.
                begun = True
                yield Part(status=head["status"], headers=tuple(head.get("headers", ())), body=body)
            if failed and not whole:
                raise RuntimeError("the application ended before its response did")
    finally:
        gone.set()
        if not whole:
            task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


def _scope(call: Call) -> dict[str, Any]:
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": call.method,
        "scheme": "http", "path": call.path, "raw_path": call.path.encode(), "query_string": call.query, "root_path": "",
        "headers": list(call.headers), "client": None, "server": None,
    }  # fmt: skip


BLOCK_BYTES = 128
"""Bytes of a block: a few dozen tokens of English."""
MOST_BLOCKS = 256
"""Blocks of one prompt that are looked at; what comes behind them does not tell replicas apart."""
REMEMBERED = 1 << 16
"""Blocks of all prompts that are remembered, least recently used first out."""

Chain = tuple[bytes, ...]
"""Keys of a prompt's blocks, in order."""


def prompt_bytes(path: str, body: bytes) -> bytes:
    """What an OpenAI request says before its answer, such that a continued conversation begins with the same bytes; empty
    where nothing can be read. Requests of different methods share no cache and begin differently.
    """
    try:
        fields = json.loads(body)
    except ValueError:
        return b""
    if not isinstance(fields, dict):
        return b""
    parts: list[Any] = [path, fields.get("kvfold"), fields.get("tools"), fields.get("instructions")]
    if path.endswith("/completions") and "messages" not in fields:
        prompt = fields.get("prompt")
        # Of a list of prompts the first decides; a list of token ids is one prompt.
        several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
        parts.append(prompt[0] if several else prompt)
        # An open end: the closing quote or bracket would tell a prompt from its continuation.
        return json.dumps(parts).encode()[:-2]
    said = fields.get("messages", fields.get("input"))
    parts += said if isinstance(said, list) else [said]
    return json.dumps(parts).encode()[:-1]


def chain(prompt: bytes, block_bytes: int = BLOCK_BYTES) -> Chain:
    """Keys of the prompt's whole blocks, and of a short prompt's only one."""
    keys, key = [], b""
    whole = max(1, len(prompt) // block_bytes) if prompt else 0
    for index in range(min(whole, MOST_BLOCKS)):
        part = prompt[index * block_bytes : (index + 1) * block_bytes]
        key = hashlib.blake2b(key + part, digest_size=8).digest()
        keys.append(key)
    return tuple(keys)


class PrefixMemory:
    """Which replicas were sent which blocks."""

    def __init__(self, remembered: int = REMEMBERED):
        self._remembered = remembered
        self._replicas: OrderedDict[bytes, set[str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._replicas)

    def note(self, prompt: Chain, replica: str) -> None:
        """A replica was sent a prompt. The deepest blocks are the first to be forgotten."""
        for key in reversed(prompt):
            self._replicas.setdefault(key, set()).add(replica)
            self._replicas.move_to_end(key)
        while len(self._replicas) > self._remembered:
            self._replicas.popitem(last=False)

    def keep_only(self, replicas: Iterable[str]) -> None:
        """Others are gone, and their caches with them."""
        alive = set(replicas)
        for key, holders in list(self._replicas.items()):
            holders &= alive
            if not holders:
                del self._replicas[key]

    def matched(self, prompt: Chain, replica: str) -> int:
        """Blocks at the beginning of the prompt that the replica was sent before."""
        for number, key in enumerate(prompt):
            if replica not in self._replicas.get(key, ()):
                return number
        return len(prompt)


def ranked(prompt: Chain, memory: PrefixMemory, loads: Mapping[str, int], slack: int) -> Sequence[str]:
    """Replicas, the best first. `loads`: requests that each has. One with `slack` requests more than the least loaded is no
    longer chosen for its prefix. Where nothing matches, replicas are ordered by a hash of the first block, so that routers
    that know nothing of each other send the same beginning to the same place; without a prompt, by load and then at random.
    """
    least = min(loads.values(), default=0)
    salt = prompt[0] if prompt else os.urandom(8)

    def place(replica: str) -> tuple[bool, int, int, bytes]:
        crowded = loads[replica] - least >= slack
        drawn = hashlib.blake2b(salt + replica.encode(), digest_size=8).digest()
        # Without a prompt to go by, load alone counts.
        load = loads[replica] if crowded or not prompt else 0
        return crowded, -memory.matched(prompt, replica), load, drawn

    return sorted(loads, key=place)


class FreePages:
    """As many replicas as it takes that each uses no more than a share of its KV memory."""

    def __init__(self, target_use: float = 0.7):
        """`target_use`: bytes held and waited for, as a share of the pool, that a replica should have."""
        self.target_use = target_use

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """See Ray: the replicas wanted, before Serve's own delays and limits."""
        uses = (context.aggregated_metrics or {}).get("pool_use", {})
        if not uses:
            return context.target_num_replicas, {}
        return max(1, math.ceil(sum(uses.values()) / self.target_use - 1e-9)), {}
