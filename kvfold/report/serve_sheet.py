"""The table of a serving benchmark: what each side does in each budget."""

from collections.abc import Mapping, Sequence

from kvfold.report.numbers import count, percent, size, three, times
from kvfold.report.results import number
from kvfold.report.series import label_of
from kvfold.report.sheets import Column, Sheet, spread_cell

SERVE_COLUMNS = (
    Column(head="side", is_text=True),
    Column(head="budget", note="Bytes for keys and values."),
    Column(head="holds", note="Whole uncompressed requests that the budget has room for."),
    Column(head="tokens/s", note="Generated, of all requests together, prompts included in the time."),
    Column(head="over the first", note="Against the first side in the same rounds."),
    Column(head="a CPU second", note="Tokens for each second of the processor.", brief=False),
    Column(head="most at once", note="Most requests in flight."),
    Column(head="tokens a step", note="Mean over all steps, those that read prompts included."),
    Column(head="first token", note="Milliseconds from a request to its first token, median.", brief=False),
    Column(head="95 %", note="The same at 95 of 100 requests.", brief=False),
    Column(head="next token", note="Milliseconds between two tokens of one request, median."),
    Column(head="95 %", note="The same at 95 of 100 tokens."),
    Column(head="preempted", note="Times that a request gave its memory up and was read again."),
    Column(head="compression", note="Tokens seen over tokens kept at the ends of the requests."),
    Column(head="outside", note="Share of the steps that is not spent in the model.", brief=False),
)


def serve_sheet(rows: Sequence[Mapping]) -> Sheet:
    """A line for each budget and side."""
    return Sheet(title="Serving", columns=SERVE_COLUMNS, rows=tuple(map(_cells, rows)))


def _cells(row: Mapping) -> tuple[str, ...]:
    return (
        label_of(row), size(number(row, "budget_bytes")), three(number(row, "holds_uncompressed")),
        spread_cell(row, "tokens_per_second"), spread_cell(row, "over_first", unit="×"),
        spread_cell(row, "tokens_per_cpu_second"), count(number(row, "most_running")), three(number(row, "tokens_per_step")),
        *(three(number(row, key, part)) for key in ("first_token_ms", "inter_token_ms") for part in ("p50", "p95")),
        count(number(row, "preemptions")), times(number(row, "compression")),
        percent(number(row, "outside_forwards", "median")),
    )  # fmt: skip
