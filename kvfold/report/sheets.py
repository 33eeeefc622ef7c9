"""The tables behind the pictures, as plain text cells: made once, printed by the terminal and by the page alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvfold.report.numbers import MISSING, count, difference, middle, percent, size, three, times
from kvfold.report.pictures.decode import point_name
from kvfold.report.pictures.kept import head_map
from kvfold.report.pictures.memory import memory_points
from kvfold.report.results import grid, number, words
from kvfold.report.series import label_of

MOST_LINES = 200
"""Lines of a table over time; longer ones show evenly spaced lines, and say so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column."""

    head: str
    """What stands above it."""
    note: str = ""
    """What it means, one sentence; "" where the head says it all."""
    brief: bool = True
    """Whether a terminal of ordinary width shows it too."""
    is_text: bool = False
    """Words, set to the left; numbers are set to the right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """One table."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    """Cells, as many in a row as there are columns."""


QUALITY_COLUMNS = (
    Column(head="method", is_text=True),
    Column(head="text", is_text=True),
    Column(
        head="trained",
        note="Whether the model was trained for the method; on how much text, where known.",
        brief=False,
        is_text=True,
    ),
    Column(head="perplexity", note="How surprised the model is by the next token; lower is better."),
    Column(head="change", note="Perplexity against the unfolded model on the same windows, ± one standard error."),
    Column(head="loss difference", note="The same as a difference of the loss, nats a token.", brief=False),
    Column(head="bits a byte", note="Loss spread over the bytes of the text.", brief=False),
    Column(head="KL", note="Mean divergence of the next-token distribution from the unfolded model's, nats."),
    Column(head="same top-1", note="Share of positions at which the likeliest next token is the unfolded model's."),
    Column(head="kept", note="Tokens that one head holds at the end of a window, mean over heads."),
    Column(head="compression", note="Tokens seen over tokens kept at the end of each window."),
    Column(head="over time", note="The same as a mean over the whole window.", brief=False),
    Column(
        head="bytes held", note="What the cache has allocated at the end, for all windows that were read side by side."
    ),
    Column(head="rounding", note="Of them, places of pages that no token fills: pages are held whole.", brief=False),
    Column(head="ring", note="Of them, what a learned method keeps of the newest tokens beside pages.", brief=False),
    Column(head="full cache", note="Bytes of the same tokens with nothing dropped.", brief=False),
    Column(head="tokens/s", note="Tokens read per second while measuring quality; not a decode speed."),
    Column(head="scored", note="Tokens scored.", brief=False),
    Column(head="seconds", note="Time that the measurement took.", brief=False),
)


def quality_sheet(rows: Sequence[Mapping]) -> Sheet:
    """Every number of the quality rows."""
    return Sheet(title="Quality", columns=QUALITY_COLUMNS, rows=tuple(_quality_cells(row) for row in rows))


def _quality_cells(row: Mapping) -> tuple[str, ...]:
    change, loss = (
        [number(row, key, part) for part in ("mean", "standard_error")]
        for key in ("perplexity_change_percent", "loss_difference")
    )
    return (
        label_of(row),
        words(row, "text") or "unnamed",
        _trained(row),
        three(number(row, "perplexity")),
        difference(*change, "%"),
        difference(*loss),
        three(number(row, "bits_per_byte")),
        three(number(row, "kl")),
        percent(number(row, "top1_agreement")),
        count(number(row, "kept_tokens")),
        times(number(row, "compression")),
        times(number(row, "compression_mean_over_time")),
        size(number(row, "allocated_bytes")),
        *(size(number(row, "bytes_by_use", use)) for use in ("rounding", "rings")),
        size(number(row, "full_bytes")),
        three(number(row, "tokens_per_second")),
        count(number(row, "tokens")),
        three(number(row, "seconds")),
    )


def _trained(row: Mapping) -> str:
    if (tokens := number(row, "trained_tokens")) is not None:
        return f"{count(tokens)} tokens"
    trained = row.get("trained")
    return ("yes" if trained else "no") if isinstance(trained, bool) else MISSING


def passkey_sheet(rows: Sequence[Mapping], labels: Mapping[str, str]) -> Sheet:
    """Keys found per method, length and depth; `labels` gives the name of a method's text form."""
    heads = ("length, tokens", "depth", "found", "tries")
    columns = (Column(head="method", is_text=True), *(Column(head=head) for head in heads))
    cells = tuple(
        (
            labels.get(words(row, "method"), label_of(row)),
            count(number(row, "length_tokens")),
            percent(number(row, "depth")),
            count(number(row, "found")),
            count(number(row, "tries")),
        )
        for row in rows
    )
    return Sheet(title="Passkey retrieval", columns=columns, rows=cells)


TASK_COLUMNS = (
    Column(head="task", is_text=True),
    Column(head="length", note="Tokens of a prompt, for tasks that are made to any length.", brief=False),
    Column(head="method", is_text=True),
    Column(head="score", is_text=True),
    Column(head="value", note="The score, ± one standard error over the questions."),
    Column(head="change", note="Against the unfolded model, question by question, ± one standard error."),
    Column(head="questions"),
    Column(head="seen", note="Tokens of a request that were read, mean over requests.", brief=False),
    Column(head="kept", note="Tokens that one head holds at the end of a request, mean over heads and requests."),
    Column(head="compression", note="Tokens seen over tokens kept at the end of each request."),
    Column(head="seconds", note="Time that the measurement took."),
)


def tasks_sheet(rows: Sequence[Mapping]) -> Sheet:
    """Scores of tasks, one line for each task, method and score."""
    cells = tuple(
        (
            words(row, "task") or MISSING,
            count(number(row, "length_tokens")),
            label_of(row),
            words(row, "metric") or MISSING,
            _with_error(number(row, "value"), number(row, "standard_error")),
            difference(number(row, "difference", "mean"), number(row, "difference", "standard_error")),
            count(number(row, "items")),
            count(number(row, "seen_tokens")),
            count(number(row, "kept_tokens")),
            times(number(row, "compression")),
            three(number(row, "seconds")),
        )
        for row in rows
    )
    return Sheet(title="Tasks", columns=TASK_COLUMNS, rows=cells)


def _with_error(value: float | None, error: float | None) -> str:
    return three(value) if value is None or error is None else f"{three(value)} ± {three(error)}"


def memory_sheet(rows: Sequence[Mapping]) -> Sheet:
    """Bytes held, a line per number of tokens, a column per method."""
    series = [(label_of(row), dict(memory_points(row))) for row in rows]
    tokens = sorted({at for _, points in series for at in points})
    shown, every = thinned(tokens), -(-len(tokens) // MOST_LINES)
    title = "Memory over time" + (f" (every {every}th measured point, and the last)" if every > 1 else "")
    columns = (Column(head="tokens seen"), *(Column(head=label) for label, _ in series))
    return Sheet(
        title=title,
        columns=columns,
        rows=tuple((count(at), *(size(points.get(at)) for _, points in series)) for at in shown),
    )


def kept_sheets(row: Mapping) -> list[Sheet]:
    """One method's kept counts and, where it has them, scores: a line per layer, a column per head."""
    one = head_map(row)
    if one is None:
        return []
    sheets = []
    for key, name in (("kept", "tokens kept"), ("score", words(row, "value_name") or "score")):
        cells = grid(row, key)
        if cells:
            num_heads = max(len(line) for line in cells)
            columns = (Column(head="layer"), *(Column(head=f"head {head}") for head in range(num_heads)))
            write = count if key == "kept" else three
            lines = tuple(
                (str(owner), *(_cell(line, head, write, key) for head in range(num_heads)))
                for owner, line in zip(one.owners, cells, strict=False)
            )
            seen = number(row, "seen_tokens")
            of = f" of {count(seen)} seen" if key == "kept" and seen else ""
            sheets.append(Sheet(title=f"{label_of(row)}: {name}{of}", columns=columns, rows=lines))
    return sheets


def _cell(line: Sequence[float | None], head: int, write, key: str) -> str:
    absent = head >= len(line) or (key == "kept" and line[head] == -1)
    return "–" if absent else write(line[head])


def thinned(values: Sequence[float]) -> list[float]:
    """At most about `MOST_LINES` of them, evenly spaced, the last included."""
    step = -(-len(values) // MOST_LINES) or 1
    return sorted({*values[::step], *values[-1:]})


DECODE_COLUMNS = (
    Column(head="point", is_text=True),
    Column(head="batch", note="Rows read and written together.", brief=False),
    Column(head="context", note="Tokens of the prompt, a row.", brief=False),
    Column(head="new", note="Tokens generated, a row.", brief=False),
    Column(head="kvfold, tokens/s", note="Median of the runs, smallest and largest behind it."),
    Column(head="transformers, tokens/s", note="Median of the runs, smallest and largest behind it."),
    Column(head="ratio", note="kvfold over transformers, both from one run."),
    Column(head="kvfold, ms a step", brief=False),
    Column(head="transformers, ms a step", brief=False),
    Column(head="kvfold, cache", note="Bytes of the cache at the end."),
    Column(head="transformers, cache", note="Bytes of the cache at the end."),
    Column(head="kvfold, peak", note="Peak memory of the process.", brief=False),
    Column(head="transformers, peak", note="Peak memory of the process.", brief=False),
)


_BESIDE_COLUMNS = (
    Column(head="over the first", note="This row over the first of its point, both kvfold's and from one run."),
    Column(head="compression", note="Tokens seen, over tokens kept at the end."),
)
"""What rows have besides that were measured beside each other."""


def decode_sheet(rows: Sequence[Mapping]) -> Sheet:
    """Speed, step time and memory of both sides at each point."""
    beside = any("over_first" in row for row in rows)
    cells = tuple(
        (
            point_name(row),
            *(count(number(row, key)) for key in ("batch", "context_tokens", "new_tokens")),
            *(spread_cell(row, side, "tokens_per_second") for side in ("ours", "theirs")),
            spread_cell(row, "ratio", unit="×"),
            *(spread_cell(row, side, "step_ms") for side in ("ours", "theirs")),
            *(size(number(row, side, "allocated_bytes")) for side in ("ours", "theirs")),
            *(size(number(row, side, "peak_bytes")) for side in ("ours", "theirs")),
            *((spread_cell(row, "over_first", unit="×"), times(number(row, "compression"))) if beside else ()),
        )
        for row in rows
    )
    columns = DECODE_COLUMNS + _BESIDE_COLUMNS if beside else DECODE_COLUMNS
    return Sheet(title="Decode speed", columns=columns, rows=cells)


def spread_cell(row: Mapping, *keys: str, unit: str = "") -> str:
    """A median with the smallest and largest behind it."""
    return middle(*(number(row, *keys, edge) for edge in ("min", "median", "max")), unit)


PLAN_COLUMNS = (
    (
        "bytes_per_token",
        count,
        Column(head="bytes a token", note="Keys and values that one more token adds while nothing is dropped."),
    ),
    ("bytes", size, Column(head="bytes in all", note="At the planned batch and context, everything counted.")),
    ("compression", times, Column(head="times smaller", note="Bytes in all, against the first line.")),
    ("max_rows", count, Column(head="largest batch", note="Rows of the planned context that fit the memory.")),
    (
        "max_context_tokens",
        count,
        Column(
            head="longest context", note="Tokens a row that fit the memory, and at most what the model was made for."
        ),
    ),
)


def plan_sheet(rows: Sequence[Mapping]) -> Sheet:
    """Planned bytes, a line per way of folding; what no row says is no column."""
    shown = [one for one in PLAN_COLUMNS if any(number(row, one[0]) is not None for row in rows)]
    columns = (Column(head="cache", is_text=True), *(column for _, _, column in shown))
    cells = tuple(
        (
            words(row, "name") or "unnamed",
            *("–" if number(row, key) is None else say(number(row, key)) for key, say, _ in shown),
        )
        for row in rows
    )
    return Sheet(title="Plan", columns=columns, rows=cells)
