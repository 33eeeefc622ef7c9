"""Saying how far a measurement or training is: a callback that the code calls, and a bar on stderr that listens to it."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Report = Callable[[str, int, int], None]
"""Takes what is being done, how much of it is done, and how much there is; a new text begins a new piece of work."""

PATIENCE_SECONDS = 2.0
"""Work that is over sooner shows no bar."""
SECONDS_BETWEEN_LINES = 60.0
"""Where no bar can be drawn, a line as often as this says how far the work is."""


def silent(what: str, done: int, total: int) -> None:
    """Nobody listens."""


@contextmanager
def progress_bars() -> Iterator[Report]:
    """A `Report` that draws one bar for each piece of work that takes a while, on stderr; they vanish at the end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bars = Progress(*columns, console=Console(stderr=True), transient=True)
    begun: dict[str, float] = {}
    shown: dict[str, int] = {}

    def report(what: str, done: int, total: int) -> None:
        start = begun.setdefault(what, time.monotonic())
        if what not in shown and done < total and time.monotonic() - start > PATIENCE_SECONDS:
            shown[what] = bars.add_task(what, total=total)
            bars.start()
        if what in shown:
            bars.update(shown[what], completed=done, total=total)
            if done >= total:
                bars.remove_task(shown.pop(what))
                begun.pop(what)

    try:
        yield report
    finally:
        # Stopping what never began would print an empty line.
        if bars.live.is_started:
            bars.stop()


def progress_lines(say: Callable[[str], None]) -> Report:
    """A `Report` for where no bar can be drawn: a line once a minute. `say` prints one."""
    begun: dict[str, tuple[float, int]] = {}
    last = time.monotonic()

    def report(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        start, first = begun.setdefault(what, (now, done))
        if done >= total:
            begun.pop(what)
        elif now - last >= SECONDS_BETWEEN_LINES and done > first:
            last = now
            left = (now - start) / (done - first) * (total - done)
            say(f"{what}: {100 * done / total:.0f} %, {max(1, round(left / 60))} min left")

    return report


OnStep = Callable[[dict[str, Any]], None]
"""Takes the figures of an optimizer step that is done."""


@contextmanager
def watched_steps(total: int, done: int, say: Callable[[str], None]) -> Iterator[OnStep]:
    """Inside, what is to be told of each optimizer step: with its loss, and the compression where there is one. `say` prints a
    line where stderr is no terminal.
    """
    console, last, begun = Console(stderr=True), time.monotonic(), None
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

    def tell(point: dict[str, Any]) -> None:
        nonlocal last, begun
        now = time.monotonic()
        if begun is None:
            # What came before the first step, such as fitted gates, says nothing of the pace.
            begun = now - point["seconds"]
        if now - last >= SECONDS_BETWEEN_LINES or "validation_perplexity" in point:
            last, left = now, (now - begun) / (point["step"] - done) * (total - point["step"])
            say(f"step {point['step']:,} of {total:,}, {math.ceil(left / 60)} min left; {_told(point)}")

    try:
        yield draw if console.is_interactive else tell
    finally:
        if bar.live.is_started:
            bar.stop()


def _told(point: dict[str, Any]) -> str:
    told = f"loss {point['loss']:.3f}"
    if "compression" in point:
        told += f", compression {point['compression']:.2f} of {point['target_compression']:.2f}"
    if "validation_perplexity" in point:
        told += f", held-out perplexity {point['validation_perplexity']:.2f}"
    return told
