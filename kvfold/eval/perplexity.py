"""Perplexity of text read through the cache, one cell for each text and method, and the table that compares methods.

A cell holds a figure for each window, so that methods are compared on the same windows: the unfolded model is read first
and its states are what every other method's next-token distributions are held against.
Letters: W windows, B rows, T tokens of a window, C model width.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import stdev
from typing import Any

import torch
from torch import Tensor

from kvfold.data import TextWindows, read_text_file, text_windows
from kvfold.eval.cells import (
    Beside,
    Cells,
    about_beside,
    check_labels,
    ids_key,
    layout_key,
    model_about,
    model_key,
    opened,
)
from kvfold.eval.progress import Report, silent
from kvfold.eval.reading import Protocol, Reading, method_about, method_layouts, read_rows, score, with_unfolded
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.decoder import FoldForCausalLM


def quality_row(
    about: Mapping[str, Any], windows: TextWindows, cell: Mapping[str, Any], unfolded: Mapping[str, Any]
) -> dict[str, Any]:
    """One row of a `quality` result: what `about` says of the method, and the figures of its cell against the unfolded one's."""
    scored_tokens, loss = windows.num_windows * (windows.context_tokens - 1), _mean(cell["loss"])
    difference, error = paired_difference(cell["loss"], unfolded["loss"])
    change = math.exp(difference)
    return {
        **about,
        "text": windows.name,
        "tokens": scored_tokens,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss * scored_tokens / math.log(2) / sum(windows.scored_bytes),
        "loss_difference": {"mean": difference, "standard_error": error},
        # The error of exp(x) is exp(x) times that of x, for errors that are small.
        "perplexity_change_percent": {
            "mean": 100 * (change - 1),
            "standard_error": None if error is None else 100 * change * error,
        },
        "kl": _mean(cell["kl"]),
        "top1_agreement": _mean(cell["top1_agreement"]),
        "kept_tokens": windows.context_tokens / cell["compression"],
        **{name: cell[name] for name in _AS_MEASURED},
        # Cells of earlier versions lack it.
        **{name: cell[name] for name in ("bytes_by_use",) if name in cell},
    }


_AS_MEASURED = (
    *("compression", "compression_mean_over_time", "allocated_bytes", "full_bytes"),
    *("tokens_per_second", "seconds", "made"),
)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float | None]:
    """Mean of ours - theirs over pairs, and its standard error; None where there is one pair only."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return _mean(differences), error


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


_SCORED_COLUMNS = 16
"""Columns of states that gather before they are scored together."""


def measure_quality(
    model: FoldForCausalLM, tokenizer: Any, texts: Sequence[str | Path], methods: Sequence[str], *, name: str,
    beside: Sequence[Beside] = (), protocol: Protocol | None = None, cells: str | Path | Cells | None = None,
    report: Report = silent,
) -> dict[str, Any]:  # fmt: skip
    """A result of kind `quality`: one row for each text and method, the unfolded model first.

    `methods` are `--time` texts, `name` what the model is called. `beside`: other models, a row each under their own method,
    held against this one. Cells that `cells` (a folder) holds are not measured again.
    All texts and methods are checked before the first is measured; whatever is wrong raises `UserError`.
    """
    protocol = protocol or Protocol()
    check_labels(beside)
    layouts = with_unfolded(model, method_layouts(model, methods))
    most = model.config.max_position_embeddings
    sizes = {"windows": protocol.windows, "context_tokens": protocol.context_tokens, "most_context_tokens": most}
    read = [text_windows(read_text_file(path), tokenizer, **sizes) for path in texts]
    measured = _Measured(model=model, protocol=protocol, cells=Cells(cells), key=model_key(model, name), report=report)
    references = [_Reference(measured, windows, layouts[0]) for windows in read]
    rows = []
    for reference in references:
        found = [measured.cell_of(reference, layout) for layout in layouts]
        rows += [
            quality_row(method_about(layout), reference.windows, cell, found[0])
            for layout, cell in zip(layouts, found, strict=True)
        ]
    for other in beside:
        rows += _rows_beside(other, measured, references)
    rows.sort(key=lambda row: [windows.name for windows in read].index(row["text"]))
    return {
        "protocol": {"windows": protocol.windows, "context_tokens": protocol.context_tokens, "batch": protocol.batch},
        **model_about(model, measured.key),
        "rows": rows,
    }


def _rows_beside(other: Beside, measured: "_Measured", references: Sequence["_Reference"]) -> list[dict[str, Any]]:
    """Another model's rows, one for each text. Its full cache is the first model's."""
    rows = []
    with opened(other, measured.model) as model:
        key = model_key(model, other.label) | {"beside": measured.key["fingerprint"]}
        first, layout = measured.model.config.layout.base(), model.config.layout
        if len(first.owners) < first.num_layers:  # layouts of other sharing may have the same weights
            key["beside_layout"] = layout_key(first)
        theirs = replace(measured, model=model, key=key, label=other.label)
        for reference in references:
            cell, unfolded = theirs.cell_of(reference, layout), measured.cell_of(reference, reference.layout)
            row = quality_row(about_beside(other, layout), reference.windows, cell, unfolded)
            rows.append(row | {"full_bytes": unfolded["full_bytes"]})
    return rows


class _Reference:
    """The unfolded model on one text: its states, read once when somebody asks for them."""

    def __init__(self, measured: "_Measured", windows: TextWindows, layout: KVLayout):
        self.measured, self.windows, self.layout = measured, windows, layout
        self._states_WTC: Tensor | None = None

    def states(self) -> Tensor:
        """[W, T, C]."""
        if self._states_WTC is None:
            self.read(scores=False)
        return self._states_WTC

    def read(self, *, scores: bool) -> dict[str, Any]:
        """Read the text; the states are kept."""
        model = self.measured.model
        shape = (*self.windows.ids_WT.shape, model.config.hidden_size)
        states_WTC = torch.empty(shape, dtype=model.dtype, device=model.device)
        found = self.measured.read(self, self.layout, fills=states_WTC, scores=scores)
        self._states_WTC = states_WTC
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    """One model under one protocol."""

    model: FoldForCausalLM
    protocol: Protocol
    cells: Cells
    key: dict[str, Any]
    report: Report
    label: str = ""
    """What the model is called where it stands beside another."""

    def cell_of(self, reference: _Reference, layout: KVLayout) -> dict[str, Any]:
        """What was found under a layout; measured unless it is there."""
        windows, asked = reference.windows, self.protocol
        name, ids = f"{windows.name} {self.label} {layout.time_text()}", ids_key(*windows.ids_WT.tolist())
        key = {
            "model": self.key, "layout": layout_key(layout), "method": layout.time_text(), "text": windows.name,
            "text_sha256": windows.digest,
            "protocol": [asked.windows, asked.context_tokens, asked.batch, asked.call_tokens],
        }  # fmt: skip
        unfolded = self.model is reference.measured.model and layout == reference.layout
        measure = partial(reference.read, scores=True) if unfolded else partial(self.read, reference, layout)
        return self.cells.measured(name, key, measure, of=ids)

    def read(
        self, reference: _Reference, layout: KVLayout, *, fills: Tensor | None = None, scores: bool = True
    ) -> dict[str, Any]:
        """Read all windows under one layout. `fills`: the states [W, T, C] of the unfolded model, which this is, go there."""
        windows = reference.windows
        begun, done, total = time.perf_counter(), 0, windows.ids_WT.numel()
        what = f"{windows.name}, {self.label} {layout.time_text()}".replace(",  ", ", ")
        self.report(what, 0, total)
        readings, scored = [], []
        states_WTC = reference.states() if fills is None else None
        for first in range(0, windows.num_windows, self.protocol.batch):
            rows = slice(first, first + self.protocol.batch)
            ids_BT = windows.ids_WT[rows].to(self.model.device)
            theirs = None if states_WTC is None else (reference.measured.model, states_WTC[rows])
            scorer = _RowScorer(model=self.model, ids_BT=ids_BT, reference=theirs)

            def on_states(hidden_BtC: Tensor, start: int, rows: slice = rows, scorer: "_RowScorer" = scorer) -> None:
                nonlocal done
                if fills is not None:
                    fills[rows, start : start + hidden_BtC.shape[1]] = hidden_BtC
                if scores:
                    scorer.add(hidden_BtC)
                done += hidden_BtC.shape[0] * hidden_BtC.shape[1]
                self.report(what, done, total)

            readings.append(read_rows(self.model, layout, ids_BT, on_states, call_tokens=self.protocol.call_tokens))
            scored.append(scorer.window_means() if scores else {})
        return _cell(readings, scored, windows, time.perf_counter() - begun) if scores else {}


class _RowScorer:
    """Scores the states of some rows as they come; those of the last column predict a token that nobody knows."""

    def __init__(self, *, model: FoldForCausalLM, ids_BT: Tensor, reference: tuple[FoldForCausalLM, Tensor] | None):
        """`reference`: the unfolded model and its states [B, T, C]; None = this is it."""
        self._model, self._ids_BT, self._reference = model, ids_BT, reference
        self._waiting: list[Tensor] = []
        self._start, self._columns = 0, 0
        self._found: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, hidden_BtC: Tensor) -> None:
        """States of the next columns."""
        self._waiting.append(hidden_BtC)
        self._columns += hidden_BtC.shape[1]
        if self._columns >= _SCORED_COLUMNS or self._start + self._columns == self._ids_BT.shape[1]:
            self._score()

    def _score(self) -> None:
        start, stop = self._start, min(self._start + self._columns, self._ids_BT.shape[1] - 1)
        if stop > start:
            hidden_BtC = torch.cat(self._waiting, dim=1)[:, : stop - start]
            reference = self._reference and (self._reference[0], self._reference[1][:, start:stop].flatten(0, 1))
            targets = self._ids_BT[:, start + 1 : stop + 1].flatten()
            scores = score(self._model, hidden_BtC.flatten(0, 1), targets, reference)
            same = torch.zeros_like(scores.loss), torch.ones_like(scores.loss)
            kl, agrees = same if scores.kl is None else (scores.kl, scores.agrees)
            self._found.append(tuple(x.view(hidden_BtC.shape[:2]) for x in (scores.loss, kl, agrees)))
        self._waiting, self._start, self._columns = [], start + self._columns, 0

    def window_means(self) -> dict[str, list[float]]:
        """Mean over the scored tokens of each row."""
        parts = zip(("loss", "kl", "top1_agreement"), zip(*self._found, strict=True), strict=True)
        return {name: torch.cat(part, dim=1).double().mean(dim=1).tolist() for name, part in parts}


def _cell(
    readings: list[Reading], scored: list[dict[str, list[float]]], windows: TextWindows, seconds: float
) -> dict[str, Any]:
    """What is kept of one text under one method. Bytes are those of the first batch, the largest one."""
    weighted = [(len(part["loss"]), reading) for part, reading in zip(scored, readings, strict=True)]
    rows = windows.num_windows
    return {
        **{name: [value for part in scored for value in part[name]] for name in scored[0]},
        "compression": 1 / (sum(n * reading.kept_share[-1] for n, reading in weighted) / rows),
        "compression_mean_over_time": sum(n * reading.compression_over_time for n, reading in weighted) / rows,
        "allocated_bytes": readings[0].allocated_bytes,
        "full_bytes": readings[0].full_bytes,
        "bytes_by_use": asdict(readings[0].usage),
        "tokens_per_second": windows.ids_WT.numel() / sum(reading.seconds for reading in readings),
        "seconds": seconds,
    }
