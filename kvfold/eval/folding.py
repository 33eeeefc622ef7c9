"""One model under many methods, read in the same way: the weights stay, each cache has a layout of its own; how many windows
are read, how long, how many at once, in calls of how many tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from kvfold.cache.hf import FoldCache
from kvfold.errors import UserError
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.gates import gate_table

CALL_TOKENS = 64
"""Tokens a row of one call, of methods whose state does not depend on where calls are cut, unless asked otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """One way of measuring; rows of one table share it."""

    windows: int = 32
    """Windows of each text, evenly spaced over it."""
    context_tokens: int = 1024
    """Tokens of a window."""
    batch: int = 32
    """Windows read side by side, in one cache."""
    call_tokens: int | None = None
    """Tokens a row of one call, for prefix methods; None = CALL_TOKENS. It changes no result. Steps methods read one."""

    def __post_init__(self) -> None:
        for name, least in (("windows", 1), ("context_tokens", 2), ("batch", 1), ("call_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} {value}: it is {least} or more: ask for more")


@contextmanager
def folded_cache(model: FoldForCausalLM, layout: KVLayout, rows: int) -> Iterator[FoldCache]:
    """An empty cache of this layout to read text into, freed at the end; inside, torch keeps nothing for gradients."""
    with torch.inference_mode():
        cache = model.new_cache(rows=rows, time=layout.time_text(), bits=layout.bits_text())
        try:
            yield cache
        finally:
            cache.free()


def method_layouts(model: FoldForCausalLM, methods: Sequence[str]) -> list[KVLayout]:
    """The model's layout under each `--time` text, each once. Raises `UserError` for a method that can't be run."""
    layouts = list(dict.fromkeys(model.config.layout.with_time(method) for method in methods))
    for layout in layouts:
        gate_table(model.config.gate_config, layout, freed_owners=model.config.freed_owners)
    return layouts


def with_unfolded(model: FoldForCausalLM, layouts: Sequence[KVLayout]) -> list[KVLayout]:
    """The unfolded layout first, then the others."""
    return list(dict.fromkeys([model.config.layout.base(), *layouts]))


def calls(layout: KVLayout, tokens: int, size: int | None = None, begun: int = 0) -> Iterator[tuple[int, int]]:
    """Where calls begin and end when a text is read for measuring, `size` (None = CALL_TOKENS) tokens each.

    The first `begun` tokens have been read. Rows of several lengths: `tokens` and `begun` are those of the longest.

    Under a steps method the cut matters once a budget is exceeded: from there on calls bring one token. Before, all is
    kept and all weights are counted, however the text is cut.
    """
    steps = [spec for spec in layout.time if not spec.chunk_invariant]
    start = begun
    while start < tokens:
        stop = min(start + (size or CALL_TOKENS), tokens)
        if any(spec.max_kept(stop) < stop for spec in steps):
            stop = start + 1
        yield start, stop
        start = stop


def method_about(layout: KVLayout) -> dict[str, object]:
    """A method's text form, what people call it, and whether it was trained."""
    specs = [layout.time_of(owner) for owner in layout.owners]
    asked = [
        spec for spec, owner in zip(layout.time, layout.owners, strict=True) if layout.layers[owner].window is None
    ]
    titles = list(dict.fromkeys(spec.title for spec in asked or layout.time))
    return {
        "method": layout.time_text(),
        "title": titles[0] if len(titles) == 1 else "mixed",
        "trained": any(spec.trained for spec in specs),
    }
