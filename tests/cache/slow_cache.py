"""An independent cache, slow and obvious: a list of entries for each owner, row and kv head, one query at a time.

Written from the definitions of the methods alone (full, window, H2O, TOVA; what a step is; shared layers, shares of the
text, ties, padding), in float64, with nothing of kvfold in it. `narrowest` is the smallest gap between the score of a
token that stayed and one that went: where it is tiny, fp32 may rightly decide otherwise.
"""

import re
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, inf

import torch


@dataclass
class Entry:
    position: int
    k: torch.Tensor
    v: torch.Tensor
    total: float = 0.0
    """Attention received from every query so far."""
    newest: float = 0.0
    """Attention received from the newest query alone."""


def allowed(budget: str, seen: int) -> int:
    """`64` or `25%` of the tokens seen."""
    if budget.endswith("%"):
        return max(1, ceil(Fraction(int(budget[:-1]) * seen, 100)))
    return int(budget)


@dataclass
class Method:
    """`full`, `window:R+S`, `h2o:R+Y` or `tova:N`."""

    text: str
    name: str = field(init=False)
    parts: list[str] = field(init=False)

    def __post_init__(self):
        self.name, *self.parts = re.split("[:+]", self.text)

    def sees(self, query: int, position: int) -> bool:
        """Whether a query sees an entry that is there; methods that score let it see all."""
        if self.name != "window":
            return True
        return query - position < allowed(self.parts[0], query + 1) or position < int(self.parts[1])


class SlowCache:
    """Rows of one model. `owners`: one a layer; `methods`, `windows`, `kv_heads` by owner."""

    def __init__(self, owners, methods, windows, kv_heads, rows, scale, softcap=None):
        self.owners, self.methods, self.windows, self.kv_heads = owners, methods, windows, kv_heads
        self.scale, self.softcap, self.seen = scale, softcap, [0] * rows
        self.held = {
            owner: [[[] for _ in range(kv_heads[owner])] for _ in range(rows)] for owner in sorted(set(owners))
        }
        self.narrowest = inf

    def call(self, q, k, v, real):
        """One step of all layers: q, k, v by layer, [B, T, heads, D], turned already; real [B][T]. Outputs by layer."""
        out = [torch.zeros(one.shape, dtype=torch.float64) for one in q]
        for row, flags in enumerate(real):
            tokens = [t for t, flag in enumerate(flags) if flag]
            if not tokens:
                continue
            for owner in self.held:
                readers = [layer for layer, of in enumerate(self.owners) if of == owner]
                self._attend(owner, readers, row, tokens, q, k[owner], v[owner], out)
                self._drop(owner, row, self.seen[row] + len(tokens))
            self.seen[row] += len(tokens)
        return out

    def positions(self):
        """[owner][row][kv head]: positions held, ascending."""
        return [
            [[sorted(entry.position for entry in held) for held in heads] for heads in rows]
            for rows in self.held.values()
        ]

    def _attend(self, owner, readers, row, tokens, q, k, v, out):
        for head in range(self.kv_heads[owner]):
            held = self.held[owner][row][head]
            for entry in held:
                entry.newest = 0.0
            for number, t in enumerate(tokens):
                held.append(Entry(self.seen[row] + number, k[row, t, head].double(), v[row, t, head].double()))
            for layer in readers:
                group = q[layer].shape[2] // self.kv_heads[owner]
                for number, t in enumerate(tokens):
                    for query_head in range(head * group, (head + 1) * group):
                        query, position = q[layer][row, t, query_head].double(), self.seen[row] + number
                        out[layer][row, t, query_head] = self._one_query(owner, held, query, position, t == tokens[-1])

    def _one_query(self, owner, held, query, position, newest):
        window = self.windows[owner]
        visible = [
            entry for entry in held
            if entry.position <= position
            and (window is None or position - entry.position < window)
            and self.methods[owner].sees(position, entry.position)
        ]  # fmt: skip
        logits = torch.stack([entry.k for entry in visible]) @ query * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        weights = torch.softmax(logits, dim=0)
        for entry, weight in zip(visible, weights.tolist(), strict=True):
            entry.total += weight
            entry.newest += weight if newest else 0.0
        return weights @ torch.stack([entry.v for entry in visible])

    def _drop(self, owner, row, seen):
        method, heads = self.methods[owner], self.held[owner][row]
        if method.name == "tova":
            shared = {}
            for held in heads:
                for entry in held:
                    shared[entry.position] = shared.get(entry.position, 0.0) + entry.newest
            stay = self._top(shared, allowed(method.parts[0], seen))
            for held in heads:
                held[:] = [entry for entry in held if entry.position in stay]
        for held in heads:
            if method.name == "h2o":
                by_age = sorted(held, key=lambda entry: entry.position)
                recent = allowed(method.parts[0], seen)
                stay = {entry.position for entry in by_age[-recent:]}
                scores = {entry.position: entry.total for entry in by_age[:-recent]}
                stay |= self._top(scores, allowed(method.parts[1], seen))
                held[:] = [entry for entry in held if entry.position in stay]
            if method.name == "window":
                recent, first = allowed(method.parts[0], seen), int(method.parts[1])
                held[:] = [entry for entry in held if entry.position >= seen - recent or entry.position < first]

    def _top(self, score_of, number):
        """The positions of the highest scores; of equal ones the older."""
        order = sorted(score_of, key=lambda position: (-score_of[position], position))
        if 0 < number < len(order):
            gap = score_of[order[number - 1]] - score_of[order[number]]
            if gap > 0:
                self.narrowest = min(self.narrowest, gap)
        return set(order[:number])
