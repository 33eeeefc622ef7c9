"""The search for a learning rate as the authors of CLA did it: raise it by a factor until held-out perplexity stops improving."""

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvfold.errors import UserError
from kvfold.train.loop import DivergedError
from kvfold.train.pretrain_settings import PretrainSettings
from kvfold.train.results import staged
from kvfold.train.run_folder import RunFolder, leads

TrainOne = Callable[[PretrainSettings, RunFolder], dict[str, Any]]
"""Trains one model in its folder, or goes on; gives its facts on the leading process."""


def sweep(
    settings: PretrainSettings, factor: float, out: Path, train_one: TrainOne, *, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], Path]:
    """The facts of each run, the lowest rate first, each with a `note`, and the folder of the best.

    A run has its folder below `out`; what is done there is not done again. A rate at which the loss is no number is noted
    and ends the search. Raises `RuntimeError` where the very first one is.

    Source: arXiv 2405.12981, section 3.3.
    Differs: none.
    """
    rows: list[dict[str, Any]] = []
    best: dict[str, Any] | None = None
    for rate in rates(settings.learning_rate, factor):
        found = _outcome(settings.with_values(learning_rate=rate), RunFolder(out=out / f"lr-{rate:g}"), train_one)
        rows.append(found)
        if found["note"]:
            say(f"learning rate {rate:g}: {found['told']}")
            break
        say(f"learning rate {rate:g}: held-out perplexity {found['validation_perplexity']:.2f}")
        if best is not None and not found["validation_perplexity"] < best["validation_perplexity"]:
            break
        best = found
    if best is None:
        raise RuntimeError(f"the sweep's first run came to nothing: {rows[0]['told']}: begin at a lower learning rate")
    best["note"] = "best"
    return rows, out / f"lr-{best['learning_rate']:g}"


def rates(first: float, factor: float) -> Iterator[float]:
    """`first`, then each `factor` times the one before, to six digits. Raises `UserError` for a factor that raises nothing."""
    if not factor > 1:
        raise UserError(f"--sweep-lr {factor:g}: each rate is so many times the one before: use more than 1, e.g. 1.5")
    return (float(f"{first * factor**step:.6g}") for step in itertools.count())


def _outcome(settings: PretrainSettings, folder: RunFolder, train_one: TrainOne) -> dict[str, Any]:
    """The facts of one run: those that lie there, or new ones."""
    about = {"learning_rate": settings.learning_rate, "seed": settings.seed, "note": ""}
    failed = folder.read("diverged")
    if failed is None:
        try:
            return {**(folder.finished() or train_one(settings, folder) or folder.finished()), **about}
        except DivergedError as error:
            failed = {"told": str(error)}
            if leads():
                folder.write("diverged", failed)
    return {**failed, **about, "note": "diverged"}


def copy_result(best: Path, out: Path, *, card: str) -> None:
    """The best run's files beside the runs, as the sweep's own result, with a card of its own."""
    with staged(out, card) as folder:
        for file in best.iterdir():
            if file.is_file():
                shutil.copy2(file, folder / file.name)
