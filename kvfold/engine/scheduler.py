"""Who runs in the next step, and who holds memory: decode, one prefill group, preempt; and the tree of prefixes that stay.

A step decodes all that can decode and reads at most one prefill group: one chunk of a long prompt, or several short
prompts. Admission goes by estimates (budget.py); every call is then checked against the pages that are really free, and
under pressure prefixes are given up, the prefill shrinks, and the last in the order is preempted and later recomputed.
The first in the order always progresses. No torch here: of the store it sees what `Runner` tells of memory.

The compressed state after p tokens is no slice of the state after q > p tokens, so a prefix can be reused only where a
snapshot of it was kept: where a second request was seen to part from a first (on the grid: at the border before), at the end
of a prompt, and at the end of an answer. Snapshots are handles of forked sequences; whoever evicts one frees its handle. Of
methods whose state depends on where calls were cut, snapshots stand on the grid only, and the grid is that of their
prompt chunks.
"""

from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvfold.engine.budget import Budget
from kvfold.engine.request import FinishReason, Request
from kvfold.errors import UserError

if TYPE_CHECKING:
    from kvfold.engine.runner import Runner

PREFILL_TOKENS = 512
"""Tokens of one prefill group, padding counted; the grid on which prompts of methods that are not chunk-invariant are cut."""
PREFIX_TOKENS = 64
"""Tokens of a block of the prefix tree."""
AGING_S = 10.0
"""A request that waits rises by one priority in so many seconds."""
ROOM_FOR_SNAPSHOTS = 0.25
"""Share of the pool that must be free for a snapshot to be taken at the end of a prompt."""


@dataclass(kw_only=True, slots=True)
class Step:
    """What to run."""

    decode: list[Request] = field(default_factory=list)
    """One token each."""
    prefill: list[tuple[Request, int]] = field(default_factory=list)
    """So many tokens each, of requests of one method, in one call."""
    ended: list[Request] = field(default_factory=list)
    """Requests that ended without running: their time was over, or nothing could be freed for them."""


class Scheduler:
    """Waiting and running requests over one memory."""

    def __init__(
        self, budget: Budget, memory: "Runner", *, max_running: int = 256, prefill_tokens: int = PREFILL_TOKENS,
        prefix_tokens: int = PREFIX_TOKENS,
    ):  # fmt: skip
        self.budget, self.memory, self.max_running, self.prefill_tokens = budget, memory, max_running, prefill_tokens
        self._invariant: Mapping[str, bool] = {name: cost.chunk_invariant for name, cost in budget.costs.items()}
        grids = {name: prefix_tokens if anywhere else prefill_tokens for name, anywhere in self._invariant.items()}
        self.prefixes = PrefixTree(grids, self._invariant)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = 0
        self.most_running = 0

    def submit(self, request: Request) -> None:
        """Let a request wait for its turn. Raises `UserError` for one that can never fit."""
        refusal = self.budget.refusal(request)
        if refusal is not None:
            raise UserError(refusal)
        if request.reuse:
            self.prefixes.visit(request.method, request.tokens)
        self.waiting.append(request)

    def finish(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End a request, wherever it is. What it held is free at once, or becomes a prefix that others may go on from."""
        request.finish_reason, request.error = reason, error
        if request in self.waiting:
            self.waiting.remove(request)
        if request.handle is None:
            return
        self.running.remove(request)
        method, handle, kept = request.method, request.handle, self.memory.kept(request.method, request.handle)
        request.kept_tokens = sum(kept) / len(kept)
        request.kv_bytes = self.memory.held_bytes(method, handle)
        if reason in ("stop", "length"):
            self.budget.finished(request, kept)
        stays = reason in ("stop", "length") and request.reuse and self._invariant[method]
        stays &= request.seen >= self.prefixes.grid(method)
        if not (stays and self.prefixes.insert(method, request.tokens[: request.seen], handle)):
            self.memory.free(method, handle)
        request.handle = None

    def was_read(self, request: Request) -> None:
        """A part of a prompt was read: keep a snapshot where one is wanted."""
        method = request.method
        if not request.is_reading and self.budget.costs[method].learned:
            held, kept = self.memory.held_bytes(method, request.handle), self.memory.kept(method, request.handle)
            self.budget.was_read(request, held, kept)
        if request.reuse and self._wants_snapshot(request):
            copy = self.memory.fork(method, request.handle)
            if copy is not None and not self.prefixes.insert(method, request.tokens[: request.seen], copy):
                self.memory.free(method, copy)

    def _wants_snapshot(self, request: Request) -> bool:
        """Where others part from this prompt; and at its end, if there is room and no snapshot is near."""
        method, seen = request.method, request.seen
        if self.prefixes.border(method, request.tokens, seen - 1) == seen:
            return True
        room = self.memory.free_bytes > ROOM_FOR_SNAPSHOTS * self.memory.pool_bytes
        if seen != request.prompt_tokens or not room or not self._invariant[method]:
            return False
        nearest, _ = self.prefixes.match(method, request.tokens) or (0, None)
        return seen - nearest >= self.prefixes.grid(method)

    def preempt(self, request: Request, step: Step | None = None) -> None:
        """Take a running request's memory, and it out of the step; it waits, and is recomputed on the same grid."""
        if step is not None:
            step.decode = [one for one in step.decode if one is not request]
            step.prefill = [(one, tokens) for one, tokens in step.prefill if one is not request]
        self.memory.free(request.method, request.handle)
        self.running.remove(request)
        request.handle, request.seen, request.preemptions = None, 0, request.preemptions + 1
        self.waiting.append(request)
        self.preemptions += 1

    def drop_prefixes(self) -> None:
        """Forget all snapshots."""
        while self._evict():
            pass

    def plan(self, now: float) -> Step:
        """What to run at this time, in seconds on the engine's clock. All of it surely fits."""
        step = Step()
        for request in [*self.waiting, *self.running]:
            if request.deadline <= now:
                self.finish(request, "timeout")
                step.ended.append(request)
        self.running.sort(key=lambda request: request.rank)
        before = self.preemptions
        step.decode = [request for request in self.running if not request.is_reading]
        while step.decode and not self._fits(step):
            if not self._evict():
                self._give_way(step, self.running[-1])
        for request in [one for one in self.running if one.is_reading]:
            if request in self.running:
                self._read(request, step)
        if self.preemptions == before:
            self._admit(step, now)
        self.most_running = max(self.most_running, len(self.running))
        return step

    def _fits(self, step: Step, *more: tuple[Request, int]) -> bool:
        calls = [(request, 1) for request in step.decode] + step.prefill + list(more)
        return self.memory.fits([(request.method, request.handle, tokens) for request, tokens in calls])

    def _evict(self) -> bool:
        evicted = self.prefixes.evict()
        if evicted is not None:
            self.memory.free(*evicted)
        return evicted is not None

    def _give_way(self, step: Step, victim: Request) -> None:
        """Preempt one request for want of memory; the only one there is ends instead: nothing could be freed for it."""
        if len(self.running) > 1:
            self.preempt(victim, step)
            self.budget.preempted()
            return
        step.decode, step.prefill = [], []
        pool = self.memory.pool_bytes
        error = (
            f"the KV memory of {pool} bytes holds {victim.seen} tokens of this request and no more: give more kv_memory"
        )
        self.finish(victim, "error", error)
        step.ended.append(victim)

    def _read(self, request: Request, step: Step) -> bool:
        """Put the next tokens of a prompt into the step's prefill group, if there is room."""
        tokens = self._chunk(request, step)
        while tokens and not self._fits(step, (request, tokens)):
            if self._evict():
                continue
            if self._invariant[request.method] and tokens > 1 and not step.prefill:
                tokens //= 2
            elif step.prefill or (self.running[-1] is request and len(self.running) > 1):
                return False  # those before it go on, and give their memory back when they end
            else:
                self._give_way(step, self.running[-1])
                if request.is_finished:
                    return False
        if tokens:
            step.prefill.append((request, tokens))
        return bool(tokens)

    def _chunk(self, request: Request, step: Step) -> int:
        """Tokens of this prompt that the group has room for: all that are left or, for the group's first, as many as it takes."""
        left, most = request.read_until - request.seen, self.prefill_tokens
        if not self._invariant[request.method]:
            most -= request.seen % most
        tokens = min(left, most)
        border = self.prefixes.border(request.method, request.tokens, request.seen) if request.reuse else None
        if border is not None:
            tokens = min(tokens, border - request.seen)
        if step.prefill:
            group = [length for _, length in step.prefill]
            same = step.prefill[0][0].method == request.method
            if not same or (len(group) + 1) * max(*group, tokens) > self.prefill_tokens:
                return 0
        return tokens

    def _rank(self, request: Request, now: float) -> tuple:
        return request.priority - int((now - request.arrival) / AGING_S), request.arrival, request.id

    def _admit(self, step: Step, now: float) -> None:
        """Start waiting requests in their order, until one does not fit or the prefill group is full."""
        growths: int | None = None
        ordered = self.waiting if len(self.running) < self.max_running else ()
        for request in sorted(ordered, key=lambda one: self._rank(one, now)):
            if len(self.running) >= self.max_running:
                return
            if self._follows_a_reader(request):
                continue
            rank = self._rank(request, now)
            request.read_until = len(request.tokens) if self._invariant[request.method] else request.prompt_tokens
            request.seen, snapshot = self._prefix(request)
            length = request.seen
            if step.prefill and not self._chunk(request, step):
                request.seen = 0
                return
            cost = self.budget.costs[request.method]
            growth = self.budget.growth(request, cost.bytes(length) if cost.lossless and length else 0)
            if growths is None:
                growths = self._growths()
            while self.running and not self._has_room(growths + growth, request, snapshot):
                if self.running[-1].rank[0] <= request.priority:
                    request.seen = 0
                    return
                self.preempt(self.running[-1], step)  # a lower priority makes room for a higher one
                growths = self._growths()
            if not self._start(request, snapshot, rank):
                return
            request.cached_tokens = max(request.cached_tokens, min(length, request.prompt_tokens))
            growths += growth
            if request.is_reading and not self._read(request, step):
                return

    def _prefix(self, request: Request) -> tuple[int, int | None]:
        """Length and handle of the snapshot that a request may go on from."""
        found = None
        if request.reuse:
            found = self.prefixes.match(request.method, request.tokens[: request.read_until])
        return found or (0, None)

    def _growths(self) -> int:
        total = 0
        for one in self.running:
            held = self.memory.held_bytes(one.method, one.handle)
            total += self.budget.growth(one, held) + self.memory.owed_bytes(one.method, one.handle)
        return total

    def _has_room(self, growths: int, request: Request, snapshot: int | None) -> bool:
        methods = {one.method for one in self.running} | {request.method}
        if self.budget.fits(self.memory.free_bytes, growths, methods):
            return True
        evictable = [one for one in self.prefixes.snapshots if one != (request.method, snapshot)]
        return self.budget.fits(self.memory.free_bytes + self.memory.freeable_bytes(evictable), growths, methods)

    def _start(self, request: Request, snapshot: int | None, rank: tuple) -> bool:
        """Give the request a sequence of its own, from a snapshot where there is one."""
        method = request.method
        while True:
            handle = self.memory.new(method) if snapshot is None else self.memory.fork(method, snapshot)
            if handle is not None:
                break
            if self.prefixes.snapshots == [(method, snapshot)] or not self._evict():
                request.seen = 0
                return False
        if request.reuse:
            self.prefixes.queries += 1
            self.prefixes.hits += snapshot is not None
        request.handle, request.rank = handle, rank
        request.predicted_bytes = self.budget.costs[method].bytes(request.read_until)
        self.waiting.remove(request)
        self.running.append(request)
        self.running.sort(key=lambda one: one.rank)
        return True

    def _follows_a_reader(self, request: Request) -> bool:
        """Whether a prompt that is being read will leave a snapshot that this one can go on from: worth waiting for."""
        found: int | None = None
        for reader in self.running:
            if not (reader.is_reading and reader.reuse and request.reuse and reader.method == request.method):
                continue
            shared = self.prefixes.shared(request.method, request.tokens, reader.tokens)
            if found is None:
                found = self._prefix(request)[0]
            if shared > max(reader.seen, found):
                return True
        return False


MAX_BLOCKS = 1 << 16
"""Blocks of tokens that are remembered, with or without a snapshot."""
LATEST = 16
"""Beginnings of next blocks that are remembered behind each block, to find where within one prompts part."""


@dataclass(slots=True, eq=False)
class _Node:
    """One block of tokens behind the blocks of its ancestors."""

    depth: int
    """Tokens from the beginning to this block's end."""
    parent: "_Node | None" = None
    key: tuple = ()
    visits: int = 0
    """Requests whose prompt passes through here."""
    last_used: int = 0
    children: "dict[tuple, _Node]" = field(default_factory=dict)
    handle: int | None = None
    """The snapshot at this block's end."""
    tails: dict[tuple, int] = field(default_factory=dict)
    """Snapshots a part of a block further on, by the tokens of that part."""
    onward: "deque[tuple]" = field(default_factory=lambda: deque(maxlen=LATEST))
    """How the latest prompts went on behind this block: up to a block of tokens each."""


class PrefixTree:
    """Snapshots of all methods of one engine, and one order of least recent use over them."""

    def __init__(self, grids: Mapping[str, int], anywhere: Mapping[str, bool], max_blocks: int = MAX_BLOCKS):
        """`grids`: tokens of a block, by method. `anywhere`: whether a snapshot may stand off the grid, by method."""
        self._grids, self._anywhere, self._max_blocks = dict(grids), dict(anywhere), max_blocks
        self._roots = {method: _Node(0) for method in grids}
        self._snapshots: OrderedDict[tuple[str, int], tuple[_Node, tuple]] = OrderedDict()
        self._blocks = self._clock = 0
        self.queries = self.hits = 0

    def __len__(self) -> int:
        return len(self._snapshots)

    @property
    def snapshots(self) -> list[tuple[str, int]]:
        """(method, handle) of every snapshot, least recently used first."""
        return list(self._snapshots)

    def grid(self, method: str) -> int:
        """Tokens of a block."""
        return self._grids[method]

    def visit(self, method: str, tokens: Sequence[int]) -> None:
        """A request with this prompt was submitted. The last token is always read anew, for its logits."""
        self._clock += 1
        grid = self._grids[method]
        for node in self._path(method, tokens[:-1], grow=True):
            node.visits += 1
            node.last_used = self._clock
            node.onward.append(tuple(tokens[node.depth : min(node.depth + grid, len(tokens) - 1)]))
        if self._blocks > self._max_blocks:
            self._prune()

    def match(self, method: str, tokens: Sequence[int]) -> tuple[int, int] | None:
        """Length and handle of the longest snapshot of a beginning of `tokens`, at least one token shorter than they are."""
        for node in reversed([self._roots[method], *self._path(method, tokens[:-1])]):
            start, room = node.depth, len(tokens) - 1 - node.depth
            fitting = [
                tail for tail in node.tails if len(tail) <= room and tuple(tokens[start : start + len(tail)]) == tail
            ]
            tail = max(fitting, key=len, default=())
            handle = node.tails[tail] if tail else node.handle
            if handle is not None:
                self._snapshots.move_to_end((method, handle))
                return start + len(tail), handle
        return None

    def border(self, method: str, tokens: Sequence[int], seen: int) -> int | None:
        """The next length after `seen` at which a snapshot is wanted: others came this far and then parted from `tokens`."""
        path = self._path(method, tokens[:-1])
        for place, node in enumerate(path):
            onward = path[place + 1].visits if place + 1 < len(path) else 0
            if node.visits > max(1, onward):
                tail = self._shared_tail(method, node, tokens)
                stands = tail in node.tails if tail else node.handle is not None
                if node.depth + len(tail) > seen and not stands:
                    return node.depth + len(tail)
        return None

    def _shared_tail(self, method: str, node: _Node, tokens: Sequence[int]) -> tuple:
        """The tokens behind a node that other prompts which end or part from this one there have in common with it: as many as
        save the most tokens, summed over those prompts. None on a grid.
        """
        if not self._anywhere[method]:
            return ()
        own = tuple(tokens[node.depth : min(node.depth + self._grids[method], len(tokens) - 1)])
        others = list(node.onward)
        if own in others:
            others.remove(own)
        lengths = sorted((_alike(own, other) for other in others), reverse=True)
        best = max(((place + 1) * length for place, length in enumerate(lengths)), default=0)
        return own[: next((one for place, one in enumerate(lengths) if (place + 1) * one == best), 0)]

    def shared(self, method: str, tokens: Sequence[int], others: Sequence[int]) -> int:
        """Length of the beginning that two prompts share; in whole blocks where snapshots stand on a grid."""
        grid, most = self._grids[method], min(len(tokens), len(others)) - 1
        length = 0
        while length + grid <= most and tokens[length : length + grid] == others[length : length + grid]:
            length += grid
        if self._anywhere[method]:
            length += _alike(tokens[length:most], others[length:most])
        return length

    def insert(self, method: str, tokens: Sequence[int], handle: int) -> bool:
        """Keep a snapshot of all of `tokens`. False where there is one already, or none may stand here: `handle` is the
        caller's to free.
        """
        path = self._path(method, tokens, grow=True)
        node = path[-1] if path else self._roots[method]
        tail = tuple(tokens[node.depth :])
        if (
            not tokens
            or (tail and not self._anywhere[method])
            or (tail in node.tails if tail else node.handle is not None)
        ):
            return False
        if tail:
            node.tails[tail] = handle
        else:
            node.handle = handle
        self._snapshots[method, handle] = node, tail
        return True

    def evict(self) -> tuple[str, int] | None:
        """Forget the least recently used snapshot: (method, handle), now the caller's to free; None where there is none."""
        if not self._snapshots:
            return None
        key, (node, tail) = self._snapshots.popitem(last=False)
        if tail:
            del node.tails[tail]
        else:
            node.handle = None
        return key

    def _path(self, method: str, tokens: Sequence[int], grow: bool = False) -> list[_Node]:
        """The nodes of the whole blocks of `tokens`, as far as they are known."""
        grid, node, path = self._grids[method], self._roots[method], []
        for start in range(0, len(tokens) - grid + 1, grid):
            key = tuple(tokens[start : start + grid])
            child = node.children.get(key)
            if child is None:
                if not grow:
                    break
                child = node.children[key] = _Node(start + grid, node, key, last_used=self._clock)
                self._blocks += 1
            node = child
            path.append(node)
        return path

    def _prune(self) -> None:
        """Forget the blocks that were least recently visited and lead to no snapshot, a quarter of all."""
        stack, leaves = list(self._roots.values()), []
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if not node.children and node.parent is not None:
                leaves.append(node)
        for leaf in sorted(leaves, key=lambda one: one.last_used):
            node = leaf
            while node.parent is not None and not (node.children or node.tails or node.handle is not None):
                del node.parent.children[node.key]
                self._blocks -= 1
                node = node.parent
            if self._blocks <= self._max_blocks * 3 // 4:
                return


def _alike(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Length of the beginning that both have."""
    pairs = enumerate(zip(tokens, others, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(tokens), len(others)))
