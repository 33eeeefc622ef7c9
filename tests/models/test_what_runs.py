"""What a reader of a decoding step, of a training step, and of the way from a text form to the store, must follow stays a third
below what it was: docs/architecture.md has the figures, studies/trace_paths.py counts.
"""

import importlib.util
import re
from pathlib import Path

import pytest

from kvfold.ops import native, paged

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"\| (.+?) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|")
SPEC = importlib.util.spec_from_file_location("trace_paths", ROOT / "studies" / "trace_paths.py")


@pytest.mark.skipif(native.library() is None, reason="plain torch takes another way: no C compiler")
def test_a_third_less_than_before(tmp_path, monkeypatch):
    monkeypatch.setattr(paged, "CHECKS", False)  # of tests alone
    trace_paths = importlib.util.module_from_spec(SPEC)
    SPEC.loader.exec_module(trace_paths)
    found = trace_paths.measured(tmp_path)
    table = (ROOT / "docs" / "architecture.md").read_text().partition("## How much runs")[2].partition("\n## ")[0]
    rows = {name: tuple(map(int, figures)) for name, *figures in ROW.findall(table)}
    assert found.keys() == rows.keys()
    for name, (files_before, files, lines_before, lines) in rows.items():
        assert 3 * found[name]["files"] <= 2 * files_before, (name, files)
        assert 3 * found[name]["lines"] <= 2 * lines_before, (name, lines)
