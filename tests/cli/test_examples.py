"""Scripts in examples/: each is short, says how it is run, stands in the table, and runs on a tiny model."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TABLE = (EXAMPLES / "README.md").read_text()
# What the Ray example calls needs Ray, and is run by tests/integrations/ray_script.py.
SCRIPTS = [path for path in sorted(EXAMPLES.glob("*.py")) if not path.name.startswith("serve-ray")]


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """`run("quickstart", "tiny", ...)`: an example in this process; gives what it printed, line by line."""

    def example(name: str, *words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return example


@pytest.fixture
def long_text(folder):
    (folder / "text.txt").write_text((folder / "text.txt").read_text() * 8)


def numbers(line: str) -> list[int]:
    return [int(found.replace(",", "")) for found in re.findall(r"\d[\d,]*", line)]


def test_quickstart(run):
    *_, seen, kept, held = run("quickstart", "tiny", "Sir Walter Elliot")
    assert numbers(seen)[0] > 100 and numbers(kept)[0] == 64
    assert 0 < numbers(held)[0] < numbers(held)[1]


def test_budget(run):
    full, refused, window, read = run("budget", "tiny")
    need, budget = numbers(full)
    assert need > budget and refused.startswith("  refused: ")
    planned, same = numbers(window.partition(": ")[2])[-2:]
    assert same == budget and planned < budget
    assert numbers(read) == [120, planned]


def test_evaluate(run, long_text):
    lines = run("evaluate", "tiny", "text.txt")
    assert [line.partition(": perplexity ")[0] for line in lines] == ["full", "window:60+4", "h2o:32+32"]
    assert ["256 tokens kept" in lines[0], *("64 tokens kept" in line for line in lines[1:])] == [True] * 3


def test_retrofit(run, folder, long_text):
    figures, loads = run("retrofit", "tiny", "text.txt", "out")
    assert float(figures.rpartition(" ")[2]) > 1.3
    assert loads == "out loads with dms:8" and (folder / "out" / "adapter.safetensors").is_file()


def test_serve(run):
    where, full, h2o = run("serve", "tiny")
    assert where.startswith("mine at http://127.0.0.1:")
    assert full.startswith("full: ") and h2o.startswith("h2o:32+32: ")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_it_is_run(path):
    text = path.read_text()
    assert len(text.splitlines()) < 40
    assert f"\n  python examples/{path.name} MODEL" in ast.get_docstring(ast.parse(text), clean=False)
    assert f"test_{path.stem}" in globals(), "each example has a test that runs it"


def test_the_table_lists_every_example():
    there = {path.name for path in EXAMPLES.iterdir() if path.name not in ("README.md", "__pycache__")}
    assert set(re.findall(r"^\| \[[^]]+\]\(([^)]+?)/?\) \|", TABLE, re.MULTILINE)) == there
