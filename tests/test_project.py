"""The project's own rules: sizes of files, names, docstrings, a light import, pinned versions, shipped data."""

import ast
import inspect
import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kvfold.methods.registry import METHODS

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "kvfold").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
SHAPELESS = {"utils", "util", "helpers", "helper", "common", "misc"}
# Parts of torch's build for CUDA, and of Python itself: not ours to pin.
UNPINNED = re.compile(r"nvidia-|cuda-|triton$|setuptools$|pip$|kvfold$")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_file_is_too_long():
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_no_function_is_too_long():
    lengths = {
        f"{name_of(path)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    # A kernel can't be cut: what it calls is compiled into it, and registers are what is short there.
    cut = {name: lines for name, lines in lengths.items() if "paged_triton.py" not in name}
    assert {name: lines for name, lines in cut.items() if lines > MAX_FUNCTION_LINES} == {}


def test_every_file_has_a_name_that_says_something():
    assert [name_of(path) for path in MODULES if path.stem in SHAPELESS or path.parent.name in SHAPELESS] == []


def test_packages_open_with_nothing():
    """Only kvfold itself (its names), models (its Auto classes) and cli (its commands) do anything on import."""
    speaking = [ROOT / "kvfold" / room / "__init__.py" for room in ("", "models", "cli")]
    packages = [path for path in MODULES if path.name == "__init__.py" and path not in speaking]
    assert [name_of(path) for path in packages if path.read_text().strip()] == []


def test_nothing_is_left_half_done():
    marks = re.compile("TO" + "DO|FIX" + "ME|XX" + "X|NotImplemented" + "Error|compression" + "_ratio")
    found = {name_of(path): marks.findall(path.read_text()) for path in MODULES}
    assert {name: words for name, words in found.items() if words} == {}


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.__name__)
def test_a_method_says_where_it_comes_from_and_how_it_differs(method):
    text = inspect.cleandoc(method.__doc__)
    said = re.search(r"\n\nSource: (?P<source>.+?)\nDiffers: .+\Z", text, re.DOTALL)
    assert said, f"the docstring of {method.__name__} must end with the lines 'Source:' and 'Differs:'"
    assert re.search(r"arXiv \d{4}\.\d{4,5}, section \d", said["source"])


def test_importing_kvfold_does_nothing():
    """No torch, no transformers, nothing that takes time."""
    code = "import sys, kvfold; print(*sorted({'torch', 'transformers', 'numpy', 'typer', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def pins(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    found = [re.fullmatch(r"([A-Za-z0-9._-]+)==([^+\s]+)", line) for line in lines]
    assert all(found), "a constraint is NAME==VERSION, without the name of a build"
    return {canonicalize_name(match[1]): match[2] for match in found}


def test_all_that_the_tests_run_with_is_pinned():
    """Everything that installing kvfold with its extras brings, and what that brings in turn."""
    extras = PROJECT["optional-dependencies"]
    waiting = [Requirement(text) for part in (PROJECT["dependencies"], *extras.values()) for text in part]
    missing, known = set(), set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, *requirement.extras) in known or UNPINNED.match(name):
            continue
        known.add((name, *requirement.extras))
        if name not in pins("constraints.txt"):
            missing.add(name)
        for text in installed_requirements(name):
            needed = Requirement(text)
            if any(not needed.marker or needed.marker.evaluate({"extra": one}) for one in ("", *requirement.extras)):
                waiting.append(needed)
    assert missing == set()


def installed_requirements(name: str) -> list[str]:
    """What an installed package needs; nothing of one that isn't installed, such as those of the eval extra."""
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


def test_the_two_sets_of_versions_differ_in_transformers():
    oldest, latest = pins("constraints.txt"), pins("constraints-latest.txt")
    assert oldest.keys() == latest.keys()
    assert {name for name in oldest if oldest[name] != latest[name]} == {"transformers"}
    assert oldest["transformers"] == "5.17.*"


def test_versions_agree():
    assert metadata.version("kvfold") == PROJECT["version"]
    assert f"\n## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_citation_agrees_with_the_project():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software" and cited["message"]
    for key in ("version", "license", "authors", "keywords"):
        assert cited[key] == PROJECT[key]
    assert (cited["title"], cited["abstract"]) == (PROJECT["name"], PROJECT["description"])
    papers = {paper["identifiers"][0]["value"]: paper for paper in cited["references"]}
    assert papers.keys() == {"arXiv:2403.09636", "arXiv:2405.12981", "arXiv:2506.05345"}
    for number, paper in papers.items():
        assert paper["url"].endswith(number.removeprefix("arXiv:"))
        assert paper["title"] and all(author.keys() == {"family-names", "given-names"} for author in paper["authors"])


def test_public_ci_runs_what_is_run_by_hand():
    """On the oldest and the newest Python that pyproject names; it may read the repository, and nothing else."""
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = flow["jobs"]["test"]
    assert flow["permissions"] == {"contents": "read"} and "permissions" not in job
    assert 0 < job["timeout-minutes"] <= 120
    pythons = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert job["strategy"]["matrix"]["python"] == [pythons[0], pythons[-1]]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100, "it must be executable"


def test_the_sample_is_there():
    folder = resources.files("kvfold") / "assets" / "sample"
    novel = (folder / "persuasion.txt").read_text(encoding="ascii")
    assert novel.startswith("Chapter 1\n\nSir Walter Elliot")
    assert 200_000 < len(novel) < 400_000
    openings = [json.loads(line) for line in (folder / "openings.jsonl").read_text(encoding="ascii").splitlines()]
    assert len(openings) == 6
    assert all(opening.keys() == {"id", "text"} and len(opening["text"]) > 1000 for opening in openings)


def test_there_is_one_floor_plan():
    """README, architecture page and the linter's contract name the same rooms in the same order."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    rooms = {path.name for path in (ROOT / "kvfold").iterdir() if (path / "__init__.py").is_file()}
    floors = [[room for room in re.findall(r"\w+", line) if room in rooms] for line in contract]
    for page in ("README.md", "docs/architecture.md"):
        (plan,) = re.findall(r"^```\ncli.*?^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
        shown = [re.findall(r"(\w+)/", line) for line in plan.splitlines()]
        assert [floor for floor in shown if floor] == [floor for floor in floors if floor], page
