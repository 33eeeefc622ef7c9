"""Tasks scored through the cache by lm-evaluation-harness: one cell for each task and method, and the rows that compare them.

lm-eval words the questions, asks the `kvfold` model of lm_eval.py, and reckons the scores; this file decides what is asked
under which method, keeps what was measured, and sets methods against the unfolded model question by question.
"""

import io
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import PreTrainedModel

from kvfold.errors import UserError, need_packages
from kvfold.eval.cells import Beside, Cells, about_beside, layout_key, model_key, opened
from kvfold.eval.perplexity import paired_difference
from kvfold.eval.progress import Report
from kvfold.eval.reading import method_about, method_layouts, with_unfolded
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.decoder import FoldForCausalLM

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

    from kvfold.eval.lm_eval import FoldLM, NamedTask

_PEER = "hf"
"""Stands where methods stand in rows of the same checkpoint in transformers' own class."""
_SEED = 1234
"""lm-eval's own, for the examples of a prompt and for draws."""


def measure_tasks(
    model: FoldForCausalLM, tokenizer: Any, tasks: Sequence[str], methods: Sequence[str], *, name: str,
    beside: Sequence[Beside] = (), folder: str | Path | None = None, limit: int | None = None,
    lengths: Sequence[int] = (), rows: int = 32, cells: str | Path | Cells | None = None, report: Report | None = None,
    peer: Callable[[], PreTrainedModel] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row for each task and method, the unfolded model first; those of the models `beside` come last, each under its own.

    `tasks`: names of lm-eval's tasks, also of those in `folder`, and files of questions (`data.py`). `limit`:
    questions of a task, its first. `lengths`: tokens of the prompts of synthetic tasks, each a row. `rows`: requests read
    side by side. `peer` loads the same checkpoint as transformers' own class: it is scored by lm-eval's own `hf`, in the last
    row of each task. All names and methods are checked before the first is measured. Raises `UserError` for what is wrong
    with them, and `RuntimeError` where a task's data can't be had.
    """
    need_packages("lm_eval", "accelerate", extra="eval", what="scoring tasks")
    from lm_eval.models.huggingface import HFLM

    from kvfold.eval.lm_eval import FoldLM, find_tasks

    layouts = with_unfolded(model, method_layouts(model, methods))
    kept, key, found = Cells(cells), model_key(model, name), []
    with tempfile.TemporaryDirectory() as place, _unlogged():
        # Synthetic tasks count tokens, and ask for a tokenizer by its folder: so a .gguf file has one too.
        tokenizer.save_pretrained(place)
        named = find_tasks(tasks, folder=folder, lengths=lengths, tokenizer=place)
        lm = FoldLM(model, tokenizer, batch_size=rows, report=report)
        as_hf = partial(HFLM, backend="causal", tokenizer=tokenizer, batch_size=rows)
        theirs = None if peer is None else cache(lambda: as_hf(peer()))
        for task in named:
            asked = {"model": key, "limit": limit, "task": task.identity}
            found += _rows(task, _of_task(task, layouts, lm, theirs, kept, asked))
    settings = {"folder": folder, "limit": limit, "lengths": lengths, "rows": rows, "cells": kept, "report": report}
    for other in beside:
        with opened(other, model) as its:
            layout = its.config.layout
            rows_of_it = measure_tasks(its, tokenizer, tasks, [layout.time_text()], name=other.label, **settings)
        # Their differences are from the other model unfolded, and not from the first one, as a reader would think.
        about = about_beside(other, layout) | {"difference": None}
        found += [row | about for row in rows_of_it if row["method"] == layout.time_text()]
    return found


def _of_task(
    task: "NamedTask", layouts: Sequence[KVLayout], lm: "FoldLM", theirs: Callable[[], "HFLM"] | None, kept: Cells,
    asked: dict[str, Any],
) -> list[tuple[dict[str, Any], dict[str, Any]]]:  # fmt: skip
    """What rows say of their method, and the cell of one task under it; measured unless it is there."""
    limit, loaded = asked["limit"], cache(lambda: _loaded(task))

    def measured(layout: KVLayout, name: str) -> dict[str, Any]:
        lm.layout, lm.about = layout, name
        return _measured(lm, task, loaded(), limit)

    found = []
    for layout in layouts:
        name = " ".join(filter(None, [task.name, str(task.length_tokens or ""), layout.time_text()]))
        cell = kept.measured(name, asked | {"layout": layout_key(layout)}, partial(measured, layout, name))
        found.append((method_about(layout), cell))
    if theirs is not None:
        title = f"transformers {transformers.__version__} by lm-eval's hf"
        asked, name = asked | {"peer": title}, f"{task.name} {_PEER}"
        cell = kept.measured(name, asked, lambda: _scored(theirs(), task, loaded(), limit))
        found.append(({"method": _PEER, "title": title}, cell))
    return found


def check_tasks(names: Sequence[str], folder: str | Path | None = None) -> None:
    """Raises `UserError` for tasks that can't be found, and where lm-eval is not installed; fetches nothing."""
    need_packages("lm_eval", "accelerate", extra="eval", what="scoring tasks")
    from kvfold.eval.lm_eval import find_tasks

    with _unlogged():
        find_tasks(names, folder=folder)


def _loaded(task: "NamedTask") -> dict[str, Any]:
    try:
        with _unseen():
            return task.load()
    except ImportError as error:
        missing = error.name or getattr(error.__cause__, "name", None) or "a package"
        raise UserError(
            f"task '{task.name}': it needs {missing}, which is not installed: run pip install 'kvfold[eval]'"
        ) from error
    except Exception as error:
        # Whatever lies between here and somebody else's data: loaders, the network, a hub.
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise RuntimeError(f"task '{task.name}': its data can't be had ({why})") from error


def _measured(lm: "FoldLM", task: "NamedTask", loaded: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    """What is kept of one task under the method that `lm` has now."""
    lm.take_kept()
    found = _scored(lm, task, loaded, limit)
    kept = lm.take_kept()
    share = sum(share for share, _ in kept) / len(kept)
    return found | {
        "compression": 1 / share,
        "kept_tokens": sum(share * seen for share, seen in kept) / len(kept),
        "seen_tokens": sum(seen for _, seen in kept) / len(kept),
        "requests": len(kept),
    }


def _scored(lm: "HFLM", task: "NamedTask", loaded: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    """Scores of one task by any model of lm-eval's, and the log probabilities that they rest on."""
    from lm_eval.evaluator import evaluate

    for one in loaded["tasks"].values():
        # As lm-eval's own command does.
        if one.get_config("num_fewshot") is None:
            one.set_config(key="num_fewshot", value=0)
        one.set_fewshot_seed(seed=_SEED)
    torch.manual_seed(_SEED)
    begun = time.perf_counter()
    with _unseen():
        results = evaluate(lm=lm, task_dict=loaded, limit=limit, log_samples=True)
    return {
        "scores": _scores(task, results),
        "likelihoods": likelihoods(results["samples"]),
        "seconds": time.perf_counter() - begun,
    }


def _scores(task: "NamedTask", results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of the task, or of a group's parts where the group has no score of its own: a dict for each metric."""
    own = results.get("groups", {}).get(task.name) or results["results"].get(task.name) or {}
    parts = {task.name: own} if any("," in key for key in own) else results["results"]
    found = []
    for name, scores in parts.items():
        samples = results["samples"].get(name, [])
        items = results["n-samples"][name]["effective"] if name in results["n-samples"] else scores.get("sample_len")
        for key, value in scores.items():
            metric, comma, sieve = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            # RULER's metrics are called by the lengths of prompts, and are -1 for those that were not asked.
            if metric.isdigit() and value == -1:
                continue
            error = scores.get(f"{metric}_stderr,{sieve}")
            each = [sample.get(metric) for sample in samples if sample.get("filter") == sieve]
            shown = "string_match" if metric.isdigit() else metric
            found.append({
                "task": name,
                "metric": shown if sieve == "none" else f"{shown}, {sieve}",
                "value": value,
                "standard_error": error if isinstance(error, int | float) else None,
                "higher_is_better": results["higher_is_better"].get(name, {}).get(metric),
                "items": items,
                "each": [float(one) for one in each] if each and all(isinstance(x, int | float) for x in each) else None,
            })  # fmt: skip
    return found


def _rows(task: "NamedTask", measured: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each method and score; the first method is the unfolded model."""
    unfolded = {(score["task"], score["metric"]): score for score in measured[0][1]["scores"]}
    rows = []
    for about, cell in measured:
        for score in cell["scores"]:
            each, theirs = score["each"], unfolded[score["task"], score["metric"]]["each"]
            mean, error = paired_difference(each, theirs) if each and theirs else (None, None)
            figures = {key: value for key, value in score.items() if key != "each"}
            apart = largest_difference(cell.get("likelihoods"), measured[0][1].get("likelihoods"))
            rows.append({
                **about,
                **figures,
                "length_tokens": task.length_tokens,
                "difference": {"mean": mean, "standard_error": error},
                "largest_likelihood_difference": apart,
                **{key: value for key, value in cell.items() if key not in ("scores", "likelihoods")},
            })  # fmt: skip
    return rows


@contextmanager
def _unlogged() -> Iterator[None]:
    """lm-eval without its notes."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _unseen() -> Iterator[None]:
    """lm-eval without its lines on stdout and its bars; what our model reports is still heard."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def likelihoods(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[float] | None:
    """The log probabilities, nats, that lm-eval was given for the requests of all samples, in their order; None where what a
    model wrote was asked.
    """
    told = [sample["resps"] for of_task in samples.values() for sample in of_task]
    scored = [some for some in told if all(one and isinstance(one[0], tuple | list) for one in some)]
    return [float(answer) for some in scored for (answer, *_), *_ in some] or None


def largest_difference(one: Sequence[float] | None, other: Sequence[float] | None) -> float | None:
    """Between the two answers to any request, nats; None where they were not asked the same number of them."""
    if one is None or other is None or len(one) != len(other):
        return None
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
