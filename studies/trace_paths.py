"""What a reader must follow: files and lines of kvfold that run in a step of decoding, in a step of training, and from
`--time dms:128` to the store.

    PYTHONPATH=CHECKOUT python studies/trace_paths.py [--json] [--before OLDER_CHECKOUT]

Counts every function of kvfold that is entered: its file once, and its lines without docstring, comments and blank lines.
A tiny random model is enough, since what runs does not depend on sizes. The same script runs on older checkouts, so that
two of them can be put side by side: with `--before` the table of docs/architecture.md is written anew.
"""

import ast
import contextlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import kvfold
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM

try:
    from kvfold.methods.gates import GateConfig
except ImportError:  # before methods had a room
    from kvfold.models.gates import GateConfig

ROOT = Path(kvfold.__file__).parent


class Traced:
    """Inside, functions of kvfold that are entered are taken down."""

    def __enter__(self):
        self.entered: set[tuple[str, int]] = set()
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _see(self, frame, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT)):
            self.entered.add((code.co_filename, code.co_firstlineno))

    def figures(self) -> dict[str, int]:
        """Files, functions and lines."""
        files = {name for name, _ in self.entered}
        lines = functions = 0
        for name in files:
            source = Path(name).read_text()
            text = source.splitlines()
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef):
                    first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
                    if (name, first) in self.entered:
                        functions += 1
                        lines += _lines_of(node, text)
        return {"files": len(files), "functions": functions, "lines": lines}


def _lines_of(node: ast.FunctionDef, text: list[str]) -> int:
    """Lines of a function without docstring, comments and blank lines."""
    skipped: set[int] = set()
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        skipped = set(range(first.lineno, first.end_lineno + 1))
    numbers = range(node.lineno, node.end_lineno + 1)
    return sum(
        1 for number in numbers
        if number not in skipped and text[number - 1].strip() and not text[number - 1].strip().startswith("#")
    )  # fmt: skip


def tiny_model(folder: Path) -> str:
    """A model with DMS gates beside it, saved."""
    torch.manual_seed(0)
    model = FoldForCausalLM(
        FoldConfig(
            vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )
    )  # fmt: skip
    model.set_gates(GateConfig(method="dms", source="adapter", scale=40.0, offset=1.0), "dms:4")
    model.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def decoding_step(source: str, time: str) -> dict[str, int]:
    """One token a row, after a prompt."""
    model = kvfold.load(source, time=time)
    cache = model.new_cache(rows=2)
    model(torch.arange(24).view(2, 12) + 3, past_key_values=cache)
    for token in range(3):
        model(torch.full((2, 1), 5 + token), past_key_values=cache)
    with Traced() as traced:
        model(torch.full((2, 1), 9), past_key_values=cache)
    return traced.figures()


def to_the_store(source: str) -> dict[str, int]:
    """A text form becomes a model's method and a cache's store."""
    model = kvfold.load(source, time="full")
    of_cache = "time" in inspect.signature(model.new_cache).parameters
    with Traced() as traced:
        if of_cache:
            cache = model.new_cache(rows=1, time="dms:128")
        else:  # before a method belonged to a cache
            model.config.layout = model.config.layout.with_time("dms:128")
            cache = model.new_cache(rows=1)
    assert cache.layout.time_text() == "dms:128"
    return traced.figures()


class _Traced(Exception):
    """The step that was asked for is done."""


def training_step(source: str, folder: Path) -> dict[str, int]:
    """The third step of a retrofit under DMS, from the end of the one before to its own point of the curve."""
    from kvfold.train.retrofit import Retrofit
    from kvfold.train.run_folder import RunFolder
    from kvfold.train.settings import RetrofitSettings

    traced = Traced()

    def on_step(point: dict) -> None:
        if point["step"] == 2:
            traced.__enter__()
        if point["step"] == 3:
            traced.__exit__()
            raise _Traced

    (folder / "text.txt").write_text("a bird in the hand is worth two in the bush. " * 60)
    sizes = {"sequence_tokens": 32, "batch_sequences": 2, "ramp_steps": 4, "tail_steps": 2}
    run = Retrofit(
        model=kvfold.load(source), tokenizer=_byte_tokenizer(), source=source, name="tiny", on_step=on_step,
        settings=RetrofitSettings(time="dms:4", compression=2.0, data=(str(folder / "text.txt"),), **sizes),
        folder=RunFolder(out=folder / "out"), about={},
    )  # fmt: skip
    with contextlib.suppress(_Traced):
        run.run()
    return traced.figures()


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def measured(folder: Path) -> dict[str, dict[str, int]]:
    """What runs, by what is done; a model is saved in `folder`."""
    source = tiny_model(folder)
    return {
        "a decoding step under `window`": decoding_step(source, "window:6+2"),
        "a decoding step under `dms`": decoding_step(source, "dms:4"),
        "from `--time dms:128` to the store": to_the_store(source),
        "a training step under `dms`": training_step(source, folder),
    }


def main() -> None:
    """Prints a table, or JSON."""
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(Path(folder))
    if "--json" in sys.argv:
        print(json.dumps(rows, indent=1))
    elif "--before" in sys.argv:
        write_table(before=older(sys.argv[sys.argv.index("--before") + 1]), after=rows)
    else:
        for name, row in rows.items():
            print(f"| {name} | {row['files']} | {row['functions']} | {row['lines']} |")


def older(checkout: str) -> dict[str, dict[str, int]]:
    """The same of another checkout."""
    environment = os.environ | {"PYTHONPATH": str(Path(checkout).resolve())}
    command = [sys.executable, __file__, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def write_table(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> None:
    """Into the architecture page, behind the header that is there."""
    page = ROOT.parent / "docs" / "architecture.md"
    head, rule, rest = page.read_text().partition("|---|--:|--:|--:|--:|\n")
    assert rule, f"{page} has no table to fill"
    below = rest[rest.index("\n## ") :]
    rows = [
        f"| {name} | {before[name]['files']} | {row['files']} | {before[name]['lines']} | {row['lines']} |\n"
        for name, row in after.items()
    ]
    page.write_text(head + rule + "".join(rows) + below)


if __name__ == "__main__":
    main()
