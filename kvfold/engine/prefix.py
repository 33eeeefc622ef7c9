"""Which forked sequences stand for which beginnings: a tree of token ids, with snapshots at the borders of a grid.

The compressed state after p tokens is no slice of the state after q > p tokens, so a prefix can be reused only where a
snapshot of it was kept: where a second request was seen to part from a first (on the grid: at the border before), at the end
of a prompt, and at the end of an answer. Snapshots are handles of forked sequences; whoever evicts one frees its handle. Of
methods whose state depends on where calls were cut, snapshots stand on the grid only, and the grid is that of their
prompt chunks. No torch here.
"""

from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
        found = self._find(method, tokens)
        if found is not None:
            self._snapshots.move_to_end((method, found[1]))
        return found

    def _find(self, method: str, tokens: Sequence[int]) -> tuple[int, int] | None:
        for node in reversed([self._roots[method], *self._path(method, tokens[:-1])]):
            room = len(tokens) - 1 - node.depth
            fitting = [tail for tail in node.tails if len(tail) <= room and self._follows(tokens, node.depth, tail)]
            if fitting:
                tail = max(fitting, key=len)
                return node.depth + len(tail), node.tails[tail]
            if node.handle is not None:
                return node.depth, node.handle
        return None

    @staticmethod
    def _follows(tokens: Sequence[int], start: int, tail: tuple) -> bool:
        return tuple(tokens[start : start + len(tail)]) == tail

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
