"""A store without tensors: sequences that keep entries by the rules of their method, pages counted one by one."""

import hashlib
from dataclasses import dataclass, field

from kvfold.engine.budget import SequenceCost, always_kept
from kvfold.engine.request import Request, SamplingParams
from kvfold.layout.kvlayout import KVLayout

METHODS = ("full", "window:24+4", "h2o:16+16", "dms:8", "dmc:12")
SLOTS = 4


def layout(time: str) -> KVLayout:
    return KVLayout.plain(2, 2, 8).with_time(time)


def costs(methods, *, slots=SLOTS) -> dict[str, SequenceCost]:
    return {time: SequenceCost(layout(time), model_bytes=4, page_slots=slots) for time in methods}


def chance(*parts) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def next_token(tokens) -> int:
    """The model: a function of all tokens."""
    return int(chance("next", tuple(tokens)) * 50)


@dataclass
class Sequence:
    method: str
    tokens: list = field(default_factory=list)
    cuts: list = field(default_factory=list)
    """Where calls ended."""


class SimulatedMemory:
    """The memory of `Runner` with what the scheduler's driver needs: `feed`."""

    def __init__(self, costs, pool_bytes, *, places=64):
        self.costs, self.pool_bytes, self.places = costs, pool_bytes, places
        self.sequences: dict[int, Sequence] = {}
        self.made = 0

    def stream_kept(self, one: Sequence) -> list[int]:
        kept = []
        for number, (spec, _) in enumerate(self.costs[one.method].streams):
            seen = len(one.tokens)
            least = always_kept(spec, seen)
            if spec.trained:
                first = tuple(one.tokens[:1])
                least += int((seen - least) * (0.2 + 0.6 * chance("rate", first, number)))
            kept.append(least)
        return kept

    def size(self, one: Sequence, extra: int = 0) -> int:
        """Bytes held, once `extra` more tokens came and gates let all of them stay."""
        cost, total = self.costs[one.method], 0
        kept = self.stream_kept(Sequence(one.method, one.tokens))
        for (spec, page), now in zip(cost.streams, kept, strict=True):
            after = now + extra if spec.trained else spec.max_kept(len(one.tokens) + extra)
            total += page * -(-after // cost.page_slots)
        return total + cost.state_bytes

    @property
    def free_bytes(self):
        return self.pool_bytes - sum(self.size(one) for one in self.sequences.values())

    def new(self, method):
        if len(self.sequences) >= self.places or self.free_bytes < self.costs[method].state_bytes:
            return None
        self.made += 1
        self.sequences[self.made] = Sequence(method)
        return self.made

    def fork(self, method, handle):
        one = self.sequences[handle]
        assert one.method == method
        if len(self.sequences) >= self.places or self.free_bytes < self.size(one):
            return None
        self.made += 1
        self.sequences[self.made] = Sequence(method, list(one.tokens), list(one.cuts))
        return self.made

    def free(self, method, handle):
        assert self.sequences.pop(handle).method == method

    def held_bytes(self, method, handle):
        return self.size(self.sequences[handle])

    def owed_bytes(self, method, handle):
        return 0

    def freeable_bytes(self, handles):
        return sum(self.size(self.sequences[handle]) for _, handle in handles)

    def kept(self, method, handle):
        return self.stream_kept(self.sequences[handle])

    def fits(self, calls):
        new = sum(
            self.size(self.sequences[handle], extra) - self.size(self.sequences[handle]) for _, handle, extra in calls
        )
        return new <= self.free_bytes

    def feed(self, request: Request, number: int) -> None:
        """The next tokens of a request, in one call."""
        one = self.sequences[request.handle]
        assert one.tokens == request.tokens[: request.seen], "a sequence is that of its request's tokens"
        one.tokens += request.tokens[request.seen : request.seen + number]
        one.cuts.append(len(one.tokens))
        request.seen += number
        assert request.seen == len(one.tokens) <= len(request.tokens)
        assert self.free_bytes >= 0, "the budget is exceeded"


def make_request(name, prompt, *, method="full", max_tokens=8, **options) -> Request:
    return Request(
        id=str(name), tokens=list(prompt), prompt_tokens=len(prompt), method=method, max_tokens=max_tokens,
        params=SamplingParams(max_tokens=max_tokens), **options,
    )  # fmt: skip
