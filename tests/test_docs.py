"""Docs that can't lie: blocks of Python run, commands and options exist, links lead somewhere, every method has a page."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import typer.cli
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import kvfold
from kvfold.methods.registry import METHODS, parse_time

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
METHOD_PAGES = ROOT / "docs" / "methods"
BLOCK = re.compile(r"^```(?P<head>[^\n]*)\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL)
SHELLS = ("sh", "bash", "console")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Of each fenced block: its place, what stands after the fence, its text."""
    text = page.read_text()
    return [
        (f"{name_of(page)}:{text[: match.start()].count(chr(10)) + 1}", match["head"].strip(), match["body"])
        for match in BLOCK.finditer(text)
    ]


def python_blocks() -> list:
    """Those with `file=` are parts of an example that another test puts together; `slow` ones take long."""
    found = []
    for page in PAGES:
        for place, head, body in blocks(page):
            words = head.split()
            if words[:1] == ["python"] and not any(word.startswith("file=") for word in words):
                found.append(pytest.param(body, id=place, marks=[pytest.mark.slow] if "slow" in words else []))
    return found


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory):
    """A folder with a tiny random model, `my-checkpoint`, and a tokenizer: what the docs call a reader's own."""
    folder = tmp_path_factory.mktemp("docs")
    words = Tokenizer(WordLevel({"[UNK]": 0, "once": 1, "upon": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder / "my-checkpoint")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).save_pretrained(folder / "my-checkpoint")
    return folder


@pytest.mark.parametrize("code", python_blocks())
def test_python_in_the_docs_runs(code, checkpoint_folder, monkeypatch):
    monkeypatch.chdir(checkpoint_folder)
    exec(compile(code, "block", "exec"), {"__name__": "block"})


def command_lines() -> list[tuple[str, str]]:
    """Every `kvfold ...` of the docs, from shell blocks (joined where a line goes on) and from inline code."""
    found = []
    for page in PAGES:
        for place, head, body in blocks(page):
            if head.split()[:1] and head.split()[0] in SHELLS:
                lines = body.replace("\\\n", " ").splitlines()
                found += [(place, line.strip().removeprefix("$ ")) for line in lines]
        prose = BLOCK.sub("", page.read_text())
        found += [(name_of(page), code) for code in re.findall(r"`(kvfold [^`]+)`", prose)]
    return [(place, line) for place, line in found if line.startswith("kvfold ")]


@cache
def commands() -> dict[str, set[str]]:
    """Every command of the command line (`bench decode` too), and its options."""
    from kvfold.cli import app

    found, waiting = {}, [("", typer.main.get_command(app))]
    while waiting:
        name, command = waiting.pop()
        found[name] = {
            option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        for part, below in getattr(command, "commands", {}).items():
            waiting.append((f"{name} {part}".strip(), below))
    return found


@pytest.mark.parametrize(("place", "line"), command_lines())
def test_commands_in_the_docs_exist(place, line):
    known = commands()
    words = shlex.split(line, comments=True)[1:]
    words = words[: words.index("|")] if "|" in words else words
    name = max((one for one in known if words[: len(one.split())] == one.split()), key=len)
    assert name or words[0].startswith(("-", "[")), f"{place}: '{line}' names no command"
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert options <= known[name] | {"--help"}, f"{place}: '{line}'"


def test_the_reference_is_what_the_command_line_says():
    """As `make readme` writes it."""
    line = re.search(r"-m typer (.+) --output docs/cli.md", (ROOT / "Makefile").read_text())[1]
    written = CliRunner().invoke(typer.cli.app, shlex.split(line), catch_exceptions=False).stdout
    assert (ROOT / "docs" / "cli.md").read_text().strip() == written.strip()


def test_the_readme_names_every_command_and_method():
    readme = (ROOT / "README.md").read_text()
    leaves = [name for name in commands() if name and not any(other.startswith(f"{name} ") for other in commands())]
    assert [name for name in leaves if f"kvfold {name}" not in readme] == []
    assert [name for name in METHODS if f"docs/methods/{name}.md" not in readme] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text())
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]*)?\)", text):
        there = page.parent / target if target else page
        assert there.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in anchors(there), f"{name_of(page)} links to {target}{anchor}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("spec", METHODS.values(), ids=list(METHODS))
def test_a_method_has_a_page_that_agrees_with_its_spec(spec):
    text = (METHOD_PAGES / f"{spec.name}.md").read_text()
    assert text.startswith(f"# {spec.name}: ")
    assert spec.source in text
    assert f"**Chunk-invariant.** {'Yes' if spec.chunk_invariant else 'No'}" in text
    for part in ("Rule", "Text form", "What is freed", "Source", "Cost", "Status"):
        assert f"**{part}.**" in text
    assert "Differs: " in text


def test_text_forms_in_the_docs_are_understood():
    """A method's text form with numbers in it; letters (`window:W+S`) stand for numbers."""
    form = re.compile(rf"`((?:{'|'.join(METHODS)}):[0-9a-z%+]+)`")
    found = [text for page in PAGES for text in form.findall(page.read_text())]
    assert found
    for text in found:
        parse_time(text)


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs" / "api" / "kvfold.md").read_text()
    assert sorted(re.findall(r"^::: kvfold\.(\w+)$", page, re.MULTILINE)) == sorted(kvfold.__all__)
