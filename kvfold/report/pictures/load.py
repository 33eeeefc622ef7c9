"""How long clients of a server waited, as a PNG: the share of answers that were there after so many seconds."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from kvfold.data.whole_file import write_whole_file
from kvfold.errors import UserError, need_packages
from kvfold.report.pictures.png import COLOURS, INK, LEVEL, SOFT


def save_load_png(rows: Sequence[Mapping[str, Any]], out: Path) -> Path:
    """Draw what `bench_serve` measured of each endpoint to `out`: first tokens at the left, whole answers at the right.

    UserError where matplotlib is missing or no answer came; nothing half-written is left.
    """
    need_packages("matplotlib", extra="plot", what="a PNG")
    if not any(row["points"] for row in rows):
        raise UserError("there is nothing to draw: no request was answered")
    picture = BytesIO()
    _figure(rows).savefig(picture, format="png", dpi=200)
    return write_whole_file(Path(out), picture.getvalue())


def _figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.7), layout="constrained", facecolor="white")
    places = figure.subplots(1, 2, sharey=True)
    for place, title, end in zip(places, ("First token", "Whole answer"), (1, 2), strict=True):
        place.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
        place.set_xlabel("seconds after the request", color=SOFT)
        place.grid(color=LEVEL)
        place.set_axisbelow(True)
        place.spines[["top", "right"]].set_visible(False)
        for index, row in enumerate(rows):
            waits = sorted(point[end] - point[0] for point in row["points"])
            # An answer that failed never comes: its line ends below 1.
            shares = [(place_of + 1) / row["requests"] for place_of in range(len(waits))]
            place.step([0.0, *waits], [0.0, *shares], where="post", color=COLOURS[1 + index % 7], label=_name(row))
        place.set_xlim(left=0)
        place.set_ylim(0, 1.02)
    places[0].set_ylabel("share of requests", color=SOFT)
    places[1].legend(frameon=False, loc="lower right", fontsize=8)
    return figure


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['model']} at {row['url']}: {row['output_tokens_per_s']:.0f} tokens/s"
