import pytest

from kvfold.eval import progress
from kvfold.eval.progress import progress_bars, progress_lines, silent


def test_quick_work_shows_no_bar(capsys):
    with progress_bars() as report:
        report("a", 0, 2)
        report("a", 2, 2)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_slow_work_shows_a_bar_on_stderr(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", -1.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress_bars() as report:
        for what in ("reading", "writing"):
            for done in (0, 1, 2):
                report(what, done, 2)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "reading" in shown.err


def test_a_bar_ends_with_an_error_too(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", -1.0)
    with pytest.raises(RuntimeError, match="stop"), progress_bars() as report:
        report("reading", 0, 2)
        raise RuntimeError("stop")
    silent("reading", 1, 2)


def test_where_no_bar_can_be_drawn_a_line_a_minute_tells(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    report = progress_lines(lines.append)
    for what in ("reading", "writing"):
        for done in range(11):
            report(what, done, 10)
            now[0] += 25.0
    assert lines[:2] == ["reading: 30 %, 3 min left", "reading: 60 %, 2 min left"]
    assert [line.split(":")[0] for line in lines].count("writing") == 3
    quick = []
    report = progress_lines(quick.append)
    report("reading", 0, 2)
    report("reading", 2, 2)
    assert quick == []
