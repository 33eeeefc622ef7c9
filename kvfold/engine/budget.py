"""How many bytes requests will need, and the one formula that says whether they fit.

Full, window, H2O and TOVA say exactly what they keep after so many tokens. What learned gates keep is estimated per KV
stream (one owner, one KV head): shares of the tokens beyond those kept in any case, at a few lengths, from the adapter's
calibration where it has one, and corrected by every sequence that ends. Without calibration a stream is taken to keep
everything until the first sequence has told better. No torch here; the bytes themselves are the planner's.
"""

import math
from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvfold.engine.request import Request
from kvfold.errors import UserError
from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import LENGTH_BYTES, SEQUENCE_BYTES, page_bytes, page_class, page_classes
from kvfold.methods.base import Method

HORIZON = 512
"""Tokens ahead for which room is set aside for every request that runs."""
WATERMARK = 0.02
"""Share of the pool that admission leaves free."""
LENGTHS = (256, 1024, 4096)
"""Tokens seen at which kept shares are held."""
DEVIATIONS = 2.06
"""Mean absolute deviations above the mean at which 95 % of normally spread values lie."""
FIRST_SPREAD = 0.25
"""Mean absolute deviation, as a share, that is assumed after one observation."""
LEARNING_RATE = 0.1
"""Weight of a new observation once there are ten."""
SAFETY_STEP, SAFETY_DECAY, SAFETY_MOST = 1.3, 0.97, 8.0
"""Estimates of what is to come are multiplied by a factor that each preemption raises and each finished request lowers."""


def always_kept(spec: Method, seen: int) -> int:
    """Entries that a stream holds whatever its gates decide."""
    return spec.expected_kept(seen, max(1, seen)) if spec.trained else spec.max_kept(seen)


class SequenceCost:
    """Bytes that one sequence holds under one method."""

    def __init__(
        self, layout: KVLayout, *, model_bytes: int, page_slots: int, slot_state: Mapping[Any, int] | None = None,
        ratios: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        """`model_bytes`: one number in the model's dtype. `slot_state`: bytes a slot by page class, where classes are shared
        with other methods. `ratios`: as calibration writes those of the learned method: `lengths` (tokens seen, ascending), and
        for each of them tokens kept over tokens seen of every KV stream, their `median` and their `p95`, the 95 % quantile.
        """
        states, streams = slot_state or page_classes(layout), []
        self.page_slots, self.state_bytes = page_slots, SEQUENCE_BYTES
        for owner in layout.owners:
            one, spec, layer = page_class(layout, owner), layout.time_of(owner), layout.layers[owner]
            page = page_bytes(one, page_slots, model_bytes=model_bytes, slot_state_bytes=states[one])
            streams += [(spec, page)] * layer.num_kv_heads
            self.state_bytes += layer.num_kv_heads * (LENGTH_BYTES + spec.stream_state_bytes(layer.head_dim))
        self.streams: list[tuple[Method, int]] = streams
        self.learned = any(spec.trained for spec, _ in streams)
        self.lossless = not any(spec.lossy for spec, _ in streams)
        self.chunk_invariant = all(spec.chunk_invariant for spec, _ in streams)
        self._learned = [place for place, (spec, _) in enumerate(streams) if spec.trained]
        # Mean and mean absolute deviation of what is kept beyond `always_kept`, as a share; by length, then learned stream.
        self._lengths = LENGTHS if ratios is None else ratios["lengths"]
        self._mean = [[1.0] * len(self._learned) for _ in self._lengths]
        self._spread = [[0.0] * len(self._learned) for _ in self._lengths]
        self._observed = [0] * len(self._lengths)
        self._memo: dict[tuple[int, bool], int] = {}
        if ratios is not None:
            self._take(ratios)

    def bytes(self, seen: int, *, high: bool = False) -> int:
        """Bytes after `seen` tokens; `high`: the 95 % quantile where gates decide, else what is likely."""
        seen = -(-seen // self.page_slots) * self.page_slots  # at most a page more, and far fewer sums to remember
        total = self._memo.get((seen, high))
        if total is None:
            exact: dict[tuple[Method, int], int] = {}
            learned = iter(self._shares(seen, high))
            total = self.state_bytes
            for spec, page in self.streams:
                if spec.trained:
                    least = always_kept(spec, seen)
                    total += page * self._pages(least + next(learned) * (seen - least))
                    continue
                if (spec, page) not in exact:
                    exact[spec, page] = page * self._pages(spec.max_kept(seen))
                total += exact[spec, page]
            self._memo[seen, high] = total
        return total

    def most(self, seen: int) -> int:
        """Bytes after `seen` tokens if gates let everything stay."""
        return self.state_bytes + sum(page * self._pages(spec.max_kept(seen)) for spec, page in self.streams)

    def _pages(self, kept: float) -> int:
        return -(-math.ceil(kept) // self.page_slots)

    def _shares(self, seen: int, high: bool) -> list[float]:
        """By learned stream, interpolated between the two lengths around `seen`."""
        upper = next((place for place, length in enumerate(self._lengths) if length >= seen), len(self._lengths) - 1)
        lower = max(0, upper - 1)
        low, top = self._lengths[lower], self._lengths[upper]
        weight = min(1.0, max(0.0, (seen - low) / (top - low))) if top > low else 1.0
        if seen <= self._lengths[0]:
            lower, weight = upper, 1.0
        above = DEVIATIONS if high else 0.0
        one, two = (
            [mean + above * spread for mean, spread in zip(self._mean[place], self._spread[place], strict=True)]
            for place in (lower, upper)
        )
        return [min(1.0, (1 - weight) * low + weight * top) for low, top in zip(one, two, strict=True)]

    def _take(self, ratios: Mapping[str, Any]) -> None:
        """Shares beyond `always_kept` from plain ratios."""
        for place, length in enumerate(ratios["lengths"]):
            given = len(ratios["median"][place])
            if given != len(self.streams):
                raise UserError(f"kept ratios must be of {len(self.streams)} KV streams, got {given}: calibrate again")
            for number, stream in enumerate(self._learned):
                least = always_kept(self.streams[stream][0], length)
                if length > least:
                    mean, top = (
                        min(1.0, max(0.0, (row[place][stream] * length - least) / (length - least)))
                        for row in (ratios["median"], ratios["p95"])
                    )
                    self._mean[place][number], self._spread[place][number] = mean, max(0.0, top - mean) / DEVIATIONS
            self._observed[place] = 10

    def observe(self, seen: int, kept: Sequence[float]) -> None:
        """A sequence held so many entries in each KV stream after `seen` tokens: correct the shares at the nearest length."""
        place = min(range(len(self._lengths)), key=lambda one: abs(math.log(self._lengths[one] / max(1, seen))))
        leasts = [always_kept(self.streams[stream][0], seen) for stream in self._learned]
        if not self._learned or min(leasts) >= seen:
            return
        first = not any(self._observed)
        self._observed[place] += 1
        rate = max(LEARNING_RATE, 1 / self._observed[place])
        for number, (stream, least) in enumerate(zip(self._learned, leasts, strict=True)):
            share = min(1.0, max(0.0, (kept[stream] - least) / (seen - least)))
            # What the first one shows holds for all lengths until they are seen themselves.
            for at in range(len(self._lengths)) if first else (place,):
                mean, spread = self._mean[at], self._spread[at]
                off = FIRST_SPREAD * share if self._observed[place] == 1 else abs(share - mean[number])
                mean[number] += rate * (share - mean[number])
                spread[number] += rate * (off - spread[number])
        self._memo.clear()


class Budget:
    """One pool of bytes, and what the requests that share it will take."""

    def __init__(
        self, costs: Mapping[str, SequenceCost], pool_bytes: int, *, prefill_tokens: int, horizon: int = HORIZON,
        scale: float = 1.0,
    ):  # fmt: skip
        """`costs` by method. `prefill_tokens`: of one prefill group, at most. `scale`: what estimates are multiplied by, to see
        what happens where they are wrong.
        """
        self.costs, self.pool_bytes, self.prefill_tokens, self.horizon = costs, pool_bytes, prefill_tokens, horizon
        self.scale, self.safety = scale, 1.0
        self._reserve = int(WATERMARK * pool_bytes)
        self.estimates = 0
        self.mean_error = 0.0
        """Mean of |estimated / held - 1| over prompts, of learned methods."""

    def growth(self, request: Request, held: int, *, whole: bool = False) -> int:
        """Bytes that a request may take beyond the `held` ones it has, over the next `horizon` tokens or, `whole`, to its end.
        Tokens that will surely come all count where the method says exactly what they take.
        """
        cost, factor = self.costs[request.method], self.scale
        end = request.final_tokens
        if not whole:
            start = max(request.seen, request.read_until, request.prompt_tokens)
            ahead = start + self.horizon if cost.learned else max(start + self.horizon, request.certain_tokens)
            end, factor = min(end, ahead), factor * self.safety
        if cost.learned and request.handle is not None and request.seen >= LENGTHS[0]:
            # Its own text has shown how much it keeps.
            now = cost.bytes(request.seen)
            more = (cost.bytes(end) - now) * min(4.0, max(0.5, held / now))
        else:
            more = cost.bytes(end, high=True) - held
        return max(0, min(int(more * factor), cost.most(request.final_tokens) - held))

    def transient(self, methods: Iterable[str]) -> int:
        """Bytes that one prefill group may take for a while beyond what it keeps: what gates decide is known only behind them."""
        costs = [self.costs[method] for method in methods]
        tokens = self.prefill_tokens
        extra = [cost.most(tokens) - cost.bytes(tokens, high=True) for cost in costs if cost.learned]
        return min(max(extra, default=0), self.pool_bytes // 4)

    def fits(self, available: int, growths: int, methods: Iterable[str]) -> bool:
        """The one formula: whether requests that will take `growths` more bytes fit into what is `available`."""
        return growths + self.transient(methods) + self._reserve <= available

    def refusal(self, request: Request) -> str | None:
        """Why a request can never fit, alone in the empty pool; None where it can."""
        whole = self.growth(request, 0, whole=True)
        if self.fits(self.pool_bytes, whole, [request.method]):
            return None
        return (
            f"prompt and answer of {request.final_tokens + 1} tokens must fit into the KV memory of {self.pool_bytes} bytes, "
            f"got about {whole}: ask for fewer tokens, give more kv_memory, or a method that keeps less"
        )

    def most_tokens(self, request: Request) -> int:
        """The largest `max_tokens` up to the request's own that can fit; 0 where none does."""
        wanted = request.max_tokens

        def refused(tokens: int) -> bool:
            request.max_tokens = tokens
            return self.refusal(request) is not None

        try:
            return wanted if not refused(wanted) else bisect(range(1, wanted), False, key=refused)
        finally:
            request.max_tokens = wanted

    def preempted(self) -> None:
        """Memory ran out under a request: expect more of those to come."""
        self.safety = min(SAFETY_MOST, self.safety * SAFETY_STEP)

    def finished(self, request: Request, kept: Sequence[float]) -> None:
        """A sequence ended: learn from what its KV streams held."""
        self.safety = max(1.0, self.safety * SAFETY_DECAY)
        self.costs[request.method].observe(request.seen, kept)

    def was_read(self, request: Request, held: int, kept: Sequence[float]) -> None:
        """A prompt was read and holds so many bytes: how far off was the estimate? Learn from what its KV streams hold."""
        self.estimates += 1
        error = abs(request.predicted_bytes / max(1, held) - 1)
        self.mean_error += (error - self.mean_error) / self.estimates
        self.costs[request.method].observe(request.seen, kept)
