import io

from rich.console import Console

import report_samples as samples
from kvfold.report.sheets import known_table, passkey_table

quality_table, decode_table, tasks_table, plan_table = map(known_table, ("quality", "decode", "tasks", "plan"))


def _printed(table, width=200) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_quality():
    text = _printed(quality_table(samples.quality()))
    assert "Window + sinks 252+4" in text and "3.94×" in text and "6.10 MB" in text and "bits a byte" not in text
    assert "bits a byte" in _printed(quality_table(samples.quality(), brief=False), width=300)


def test_brief_tables_fit_a_terminal():
    for table in (
        quality_table(samples.quality()),
        decode_table(samples.decode()),
        tasks_table(samples.tasks()),
    ):
        lines = _printed(table, width=160).splitlines()
        assert max(map(len, lines)) <= 160 and not any("…" in line for line in lines)
        assert len(lines) == table.row_count + 5


def test_passkey_names_methods_as_the_quality_rows_do():
    assert "Window + sinks 252+4" in _printed(passkey_table(samples.quality()))


def test_tasks_of_a_result_of_their_own_and_beside_texts():
    own = samples.tasks()
    beside = {**samples.quality(), "tasks": own["rows"]}
    text = _printed(tasks_table(own))
    assert text == _printed(tasks_table(beside))
    assert "0.610 ± 0.0487" in text and "−0.150 ± 0.021" in text and "H2O 256+256" in text and "length" not in text
    assert "1,024" in _printed(tasks_table(own, brief=False), width=250)


def test_decode():
    text = _printed(decode_table(samples.decode()))
    assert "1.07×" in text and "8 × 1,024, h2o:128+128" in text and "left-padded rows" in text


def test_plan_shows_only_what_is_known():
    text = _printed(plan_table(samples.plan()))
    assert "46,080" in text and "48.1 MB" in text and "largest batch" in text and "longest context" not in text


def test_words_in_brackets_are_no_colours():
    assert "[red]x" in _printed(plan_table({"rows": [{"name": "[red]x"}]}))


def test_an_empty_result_is_an_empty_table():
    assert quality_table({}).row_count == 0
