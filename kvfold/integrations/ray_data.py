"""Offline batches over Ray Data: a dataset of requests in, the same rows with their answers out, on as many engines as there
is room for. Nothing here is imported unless Ray is there.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow
import ray.data

from kvfold.engine.engine import Engine
from kvfold.models.load import load, load_tokenizer


def answered_dataset(
    requests: ray.data.Dataset, model: str, *, engines: int = 1, batch_rows: int = 256, kv_memory: str = "2GB",
    methods: Sequence[str] = (), adapter: str | None = None, max_running: int = 256, cpus: float = 1.0, gpus: float = 0.0,
) -> ray.data.Dataset:  # fmt: skip
    """`requests`: a column for each of OpenAI's field names (`prompt` or `messages`, `max_tokens`, ...); a field that a row
    leaves empty is not said. Gives all columns and `text`, `finish_reason`, `error`, `prompt_tokens`, `completion_tokens`; what
    is wrong with a row stands in its `error`, and the others go on.

    `batch_rows`: requests that an engine gets at once; more than `max_running`, so that it is never short of work. A batch of
    an engine that dies is answered again by another.
    """
    return requests.map_batches(
        _Answering, batch_format="pyarrow", batch_size=batch_rows, num_cpus=cpus, num_gpus=gpus,
        compute=ray.data.ActorPoolStrategy(size=engines),
        fn_constructor_kwargs={
            "model": model, "adapter": adapter, "kv_memory": kv_memory, "methods": tuple(methods), "max_running": max_running,
            "device": "cuda" if gpus else None,
        },
    )  # fmt: skip


class _Answering:
    """One engine of the pool."""

    def __init__(
        self, *, model: str, adapter: str | None, kv_memory: str, methods: tuple[str, ...], max_running: int,
        device: str | None,
    ):  # fmt: skip
        loaded = load(model, adapter=adapter, device=device)
        self._engine = Engine(loaded, load_tokenizer(model), kv_memory, methods or None, max_running=max_running)

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        rows = batch.to_pylist()
        for row, answer in zip(rows, self._engine.generate([_said(row) for row in rows]), strict=True):
            usage = answer.usage
            row |= {"text": answer.text, "finish_reason": answer.finish_reason, "error": answer.error}
            row["prompt_tokens"] = usage.prompt_tokens if usage else 0
            row["completion_tokens"] = usage.completion_tokens if usage else 0
        fields = [("text", "string"), ("finish_reason", "string"), ("error", "string")]
        fields += [("prompt_tokens", "int64"), ("completion_tokens", "int64")]
        # Columns that may be empty in all rows of a batch have their type all the same, so that batches fit together.
        columns = {name: pyarrow.array([row[name] for row in rows], kind) for name, kind in fields}
        return pyarrow.table({**{name: batch[name] for name in batch.column_names if name not in columns}, **columns})


def _said(value: Any) -> Any:
    """Without the fields that are empty: a table has them in every row, and in every message of it."""
    if isinstance(value, dict):
        return {name: _said(one) for name, one in value.items() if one is not None}
    return [_said(one) for one in value] if isinstance(value, list) else value
