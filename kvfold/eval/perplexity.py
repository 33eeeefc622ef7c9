"""Perplexity of text read through the cache, one cell for each text and method, and the table that compares methods.

A cell holds a figure for each window, so that methods are compared on the same windows: the unfolded model is read first
and its states are what every other method's next-token distributions are held against.
Letters: W windows, B rows, T tokens of a window, C model width.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.data.texts import read_text_file
from kvfold.data.windows import TextWindows, text_windows
from kvfold.eval.cells import Cells, layout_key, model_key
from kvfold.eval.folding import method_about, reads_steps
from kvfold.eval.progress import Report, silent
from kvfold.eval.protocol import Protocol
from kvfold.eval.reading import read_rows
from kvfold.eval.rows import quality_row
from kvfold.eval.scoring import score
from kvfold.layout import KVLayout
from kvfold.models.decoder import FoldForCausalLM

_SCORED_COLUMNS = 16
"""Columns of states that gather before they are scored together."""


def measure_quality(
    model: FoldForCausalLM,
    tokenizer: Any,
    texts: Sequence[str | Path],
    methods: Sequence[str],
    *,
    name: str,
    protocol: Protocol | None = None,
    cells: str | Path | None = None,
    report: Report = silent,
) -> dict[str, Any]:
    """A result of kind `quality`: one row for each text and method, the unfolded model first.

    `methods` are `--time` texts, `name` what the model is called. Cells that `cells` (a folder) holds are not measured again.
    All texts and methods are checked before the first is measured; whatever is wrong raises `ValueError`.
    """
    protocol = protocol or Protocol()
    unfolded = model.config.layout.base()
    layouts = list(dict.fromkeys([unfolded, *(model.config.layout.with_time(method) for method in methods)]))
    most = model.config.max_position_embeddings
    sizes = {"windows": protocol.windows, "context_tokens": protocol.context_tokens, "most_context_tokens": most}
    read = [text_windows(read_text_file(path), tokenizer, **sizes) for path in texts]
    measured = _Measured(model=model, protocol=protocol, cells=Cells(cells), key=model_key(model, name), report=report)
    rows = []
    for windows in read:
        found = measured.cells_of(windows, layouts)
        rows += [quality_row(method_about(layout), windows, cell, found[0]) for layout, cell in zip(layouts, found, strict=True)]
    return {
        "protocol": {"windows": protocol.windows, "context_tokens": protocol.context_tokens, "batch": protocol.batch},
        "model": {"name": name, "parameters": model.num_parameters(), "fingerprint": measured.key["fingerprint"]},
        "environment": {"device": model.device.type, "dtype": str(model.dtype).removeprefix("torch."), "threads": torch.get_num_threads()},
        "rows": rows,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    """One model under one protocol."""

    model: FoldForCausalLM
    protocol: Protocol
    cells: Cells
    key: dict[str, Any]
    report: Report

    def cells_of(self, windows: TextWindows, layouts: Sequence[KVLayout]) -> list[dict[str, Any]]:
        """A cell for each layout, the first being the unfolded one; only what is missing is measured."""
        keys = [self._key_of(windows, layout) for layout in layouts]
        names = [f"{windows.name} {layout.time_text()}" for layout in layouts]
        found = [self.cells.read(*pair) for pair in zip(names, keys, strict=True)]
        if all(found):
            return found
        states_WTC = self._states(windows, layouts[0])
        for index, layout in enumerate(layouts):
            if found[index] is None:
                found[index] = self._measure(windows, layout, states_WTC, unfolded=index == 0)
                self.cells.write(names[index], keys[index], found[index])
        return found

    def _key_of(self, windows: TextWindows, layout: KVLayout) -> dict[str, Any]:
        protocol = self.protocol
        call_tokens = 1 if reads_steps(layout) else protocol.call_tokens
        return {
            "model": self.key,
            "layout": layout_key(layout),
            "method": layout.time_text(),
            "text": windows.name,
            "text_sha256": windows.digest,
            "protocol": [protocol.windows, protocol.context_tokens, protocol.batch, call_tokens],
        }
