"""The report's tables for a terminal (rich). Each function takes a result's JSON object, as written or as just measured."""

from collections.abc import Callable, Mapping

from rich.table import Table
from rich.text import Text

from kvfold.report import sheets
from kvfold.report.results import rows_of
from kvfold.report.sheets import Column, Sheet, method_labels, sheet_of


def _printed(sheet: Callable[[list[Mapping]], Sheet]) -> Callable[..., Table]:
    """What makes a table of a result; `brief` leaves out what doesn't fit a terminal of ordinary width."""

    def table(result: Mapping, brief: bool = True) -> Table:
        return rich_table(sheet(rows_of(result)), brief=brief)

    return table


quality_table = _printed(sheets.quality_sheet)
decode_table = _printed(sheets.decode_sheet)
serve_table = _printed(sheets.serve_sheet)
step_table = _printed(sheets.step_sheet)
document_table = _printed(sheets.document_sheet)
plan_table = _printed(sheets.plan_sheet)


def passkey_table(result: Mapping) -> Table:
    """Passkeys found, for a quality result that has them."""
    return rich_table(sheets.passkey_sheet(rows_of(result, "passkey"), method_labels(rows_of(result))))


def tasks_table(result: Mapping, brief: bool = True) -> Table:
    """Scores of tasks, of a tasks result or of a quality result that has them."""
    return rich_table(sheets.tasks_sheet(rows_of(result, "tasks" if "tasks" in result else "rows")), brief=brief)


def table_of(title: str, columns: Mapping[str, str | Callable[[Mapping], str]]) -> Callable[[Mapping], Table]:
    """What makes a table of a result that the report has no sheet for: a line for each row, the first column words.

    A cell is a text with the row's fields in braces, empty where the row lacks one; or a function of the row.
    """

    def cell(shown: str | Callable[[Mapping], str], row: Mapping) -> str:
        try:
            return shown.format_map(row) if isinstance(shown, str) else shown(row)
        except (KeyError, TypeError):  # nothing was measured there
            return ""

    found = [
        Column(head, lambda row, shown=shown: cell(shown, row), is_text=not index)
        for index, (head, shown) in enumerate(columns.items())
    ]
    return lambda result: rich_table(sheet_of(title, found, result["rows"]))


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
