"""Which replica has most of a prompt in its cache already, as far as a router can tell from what it sent where. No Ray and
no torch here: the router of ray_router.py asks, and tests ask the same.

A prompt is cut into blocks of bytes; a block's key depends on all blocks before it. What a replica really holds is its own
business (prefixes are given up under pressure), so that a match is a guess, and load has the last word.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
    where nothing can be read. Requests of different `time` share no cache and begin differently.
    """
    try:
        fields = json.loads(body)
    except ValueError:
        return b""
    if not isinstance(fields, dict):
        return b""
    parts: list[Any] = [path, fields.get("time"), fields.get("tools"), fields.get("instructions")]
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
