"""The tables behind the pictures, as plain text cells: made once, printed by the terminal and by the page alike.

A column is its head, how a row's cell is written, and what it means. Tables of models from scratch are in design.py.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvfold.report.heads import head_map
from kvfold.report.numbers import MISSING, count, difference, middle, percent, size, three, times
from kvfold.report.results import grid, number, words
from kvfold.report.series import FURTHER, UNFOLDED, Road, growth_of, label_of, memory_points, stretches

MOST_LINES = 200
"""Lines of a table over time; longer ones show evenly spaced lines, and say so."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column."""

    head: str
    """What stands above it."""
    cell: Callable[[Any], str]
    """Writes a row's cell; a row is what the table is of, mostly a result's."""
    note: str = ""
    """What it means, one sentence; "" where the head says it all."""
    is_text: bool = False
    """Words, set to the left; numbers are set to the right."""
    brief: bool = True
    """Whether a terminal of ordinary width shows it too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """One table."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    """Cells, as many in a row as there are columns."""


def sheet_of(title: str, columns: Sequence[Column], rows: Iterable[Any]) -> Sheet:
    """A line for each row."""
    return Sheet(
        title=title, columns=tuple(columns), rows=tuple(tuple(one.cell(row) for one in columns) for row in rows)
    )


def known_columns(columns: Sequence[Column], rows: Sequence[Mapping]) -> list[Column]:
    """Without those of which no row says anything."""
    return [one for one in columns if any(one.cell(row) not in (MISSING, "–") for row in rows)]


def num(head: str, say: Callable[[float | None], str], *keys: str, note: str = "", brief: bool = True) -> Column:
    """A column of the number that is found by following `keys`."""
    return Column(head, lambda row: say(number(row, *keys)), note, brief=brief)


def says(head: str, *keys: str, note: str = "", otherwise: str = "unnamed") -> Column:
    """A column of words."""
    return Column(head, lambda row: words(row, *keys) or otherwise, note, is_text=True)


def runs(head: str, *keys: str, note: str = "", unit: str = "", brief: bool = True) -> Column:
    """A column of medians with the smallest and largest run behind them."""
    return Column(head, lambda row: spread_cell(row, *keys, unit=unit), note, brief=brief)


def spread_cell(row: Mapping, *keys: str, unit: str = "") -> str:
    """A median with the smallest and largest behind it."""
    return middle(*(number(row, *keys, edge) for edge in ("min", "median", "max")), unit)


def change(head: str, key: str, note: str, unit: str = "", brief: bool = True) -> Column:
    """A column of differences, ± one standard error."""
    return Column(head, lambda row: difference(*pair(row, key), unit), note, brief=brief)


def pair(row: Mapping, key: str) -> tuple[float | None, float | None]:
    """Mean and standard error of a difference."""
    return number(row, key, "mean"), number(row, key, "standard_error")


METHOD = Column("method", label_of, is_text=True)
MEDIAN = "Median of the runs, smallest and largest behind it."


def _trained(row: Mapping) -> str:
    if (tokens := number(row, "trained_tokens")) is not None:
        return f"{count(tokens)} tokens"
    trained = row.get("trained")
    return ("yes" if trained else "no") if isinstance(trained, bool) else MISSING


QUALITY_COLUMNS = (
    METHOD,
    says("text", "text"),
    Column("trained", _trained, "Whether the model was trained for the method; on how much text, where known.", True, False),
    num("perplexity", three, "perplexity", note="How surprised the model is by the next token; lower is better."),
    change("change", "perplexity_change_percent",
           "Perplexity against the unfolded model on the same windows, ± one standard error.", "%"),
    change("loss difference", "loss_difference", "The same as a difference of the loss, nats a token.", brief=False),
    num("bits a byte", three, "bits_per_byte", note="Loss spread over the bytes of the text.", brief=False),
    num("KL", three, "kl", note="Mean divergence of the next-token distribution from the unfolded model's, nats."),
    num("same top-1", percent, "top1_agreement",
        note="Share of positions at which the likeliest next token is the unfolded model's."),
    num("kept", count, "kept_tokens", note="Tokens that one head holds at the end of a window, mean over heads."),
    num("compression", times, "compression", note="Tokens seen over tokens kept at the end of each window."),
    num("over time", times, "compression_mean_over_time", note="The same as a mean over the whole window.", brief=False),
    num("bytes held", size, "allocated_bytes",
        note="What the cache has allocated at the end, for all windows that were read side by side."),
    num("rounding", size, "bytes_by_use", "rounding",
        note="Of them, places of pages that no token fills: pages are held whole.", brief=False),
    num("ring", size, "bytes_by_use", "rings",
        note="Of them, what a learned method keeps of the newest tokens beside pages.", brief=False),
    num("full cache", size, "full_bytes", note="Bytes of the same tokens with nothing dropped.", brief=False),
    num("tokens/s", three, "tokens_per_second", note="Tokens read per second while measuring quality; not a decode speed."),
    num("scored", count, "tokens", note="Tokens scored.", brief=False),
    num("seconds", three, "seconds", note="Time that the measurement took.", brief=False),
)  # fmt: skip
TASK_COLUMNS = (
    says("task", "task", otherwise=MISSING),
    num("length", count, "length_tokens", note="Tokens of a prompt, for tasks that are made to any length.", brief=False),
    METHOD,
    says("score", "metric", otherwise=MISSING),
    Column("value", lambda row: _with_error(number(row, "value"), number(row, "standard_error")),
           "The score, ± one standard error over the questions."),
    change("change", "difference", "Against the unfolded model, question by question, ± one standard error."),
    num("questions", count, "items"),
    num("seen", count, "seen_tokens", note="Tokens of a request that were read, mean over requests.", brief=False),
    num("kept", count, "kept_tokens",
        note="Tokens that one head holds at the end of a request, mean over heads and requests."),
    num("compression", times, "compression", note="Tokens seen over tokens kept at the end of each request."),
    num("seconds", three, "seconds", note="Time that the measurement took."),
)  # fmt: skip
SIDES = (("kvfold", "ours"), ("transformers", "theirs"))
DECODE_COLUMNS = (
    Column("point", lambda row: point_name(row), is_text=True),
    num("batch", count, "batch", note="Rows read and written together.", brief=False),
    num("context", count, "context_tokens", note="Tokens of the prompt, a row.", brief=False),
    num("new", count, "new_tokens", note="Tokens generated, a row.", brief=False),
    *(runs(f"{name}, tokens/s", key, "tokens_per_second", note=MEDIAN) for name, key in SIDES),
    runs("ratio", "ratio", unit="×", note="kvfold over transformers, both from one run."),
    *(runs(f"{name}, ms a step", key, "step_ms", brief=False) for name, key in SIDES),
    *(
        num(f"{name}, cache", size, key, "allocated_bytes", note="Bytes of the cache at the end.")
        for name, key in SIDES
    ),
    *(
        num(f"{name}, peak", size, key, "peak_bytes", note="Peak memory of the process.", brief=False)
        for name, key in SIDES
    ),
)
BESIDE_COLUMNS = (
    runs("over the first", "over_first", unit="×",
         note="This row over the first of its point, both kvfold's and from one run."),
    num("compression", times, "compression", note="Tokens seen, over tokens kept at the end."),
)  # fmt: skip
"""What rows have besides that were measured beside each other."""
PLAN_COLUMNS = (
    num("bytes a token", count, "bytes_per_token", note="Keys and values that one more token adds while nothing is dropped."),
    num("bytes in all", size, "bytes", note="At the planned batch and context, everything counted."),
    num("times smaller", times, "compression", note="Bytes in all, against the first line."),
    num("largest batch", count, "max_rows", note="Rows of the planned context that fit the memory."),
    num("longest context", count, "max_context_tokens",
        note="Tokens a row that fit the memory, and at most what the model was made for."),
)  # fmt: skip
CURVE_COLUMNS = (
    num("step", count, "step"),
    num("tokens", count, "tokens", note="Trained on so far."),
    num("loss", three, "loss", note="All that the step minimised."),
    num("distillation", three, "distillation", note="Divergence from the teacher, nats a token."),
    num("next token", three, "next_token_loss", note="Minus the log probability, nats a token."),
    num("compression", times, "compression", note="By the step's own, noisy decisions."),
    num("asked for", times, "target_compression", note="By the schedule."),
    num("learning rate", three, "learning_rate"),
    num("seconds", three, "seconds", note="That the step took."),
)
LOSSES = {"reverse": "KL of student from teacher", "forward": "KL of teacher from student", "none": "next token"}
TRAINED = {"full": "all weights", "lora": "a low-rank addition", "adapter": "gates alone"}
"""What learns in a step, in words."""
GATED = (("with gates", "with_gates"), ("gates off", "gates_off"))
STEP_COLUMNS = (
    METHOD,
    Column("trained", lambda row: TRAINED.get(words(row, "trains"), words(row, "trains")) or MISSING,
           "What learns in the step.", True),
    Column("loss", lambda row: LOSSES.get(words(row, "loss"), words(row, "loss")) or MISSING,
           "The same on both sides, but for the pressure on gates.", True),
    num("sequence", count, "sequence_tokens", note="Tokens of a sequence."),
    num("batch", count, "batch_sequences", note="Sequences of the step.", brief=False),
    *(runs(f"{name}, tokens/s", key, "tokens_per_second", note=MEDIAN.replace("runs", "rounds")) for name, key in GATED),
    runs("cost", "ratio", unit="×", note="Time of a step with gates over one without, both from one round."),
    *(runs(f"{name}, ms a step", key, "step_ms", brief=False) for name, key in GATED),
    num("trained weights", count, "with_gates", "trained_parameters", note="With gates.", brief=False),
)  # fmt: skip
SERVE_COLUMNS = (
    Column("side", label_of, is_text=True),
    num("budget", size, "budget_bytes", note="Bytes for keys and values."),
    num("holds", three, "holds_uncompressed", note="Whole uncompressed requests that the budget has room for."),
    runs("tokens/s", "tokens_per_second", note="Generated, of all requests together, prompts included in the time."),
    runs("over the first", "over_first", unit="×", note="Against the first side in the same rounds."),
    runs("a CPU second", "tokens_per_cpu_second", note="Tokens for each second of the processor.", brief=False),
    num("most at once", count, "most_running", note="Most requests in flight."),
    num("tokens a step", three, "tokens_per_step", note="Mean over all steps, those that read prompts included."),
    num("first token", three, "first_token_ms", "p50", brief=False,
        note="Milliseconds from a request to its first token, median."),
    num("95 %", three, "first_token_ms", "p95", note="The same at 95 of 100 requests.", brief=False),
    num("next token", three, "inter_token_ms", "p50", note="Milliseconds between two tokens of one request, median."),
    num("95 %", three, "inter_token_ms", "p95", note="The same at 95 of 100 tokens."),
    num("preempted", count, "preemptions", note="Times that a request gave its memory up and was read again."),
    num("compression", times, "compression", note="Tokens seen over tokens kept at the ends of the requests."),
    num("outside", percent, "outside_forwards", "median", brief=False,
        note="Share of the steps that is not spent in the model."),
)  # fmt: skip
DOCUMENT_COLUMNS = (
    METHOD,
    num("tokens", count, "seen_tokens", note="Of the text."),
    num("compression", times, "compression", note="Tokens seen over tokens kept at its end, all heads together, by bytes."),
    Column("kept, mean", lambda row: three(_kept(row, lambda kept: sum(kept) / len(kept))),
           "Tokens that a head holds at the end, mean over heads."),
    Column("kept, least", lambda row: count(_kept(row, min)), "By the head that holds least."),
    Column("kept, most", lambda row: count(_kept(row, max)), "By the head that holds most."),
)  # fmt: skip
PRETRAINING_COLUMNS = (
    says("recipe", "recipe"),
    num("weights", count, "parameters", note="Parameters of the model."),
    num("KV bytes a token", count, "kv_bytes_per_token", note="Keys and values of one token, all layers, at 16 bit."),
    num("tokens", count, "tokens", note="Tokens trained on."),
    num("learning rate", three, "learning_rate", note="At its highest."),
    says("seed", "seed", note="Of new weights and the order of sequences.", otherwise=""),
    num("training loss", three, "loss", note="Of the last step, nats a token.", brief=False),
    num(
        "held-out perplexity", three, "validation_perplexity", note="On text that was not trained on; lower is better."
    ),
    says("", "note", note="The best of a sweep, and a rate at which the loss was no number any more.", otherwise=""),
)


def _with_error(value: float | None, error: float | None) -> str:
    return three(value) if value is None or error is None else f"{three(value)} ± {three(error)}"


def _kept(row: Mapping, of: Callable[[list[float]], float]) -> float | None:
    kept = [cell for line in grid(row, "kept") for cell in line if cell is not None and cell >= 0]
    return of(kept) if kept else None


quality_sheet = partial(sheet_of, "Quality", QUALITY_COLUMNS)
tasks_sheet = partial(sheet_of, "Tasks", TASK_COLUMNS)
step_sheet = partial(sheet_of, "Cost of a retrofit's step", STEP_COLUMNS)
serve_sheet = partial(sheet_of, "Serving", SERVE_COLUMNS)
document_sheet = partial(sheet_of, "Kept of one text", DOCUMENT_COLUMNS)
pretraining_sheet = partial(sheet_of, "Models from scratch", PRETRAINING_COLUMNS)


def passkey_sheet(rows: Sequence[Mapping], labels: Mapping[str, str]) -> Sheet:
    """Keys found per method, length and depth; `labels` gives the name of a method's text form."""
    method = Column("method", lambda row: labels.get(words(row, "method"), label_of(row)), is_text=True)
    heads = (("length, tokens", count, "length_tokens"), ("depth", percent, "depth"), ("found", count, "found"))
    return sheet_of("Passkey retrieval", (method, *(num(*head) for head in heads), num("tries", count, "tries")), rows)


def method_labels(rows: Sequence[Mapping]) -> dict[str, str]:
    """The name of each method's text form, for rows that carry the text form alone."""
    return {words(row, "method"): label_of(row) for row in rows if words(row, "method")}


def decode_sheet(rows: Sequence[Mapping]) -> Sheet:
    """Speed, step time and memory of both sides at each point."""
    beside = BESIDE_COLUMNS if any("over_first" in row for row in rows) else ()
    return sheet_of("Decode speed", (*DECODE_COLUMNS, *beside), rows)


def point_name(row: Mapping) -> str:
    """`8 x 1,024`, and how it differs from the plain case: padded rows, a method that folds."""
    name = words(row, "point").replace(" x ", " × ") or "unnamed point"
    method = words(row, "method")
    extras = [method] if method and method != UNFOLDED else []
    return ", ".join([name, *extras, *(["left-padded rows"] if row.get("padded") is True else [])])


def step_name(row: Mapping) -> str:
    """`DMS 128, all weights, 1 × 1,024 tokens`."""
    sizes = [count(value) for key in ("batch_sequences", "sequence_tokens") if (value := number(row, key))]
    trains = TRAINED.get(words(row, "trains"), words(row, "trains"))
    return ", ".join(filter(None, [label_of(row), trains, f"{' × '.join(sizes)} tokens" if sizes else ""]))


def plan_sheet(rows: Sequence[Mapping]) -> Sheet:
    """Planned bytes, a line per way of folding; what no row says is no column."""
    columns = (says("cache", "name"), *known_columns(PLAN_COLUMNS, rows))
    cells = sheet_of("Plan", columns, rows)
    dashed = tuple(tuple("–" if cell == MISSING else cell for cell in line) for line in cells.rows)
    return Sheet(title="Plan", columns=columns, rows=dashed)


def curve_sheet(rows: Sequence[Mapping]) -> Sheet:
    """The steps of a run; what no step says is no column, and a long run shows evenly spaced steps."""
    told = [row for row in rows if number(row, "step") is not None]
    title = "Steps" + _every(told, " (every {}th, and the last)")
    return sheet_of(title, known_columns(CURVE_COLUMNS, told), thinned(told))


def thinned(values: Sequence) -> list:
    """At most about `MOST_LINES` of them, evenly spaced, the last included."""
    firsts = [part[0] for part in stretches(list(values), MOST_LINES)]
    return firsts if not values or firsts[-1] is values[-1] else [*firsts, values[-1]]


def _every(values: Sequence, said: str) -> str:
    every = -(-len(values) // MOST_LINES)
    return said.format(every) if every > 1 else ""


def memory_sheet(rows: Sequence[Mapping]) -> Sheet:
    """Bytes held, a line per number of tokens, a column per method."""
    series = [(label_of(row), dict(memory_points(row))) for row in rows]
    tokens = sorted({at for _, points in series for at in points})
    columns = [num("tokens seen", count, "at")]
    columns += [Column(name, lambda row, points=points: size(points.get(row["at"]))) for name, points in series]
    title = "Memory over time" + _every(tokens, " (every {}th measured point, and the last)")
    return sheet_of(title, columns, [{"at": at} for at in thinned(tokens)])


def growth_sheet(rows: Sequence[Mapping]) -> Sheet:
    """Tokens kept while a text comes in, a line per number of tokens, three columns per method."""
    lines = [one for row in rows if (one := growth_of(row)) is not None]
    columns = [num("tokens seen", count, "at")]
    for one in lines:
        for name in ("mean", "least", "most"):
            known = dict(zip(one.tokens, one.kept[name], strict=True))
            columns.append(Column(f"{label_of(one.row)}, {name}", lambda row, known=known: three(known.get(row["at"]))))
    tokens = thinned(sorted({at for one in lines for at in one.tokens}))
    return sheet_of("Tokens kept as the text comes in, over all heads", columns, [{"at": at} for at in tokens])


def kept_sheets(rows: Iterable[Mapping]) -> list[Sheet]:
    """Of each method kept counts and, where it has them, scores: a line per layer, a column per head."""
    found = []
    for row, key in ((row, key) for row in rows for key in ("kept", "score")):
        one, cells, seen = head_map(row), grid(row, key), number(row, "seen_tokens")
        if one is None or not cells:
            continue
        say, name = (count, "tokens kept") if key == "kept" else (three, words(row, "value_name") or "score")
        columns = [Column("layer", lambda line: str(line[0]))]
        for head in range(max(map(len, cells))):
            columns.append(Column(f"head {head}", lambda line, head=head, say=say: _head_cell(line[1], head, say)))
        title = f"{label_of(row)}: {name}" + (f" of {count(seen)} seen" if key == "kept" and seen else "")
        found.append(sheet_of(title, columns, zip(one.owners, cells, strict=False)))
    return found


def _head_cell(line: Sequence[float | None], head: int, say: Callable) -> str:
    absent = head >= len(line) or (say is count and line[head] == -1)
    return "–" if absent else say(line[head])


def uptraining_sheet(roads: Sequence[Road]) -> Sheet:
    """Models of one layout by the tokens they were trained on; the last line of each is extrapolated, and says so."""
    heads = ("model", "layers", "text", "tokens", "change")
    notes = ("", "Which layers share keys and values.", "", "Of training, those that weights were fitted on included.",
             "Perplexity against the model it came from, ± one standard error.")  # fmt: skip
    columns = [
        Column(head, lambda row, at=at: row["cells"][at], note, is_text=at < 3)
        for at, (head, note) in enumerate(zip(heads, notes, strict=True))
    ]
    lines = []
    for road in roads:
        layers, text, further = road.layers or "unnamed", road.text or "unnamed", road.end.tokens * FURTHER
        for stage in road.stages:
            lines.append((stage.name, layers, text, count(stage.tokens), difference(stage.change, stage.error, "%")))
        if (then := road.beyond(further)) is not None:
            lines.append(("extrapolated, not measured", layers, text, count(further), f"+{three(then)} %"))
    return sheet_of("Over tokens of training", columns, [{"cells": line} for line in lines])
