"""The tables about training: what heads keep of one text, how a retrofit went, what its steps cost, models from scratch."""

from collections.abc import Mapping, Sequence

from kvfold.report.numbers import MISSING, count, difference, three, times
from kvfold.report.pictures.decode import TRAINED
from kvfold.report.pictures.growth import Growth, growth_of
from kvfold.report.pictures.uptraining import FURTHER, Road
from kvfold.report.results import grid, number, words
from kvfold.report.series import label_of
from kvfold.report.sheets import MOST_LINES, Column, Sheet, spread_cell, thinned

DOCUMENT_COLUMNS = (
    Column(head="method", is_text=True),
    Column(head="tokens", note="Of the text."),
    Column(head="compression", note="Tokens seen over tokens kept at its end, all heads together, by bytes."),
    Column(head="kept, mean", note="Tokens that a head holds at the end, mean over heads."),
    Column(head="kept, least", note="By the head that holds least."),
    Column(head="kept, most", note="By the head that holds most."),
)


def document_sheet(rows: Sequence[Mapping]) -> Sheet:
    """What heads keep of one text, a line per method."""
    lines = []
    for row in rows:
        kept = [cell for line in grid(row, "kept") for cell in line if cell is not None and cell >= 0]
        mean, least, most = (sum(kept) / len(kept), min(kept), max(kept)) if kept else (None, None, None)
        lines.append(
            (label_of(row), count(number(row, "seen_tokens")), times(number(row, "compression")), three(mean),
             count(least), count(most))
        )  # fmt: skip
    return Sheet(title="Kept of one text", columns=DOCUMENT_COLUMNS, rows=tuple(lines))


def growth_sheet(rows: Sequence[Mapping]) -> Sheet:
    """Tokens kept while a text comes in, a line per number of tokens, three columns per method."""
    lines = [one for row in rows if (one := growth_of(row)) is not None]
    found = [dict(zip(one.tokens, range(len(one.tokens)), strict=True)) for one in lines]
    tokens = sorted({at for one in lines for at in one.tokens})
    columns = [Column(head="tokens seen")]
    for one in lines:
        columns += [Column(head=f"{label_of(one.row)}, {name}") for name in ("mean", "least", "most")]
    cells = tuple(
        (count(at), *(_at(one, where, at, name) for one, where in zip(lines, found, strict=True)
                      for name in ("mean", "least", "most")))
        for at in thinned(tokens)
    )  # fmt: skip
    title = "Tokens kept as the text comes in, over all heads"
    return Sheet(title=title, columns=tuple(columns), rows=cells)


def _at(one: Growth, where: Mapping[float, int], at: float, name: str) -> str:
    return three(one.kept[name][where[at]]) if at in where else MISSING


CURVE_COLUMNS = (
    ("step", count, Column(head="step")),
    ("tokens", count, Column(head="tokens", note="Trained on so far.")),
    ("loss", three, Column(head="loss", note="All that the step minimised.")),
    ("distillation", three, Column(head="distillation", note="Divergence from the teacher, nats a token.")),
    ("next_token_loss", three, Column(head="next token", note="Minus the log probability, nats a token.")),
    ("compression", times, Column(head="compression", note="By the step's own, noisy decisions.")),
    ("target_compression", times, Column(head="asked for", note="By the schedule.")),
    ("learning_rate", three, Column(head="learning rate")),
    ("seconds", three, Column(head="seconds", note="That the step took.")),
)


def curve_sheet(rows: Sequence[Mapping]) -> Sheet:
    """The steps of a run; what no step says is no column, and a long run shows evenly spaced steps."""
    told = [row for row in rows if number(row, "step") is not None]
    shown = [one for one in CURVE_COLUMNS if any(number(row, one[0]) is not None for row in told)]
    step = -(-len(told) // MOST_LINES) or 1
    kept = told[::step] + ([told[-1]] if told and told[::step][-1] is not told[-1] else [])
    title = "Steps" + (f" (every {step}th, and the last)" if step > 1 else "")
    cells = tuple(tuple(say(number(row, key)) for key, say, _ in shown) for row in kept)
    return Sheet(title=title, columns=tuple(column for _, _, column in shown), rows=cells)


UPTRAINING_COLUMNS = (
    Column(head="model", is_text=True),
    Column(head="layers", note="Which layers share keys and values.", is_text=True),
    Column(head="text", is_text=True),
    Column(head="tokens", note="Of training, those that weights were fitted on included."),
    Column(head="change", note="Perplexity against the model it came from, ± one standard error."),
)


def uptraining_sheet(roads: Sequence[Road]) -> Sheet:
    """Models of one layout by the tokens they were trained on; the last line of each is extrapolated, and says so."""
    cells = []
    for road in roads:
        layers, text = road.layers or "unnamed", road.text or "unnamed"
        for stage in road.stages:
            cells.append((stage.name, layers, text, count(stage.tokens), difference(stage.change, stage.error, "%")))
        further = road.end.tokens * FURTHER
        if (change := road.beyond(further)) is not None:
            cells.append(("extrapolated, not measured", layers, text, count(further), f"+{three(change)} %"))
    return Sheet(title="Over tokens of training", columns=UPTRAINING_COLUMNS, rows=tuple(cells))


LOSSES = {"reverse": "KL of student from teacher", "forward": "KL of teacher from student", "none": "next token"}
STEP_COLUMNS = (
    Column(head="method", is_text=True),
    Column(head="trained", note="What learns in the step.", is_text=True),
    Column(head="loss", note="The same on both sides, but for the pressure on gates.", is_text=True),
    Column(head="sequence", note="Tokens of a sequence."),
    Column(head="batch", note="Sequences of the step.", brief=False),
    Column(head="with gates, tokens/s", note="Median of the rounds, smallest and largest behind it."),
    Column(head="gates off, tokens/s", note="Median of the rounds, smallest and largest behind it."),
    Column(head="cost", note="Time of a step with gates over one without, both from one round."),
    Column(head="with gates, ms a step", brief=False),
    Column(head="gates off, ms a step", brief=False),
    Column(head="trained weights", note="With gates.", brief=False),
)


def step_sheet(rows: Sequence[Mapping]) -> Sheet:
    """What a step of a retrofit costs, a line per method."""
    cells = tuple(
        (
            label_of(row),
            TRAINED.get(words(row, "trains"), words(row, "trains")) or MISSING,
            LOSSES.get(words(row, "loss"), words(row, "loss")) or MISSING,
            *(count(number(row, key)) for key in ("sequence_tokens", "batch_sequences")),
            *(spread_cell(row, side, "tokens_per_second") for side in ("with_gates", "gates_off")),
            spread_cell(row, "ratio", unit="×"),
            *(spread_cell(row, side, "step_ms") for side in ("with_gates", "gates_off")),
            count(number(row, "with_gates", "trained_parameters")),
        )
        for row in rows
    )
    return Sheet(title="Cost of a retrofit's step", columns=STEP_COLUMNS, rows=cells)


PRETRAINING_COLUMNS = (
    Column(head="recipe", is_text=True),
    Column(head="weights", note="Parameters of the model."),
    Column(head="KV bytes a token", note="Keys and values of one token, all layers, at 16 bit."),
    Column(head="tokens", note="Tokens trained on."),
    Column(head="learning rate", note="At its highest."),
    Column(head="seed", note="Of new weights and the order of sequences.", is_text=True),
    Column(head="training loss", note="Of the last step, nats a token.", brief=False),
    Column(head="held-out perplexity", note="On text that was not trained on; lower is better."),
    Column(head="", note="The best of a sweep, and a rate at which the loss was no number any more.", is_text=True),
)


def pretraining_sheet(rows: Sequence[Mapping]) -> Sheet:
    """Models from scratch, a line a run."""
    cells = tuple(
        (
            words(row, "recipe") or "unnamed",
            count(number(row, "parameters")),
            count(number(row, "kv_bytes_per_token")),
            count(number(row, "tokens")),
            three(number(row, "learning_rate")),
            words(row, "seed"),
            three(number(row, "loss")),
            three(number(row, "validation_perplexity")),
            words(row, "note"),
        )
        for row in rows
    )
    return Sheet(title="Models from scratch", columns=PRETRAINING_COLUMNS, rows=cells)
