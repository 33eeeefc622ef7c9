"""What the server tells Prometheus: vLLM's names under `kvfold:`, and what only a compressed cache has to tell.

Counters and histograms are kept here, on the event loop; gauges are read from the engine when somebody looks.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from kvfold.engine.engine import Piece
from kvfold.serve.watch import Holding

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("From a request to its first token", _SECONDS),
    "inter_token_latency_seconds": ("Between two tokens of a streamed answer", _SECONDS),
    "e2e_request_latency_seconds": ("From a request to its last token", _SECONDS),
    "request_prompt_tokens": ("Tokens of a prompt", _TOKENS),
    "request_generation_tokens": ("Tokens of an answer", _TOKENS),
}
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts whose answers ended",
    "generation_tokens": "Tokens generated",
    "prompt_tokens_cached": "Tokens of prompts that a stored prefix saved from being read",
    "seen_tokens": "Tokens that the cache saw, of answers that ended",
    "kept_tokens": "Tokens that it still held at their end, the mean over KV heads",
}
_ENGINE = {
    "num_requests_running": ("running", "Answers that hold a sequence"),
    "num_requests_waiting": ("waiting", "Answers that wait for memory or a place"),
    "kv_pool_bytes": ("pool_bytes", "Bytes reserved for the cache"),
    "kv_estimate_error": ("estimate_error", "Mean of |estimated / held - 1| over prompts read, learned methods"),
    "prefix_snapshots": ("prefixes", "Stored prefixes"),
}
_ENGINE_COUNTERS = {
    "num_preemptions": ("preemptions", "Answers that gave up their memory and were read again"),
    "prefix_cache_queries": ("prefix_queries", "Answers that looked for a stored prefix"),
    "prefix_cache_hits": ("prefix_hits", "Answers that found one"),
    "read_tokens": ("prompt_tokens", "Tokens read as prompts, those read again after a preemption included"),
}


class _EngineCounters(Collector):
    """Counters that the engine keeps itself."""

    def __init__(self, model: str):
        self._model = model
        self.stats: Mapping[str, Any] = {}

    def collect(self) -> Iterator[CounterMetricFamily]:
        """See `Collector`."""
        for name, (key, text) in _ENGINE_COUNTERS.items():
            family = CounterMetricFamily(f"kvfold:{name}", text, labels=("model_name",))
            family.add_metric((self._model,), self.stats.get(key, 0))
            yield family


class Metrics:
    """The numbers of one server."""

    def __init__(self, model: str):
        """`model`: the label that all of them carry."""
        self.registry = CollectorRegistry()
        self._label = {"model_name": model}
        self._histograms = {
            name: self._make(Histogram, name, text, buckets=buckets) for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._counters = {name: self._make(Counter, name, text) for name, text in _COUNTERS.items()}
        self._gauges = {name: self._make(Gauge, name, text) for name, (_, text) in _ENGINE.items()}
        self._gauges["kv_cache_usage_perc"] = self._make(Gauge, "kv_cache_usage_perc", "Share of the pool in use")
        self._gauges["kv_seen_tokens"] = self._make(Gauge, "kv_seen_tokens", "Tokens seen by running answers")
        self._gauges["kv_kept_tokens"] = self._make(
            Gauge, "kv_kept_tokens", "Tokens held for them, the mean over KV heads"
        )
        self._counted = _EngineCounters(model)
        self.registry.register(self._counted)
        self._success = self._make(Counter, "request_success", "Answers by how they ended", labels=("finished_reason",))
        self._http = self._make(Counter, "http_responses", "Responses by status", labels=("status",))
        self._pool = self._make(Gauge, "kv_pool_use_bytes", "Bytes of the pool by use", labels=("use",))
        self._owner = self._make(
            Gauge, "kv_owner_compression", "Tokens seen over tokens kept by running answers", labels=("owner",)
        )
        self._last: dict[tuple[int, int], float] = {}

    def _make(self, kind: type, name: str, text: str, *, labels: Sequence[str] = (), **options: Any) -> Any:
        metric = kind(f"kvfold:{name}", text, ("model_name", *labels), registry=self.registry, **options)
        return metric if labels else metric.labels(**self._label)

    def responded(self, status: int) -> None:
        """A response was begun."""
        self._http.labels(**self._label, status=str(status)).inc()

    def saw(self, job: Any, choice: int, piece: Piece) -> None:
        """A piece of an answer came from the engine."""
        now, key = time.monotonic(), (id(job), choice)
        if piece.token_ids and job.streams:
            before = self._last.get(key)
            if before is None:
                self._histograms["time_to_first_token_seconds"].observe(now - job.began)
            else:
                # Several tokens in one piece came together: each took its share.
                for _ in piece.token_ids:
                    self._histograms["inter_token_latency_seconds"].observe((now - before) / len(piece.token_ids))
            self._last[key] = now
        self._counters["generation_tokens"].inc(len(piece.token_ids))
        if piece.finish_reason is None:
            return
        self._last.pop(key, None)
        self._success.labels(**self._label, finished_reason=piece.finish_reason).inc()
        self._histograms["e2e_request_latency_seconds"].observe(now - job.began)
        usage = piece.usage
        if usage is None:
            return
        self._histograms["request_prompt_tokens"].observe(usage.prompt_tokens)
        self._histograms["request_generation_tokens"].observe(usage.completion_tokens)
        for name, number in (
            ("prompt_tokens", usage.prompt_tokens), ("prompt_tokens_cached", usage.cached_tokens),
            ("seen_tokens", usage.seen_tokens), ("kept_tokens", usage.kept_tokens),
        ):  # fmt: skip
            self._counters[name].inc(number)

    def text(
        self, stats: Mapping[str, Any], use: Mapping[str, int], holdings: Sequence[Holding], owners: Sequence[int]
    ) -> bytes:
        """Everything, in Prometheus' text form. `use`: bytes of the pool by use. `holdings`: of the running answers."""
        for name, (key, _) in _ENGINE.items():
            self._gauges[name].set(stats[key])
        self._counted.stats = stats
        self._gauges["kv_cache_usage_perc"].set(1 - stats["free_bytes"] / max(1, stats["pool_bytes"]))
        for name, number in use.items():
            self._pool.labels(**self._label, use=name).set(number)
        seen = kept = 0.0
        by_owner: dict[int, list[float]] = {owner: [0.0, 0.0] for owner in owners}
        for one in holdings:
            for owner, heads in zip(owners, one.kept, strict=False):
                by_owner[owner][0] += one.seen_tokens
                by_owner[owner][1] += sum(heads) / len(heads)
            if one.kept:
                seen += one.seen_tokens
                kept += sum(sum(heads) for heads in one.kept) / sum(len(heads) for heads in one.kept)
        self._gauges["kv_seen_tokens"].set(seen)
        self._gauges["kv_kept_tokens"].set(kept)
        for owner, (owner_seen, owner_kept) in by_owner.items():
            self._owner.labels(**self._label, owner=str(owner)).set(owner_seen / owner_kept if owner_kept else 1.0)
        return generate_latest(self.registry)
