"""Speed: tokens per second of two sides at each point, bars from zero, with the spread of the runs. Decoding has kvfold
and its peer as sides, a step of a retrofit itself with and without gates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvfold.report.markup import Markup, tag
from kvfold.report.numbers import count, spread, three, tick, times
from kvfold.report.pictures.drawing import Frame, picture, ticks, write
from kvfold.report.results import number, words
from kvfold.report.series import UNFOLDED, label_of

ROW, BAR = 70, 17
"""Height of one point with both its bars, and of one bar."""


def point_name(row: Mapping) -> str:
    """`8 x 1,024`, and how it differs from the plain case: padded rows, a method that folds."""
    name = words(row, "point").replace(" x ", " × ") or "unnamed point"
    method = words(row, "method")
    extras = [method] if method and method != UNFOLDED else []
    extras += ["left-padded rows"] if row.get("padded") is True else []
    return ", ".join([name, *extras])


def step_name(row: Mapping) -> str:
    """`DMS 128, all weights, 1 × 1,024 tokens`."""
    size = [count(value) for key in ("batch_sequences", "sequence_tokens") if (value := number(row, key))]
    trains = TRAINED.get(words(row, "trains"), words(row, "trains"))
    return ", ".join(filter(None, [label_of(row), trains, f"{' × '.join(size)} tokens" if size else ""]))


TRAINED = {"full": "all weights", "lora": "a low-rank addition", "adapter": "gates alone"}
"""What learns in a step, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sides:
    """What stands beside what."""

    first: tuple[str, str]
    """Key in a row, and name at its bar."""
    second: tuple[str, str]
    name: Callable[[Mapping], str]
    """What a point is called."""
    spoken: str
    """What a screen reader says of the picture."""

    @property
    def bars(self) -> tuple[tuple[str, str, str], ...]:
        """Key, name and class of each bar."""
        return (*self.first, "ours"), (*self.second, "theirs")


DECODE = Sides(
    first=("ours", "kvfold"), second=("theirs", "transformers"), name=point_name,
    spoken="Tokens per second of kvfold and transformers. The table below has the numbers.",
)  # fmt: skip
STEP = Sides(
    first=("with_gates", "with gates"), second=("gates_off", "gates off"), name=step_name,
    spoken="Tokens per second of training with and without gates. The table below has the numbers.",
)  # fmt: skip


def speed_picture(rows: Sequence[Mapping], sides: Sides, width: float) -> Markup | None:
    """One SVG, or None where no row has a speed."""
    rows = [row for row in rows if any(number(row, side, "tokens_per_second", "median") for side, _, _ in sides.bars)]
    if not rows:
        return None
    fastest = max(
        number(row, side, "tokens_per_second", edge) or 0
        for row in rows
        for side, _, _ in sides.bars
        for edge in ("median", "max")
    )
    height = 24 + ROW * len(rows) + 44
    frame = Frame(
        left=92, right=width - 70, top=24, bottom=height - 44, x_range=(0, fastest * 1.02), y_range=(0, 1)
    )  # fmt: skip
    x_ticks = [(value, tick(value)) for value in ticks(0, fastest, 3 if width < 500 else 6)]
    parts = frame.axes(x_ticks, [], "tokens per second", "")
    for value, _ in x_ticks:
        x = frame.x(value)
        parts.append(tag("line", class_="level", x1=x, x2=x, y1=frame.top, y2=frame.bottom))
    for index, row in enumerate(rows):
        parts.extend(_point(row, sides, frame, frame.top + index * ROW))
    return picture(width, height, sides.spoken, *parts)


def _point(row: Mapping, sides: Sides, frame: Frame, top: float) -> list[Markup]:
    parts = [write(0, top + 10, sides.name(row), "name")]
    for index, (side, name, class_) in enumerate(sides.bars):
        y = top + 17 + index * (BAR + 3)
        parts.append(write(frame.left - 8, y + BAR - 4, name, "tick", "end"))
        low, median, high = (number(row, side, "tokens_per_second", edge) for edge in ("min", "median", "max"))
        if median is None:
            parts.append(write(frame.left + 6, y + BAR - 4, "not measured", "quiet"))
            continue
        around = spread(low, high)
        hover = f"{name}, {sides.name(row)}: {three(median)} tokens/s" + (f", runs from {around}" if around else "")
        parts.append(
            tag(
                "rect", tag("title", hover), class_=f"bar {class_}",
                x=frame.left, y=y, width=max(0.0, frame.x(median) - frame.left), height=BAR,
            )
        )  # fmt: skip
        if around:
            middle = y + BAR / 2
            parts.append(tag("line", class_="runs", x1=frame.x(low), x2=frame.x(high), y1=middle, y2=middle))
    ratio = number(row, "ratio", "median")
    if ratio is not None:
        around = spread(number(row, "ratio", "min"), number(row, "ratio", "max"))
        parts.append(
            tag(
                "g",
                tag("title", f"runs from {around}" if around else "one run"),
                write(frame.right + 12, top + 41, times(ratio), "big"),
            )
        )
    return parts
