"""How far training is: a bar with the time left on a terminal, a line once in a while elsewhere. No torch."""

import math
import time as clock
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

_SECONDS_BETWEEN_LINES = 60.0
"""Where stderr is no terminal, a line as often as this says how far training is."""

OnStep = Callable[[dict[str, Any]], None]


@contextmanager
def watched_steps(total: int, done: int, say: Callable[[str], None]) -> Iterator[OnStep]:
    """Inside, what is to be told of each step: with its loss, and the compression where there is one. `say` prints a line."""
    console = Console(stderr=True)
    if console.is_interactive:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("training"), BarColumn(bar_width=10), MofNCompleteColumn(), TimeRemainingColumn())
        bar = Progress(*columns, TextColumn("left, {task.fields[told]}"), console=console)
        task = bar.add_task("training", total=total, completed=done, told="", start=False)

        def draw(point: dict[str, Any]) -> None:
            if not bar.live.is_started:
                bar.start()
                bar.start_task(task)
            bar.update(task, completed=point["step"], told=_told(point))
            if point["step"] >= total:
                bar.stop()

        try:
            yield draw
        finally:
            if bar.live.is_started:
                bar.stop()
    else:
        yield _Lines(total, done, say).add


class _Lines:
    """A line once in a while."""

    def __init__(self, total: int, done: int, say: Callable[[str], None]):
        self._total, self._first, self._say = total, done, say
        self._last, self._begun = clock.monotonic(), None

    def add(self, point: dict[str, Any]) -> None:
        """A step is done."""
        now = clock.monotonic()
        if self._begun is None:
            # What came before the first step, such as fitted gates, says nothing of the pace.
            self._begun = now - point["seconds"]
        if now - self._last < _SECONDS_BETWEEN_LINES and "validation_perplexity" not in point:
            return
        self._last = now
        left = (now - self._begun) / (point["step"] - self._first) * (self._total - point["step"])
        self._say(f"step {point['step']:,} of {self._total:,}, {math.ceil(left / 60)} min left; {_told(point)}")


def _told(point: dict[str, Any]) -> str:
    told = f"loss {point['loss']:.3f}"
    if "compression" in point:
        told += f", compression {point['compression']:.2f} of {point['target_compression']:.2f}"
    if "validation_perplexity" in point:
        told += f", held-out perplexity {point['validation_perplexity']:.2f}"
    return told
