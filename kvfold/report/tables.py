"""The report's tables for a terminal (rich). Each function takes a result's JSON object, as written or as just measured."""

from collections.abc import Callable, Mapping

from rich.table import Table
from rich.text import Text

from kvfold.report.learned_sheets import document_sheet, step_sheet
from kvfold.report.results import rows_of, words
from kvfold.report.series import label_of
from kvfold.report.serve_sheet import serve_sheet
from kvfold.report.sheets import Column, Sheet, decode_sheet, passkey_sheet, plan_sheet, quality_sheet, tasks_sheet


def quality_table(result: Mapping, brief: bool = True) -> Table:
    """Quality of each method on each text; `brief` leaves out what doesn't fit a terminal of ordinary width."""
    return rich_table(quality_sheet(rows_of(result)), brief=brief)


def passkey_table(result: Mapping) -> Table:
    """Passkeys found, for a quality result that has them."""
    return rich_table(passkey_sheet(rows_of(result, "passkey"), method_labels(rows_of(result))))


def tasks_table(result: Mapping, brief: bool = True) -> Table:
    """Scores of tasks, of a tasks result or of a quality result that has them."""
    return rich_table(tasks_sheet(rows_of(result, "tasks" if "tasks" in result else "rows")), brief=brief)


def decode_table(result: Mapping, brief: bool = True) -> Table:
    """Decode speed of kvfold and its peer."""
    return rich_table(decode_sheet(rows_of(result)), brief=brief)


def serve_table(result: Mapping, brief: bool = True) -> Table:
    """Requests in flight, speed and waiting under each method and budget."""
    return rich_table(serve_sheet(rows_of(result)), brief=brief)


def step_table(result: Mapping, brief: bool = True) -> Table:
    """Cost of a retrofit's step."""
    return rich_table(step_sheet(rows_of(result)), brief=brief)


def document_table(result: Mapping) -> Table:
    """What heads keep of one text."""
    return rich_table(document_sheet(rows_of(result)))


def plan_table(result: Mapping) -> Table:
    """Planned bytes."""
    return rich_table(plan_sheet(rows_of(result)))


def table_of(title: str, columns: Mapping[str, str | Callable[[Mapping], str]]) -> Callable[[Mapping], Table]:
    """What makes a table of a result that the report has no sheet for: a line for each row, the first column words.

    A cell is a text with the row's fields in braces, empty where the row lacks one; or a function of the row.
    """
    heads = tuple(Column(head=head, is_text=not number) for number, head in enumerate(columns))

    def cell(shown: str | Callable[[Mapping], str], row: Mapping) -> str:
        try:
            return shown.format_map(row) if isinstance(shown, str) else shown(row)
        except (KeyError, TypeError):  # nothing was measured there
            return ""

    def table(result: Mapping) -> Table:
        rows = tuple(tuple(cell(shown, row) for shown in columns.values()) for row in result["rows"])
        return rich_table(Sheet(title=title, columns=heads, rows=rows))

    return table


def method_labels(rows: list[Mapping]) -> dict[str, str]:
    """The name of each method's text form, for rows that carry the text form alone."""
    return {words(row, "method"): label_of(row) for row in rows if words(row, "method")}


def rich_table(sheet: Sheet, brief: bool = False) -> Table:
    """Any sheet as a rich table."""
    shown = [index for index, column in enumerate(sheet.columns) if column.brief or not brief]
    table = Table(title=Text(sheet.title), title_justify="left", header_style="bold")
    for index in shown:
        column = sheet.columns[index]
        table.add_column(Text(column.head), justify="left" if column.is_text else "right", overflow="fold")
    for row in sheet.rows:
        table.add_row(*(Text(row[index]) for index in shown))
    return table
