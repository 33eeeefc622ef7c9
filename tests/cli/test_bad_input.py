"""Bad input: one line on stderr that says what, which rule and the remedy; exit code 2; nothing left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvfold.models.load import load

EVAL = "eval tiny --text text.txt --context 32 --windows 2 --out new/q.json"
GENERATE = "generate tiny hello --max-new-tokens 4"
BENCH = "bench decode tiny --batch 1 --prompt 4 --new 4 --repeats 1 --out new/d.json"
LONG = "word " * 400


@pytest.fixture
def refused(kvfold, folder) -> Callable[..., str]:
    """The error line of a command that must leave the folder as it was."""

    def run(line: str, *more: str, stdin: str | bytes = "") -> str:
        before = sorted(folder.rglob("*"))
        error = kvfold(line, *more, stdin=stdin).error
        assert sorted(folder.rglob("*")) == before
        assert error.startswith("error: ")
        return error.removeprefix("error: ")

    return run


def copy_of(folder: Path, edit: Callable[[Path], None]) -> str:
    """The checkpoint once more, as `other`, edited."""
    shutil.copytree(folder / "tiny", folder / "other")
    edit(folder / "other")
    return "other"


def of_family(name: str) -> Callable[[Path], None]:
    def edit(checkpoint: Path) -> None:
        path = checkpoint / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": name}))

    return edit


def torn(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


READERS = pytest.mark.parametrize("command", ["eval {}", "generate {} hello", "bench decode {}"])


@pytest.mark.parametrize("command", ["plan {}", "eval {}", "generate {} hello", "bench decode {}"])
def test_a_folder_without_a_config(refused, folder, command):
    (folder / "empty").mkdir()
    said = refused(command.format("empty"))
    assert said.startswith("empty: ") and "config.json" in said


@READERS
def test_an_unknown_family(refused, folder, command):
    said = refused(command.format(copy_of(folder, of_family("mixtral"))))
    assert "'mixtral'" in said and "llama, mistral" in said


@READERS
def test_a_torn_checkpoint(refused, folder, command):
    said = refused(command.format(copy_of(folder, torn)))
    assert said.startswith("other/model.safetensors: can't be read") and said.endswith("fetch the checkpoint again")


def test_a_checkpoint_without_a_tokenizer(refused, folder):
    other = copy_of(folder, lambda checkpoint: (checkpoint / "tokenizer.json").unlink())
    assert "no tokenizer can be read there" in refused(f"generate {other} hello")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("plan llama-3.1-8b --layers 0_0_2", "'0_0_2' does not fit a model of 32 layers: it names 3 layers"),
        ("plan tiny --layers trailing:2", "'trailing:2' does not fit a model of 2 layers"),
        ("plan tiny --layers 1_1", "an owner is never above its readers"),
        ("plan tiny --layers cla5", "did you mean 'cla4'?"),
        ("plan llama-3.1-8b --heads 3", "heads 3: layer 0 has 8 KV heads"),
        ("plan llama-3.1-8b --heads 0", "heads 0: layer 0 has 8 KV heads"),
        ("plan lama-3.1-8b", "did you mean 'llama-3.1-8b'?"),
        ("plan ./nowhere", "no such file or folder"),
        ("plan text.txt", "text.txt: can't be read as JSON"),
        ("plan tiny --time h3o:4+4", "did you mean 'h2o'?"),
        ("plan tiny --bits int9", "did you mean 'int8'?"),
        ("plan tiny --memory 5XB", "'5XB': it is a positive number"),
        ("plan tiny --memory 0", "'0': it is a positive number"),
        ("plan tiny --context many", "'many': it is a positive number"),
        ("plan tiny --context 0", "'0': it is a positive number"),
        ("plan tiny --batch 0", "0 rows of 4096 tokens"),
    ],
)
def test_plans(refused, line, said):
    assert said in refused(line)
    assert said in refused(f"{line} --json")


@pytest.mark.parametrize("line", [EVAL, GENERATE, BENCH])
@pytest.mark.parametrize(
    ("time", "said"),
    [
        *((time, "budget 0: a budget keeps at least 1 token") for time in ("h2o:0+4", "tova:0", "window:0+4")),
        ("toba:4", "unknown time method 'toba' (did you mean 'tova'?): use one of "),
        ("lru:4", "unknown time method 'lru': use one of dmc, dms, fold, full, h2o, tova, window"),
        ("h2o:4", "h2o takes two budgets"),
        ("h2o:4+4; 7=full", "7"),
        ("", "use one of dmc"),
        ("dmc:0", "dmc window 0"),
        ("dms:0", "dms delay 0"),
    ],
)
def test_methods(refused, line, time, said):
    assert said in refused(line, "--time", time)


@pytest.mark.parametrize("line", [EVAL, GENERATE, BENCH])
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--adapter mine", "adapter mine: no adapter.json there: give the folder that `kvfold retrofit` wrote"),
        ("--dtype int3", "dtype 'int3': weights are held as float32, bfloat16, float16"),
        ("--device gpu", "device 'gpu': torch knows no such device"),
    ],
)
def test_ways_to_load(refused, line, option, said):
    assert said in refused(f"{line} {option}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"caf\xe9 " * 500, "byte 3 (0xe9) is not UTF-8"),
        (b" \n", "there is no text in it"),
        (b"Hello there.", "tokens and a window takes 32"),
        (None, "there is no such file"),
    ],
)
def test_texts(refused, folder, content, said):
    if content is not None:
        (folder / "bad.txt").write_bytes(content)
    said_of = refused(f"{EVAL} --text bad.txt")
    assert said in said_of and said_of.startswith("bad")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"{EVAL} --context 512", "a context of 512 tokens: the model reads 256 at most"),
        (f"{EVAL} --context 1", "context_tokens 1"),
        (f"{EVAL} --windows 0", "windows 0"),
        (f"{EVAL} --batch 0", "batch 0"),
        (f"{EVAL} --chunk 0", "call_tokens 0"),
        (f"{EVAL} --passkey", "a passkey prompt of 32 tokens: the shortest has"),
        (f"{EVAL} --out tiny", "tiny: no file can be written there"),
        (f"{EVAL} --out text.txt/q.json", "text.txt/q.json: no file can be written there"),
        ("bench decode tiny", "point '8 x 1,024' of 1,056 tokens: the model reads 256 at most"),
        (f"{BENCH} --prompt 300", "the model reads 256 at most"),
        (f"{BENCH} --batch 0", "batch 0"),
        (f"{BENCH} --new 1", "new_tokens 1"),
        (f"{BENCH} --repeats 0", "0 repeats"),
        (f"{BENCH} --peers others", "write 'transformers' or 'none'"),
        (f"{BENCH} --out tiny", "no file can be written there"),
        (f"{GENERATE} --max-new-tokens 300", "and 300 new ones: the model was made for 256"),
        (f"generate tiny '{LONG}'", "and 128 new ones: the model was made for 256"),
        ("generate tiny", "an empty prompt"),
        ("generate ./nowhere hello", "there is no such file or folder"),
        ("generate nobody-at-all/nothing hello", "no folder here, and no config.json came from the hub"),
        ("report", "results: no such file or folder"),
        ("report tiny", "no readable results"),
        ("report text.txt", "no readable results"),
        ("demo --out text.txt", "no file can be written there"),
    ],
)
def test_sizes_and_places(refused, line, said):
    assert said in refused(line)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"{EVAL} --passkey-length 128", "--passkey-length without --passkey: no key would be hidden"),
        (f"{EVAL} --passkey --passkey-length 300", "a passkey prompt of 300 tokens: the model reads 256 at most"),
        (f"{EVAL} --limit 4", "--limit without --tasks: no task would be scored"),
        (f"{EVAL} --task-length 64", "--task-length without --tasks"),
        (f"{EVAL} --task-folder tiny", "--task-folder without --tasks"),
        (f"{EVAL} --tasks ,", "--tasks ',': it names no task"),
        (f"{EVAL} --tasks none.jsonl", "none.jsonl: there is no such file"),
        (f"{EVAL} --tasks bad.jsonl", "bad.jsonl line 1: no 'gold': each line is one object with 'input', 'choices'"),
        (f"{EVAL} --tasks bad.jsonl --task-folder none", "none: there is no such folder of tasks"),
    ],
)
def test_tasks_and_passkeys(refused, folder, line, said):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'kvfold[eval]'")
    (folder / "bad.jsonl").write_text('{"input": "What?", "choices": ["a", "b"]}\n')
    assert said in refused(line)


def test_a_page_where_a_folder_is(refused, kvfold, folder):
    (folder / "plan.json").write_text(kvfold("plan tiny --json").out)
    assert "no file can be written there" in refused("report plan.json --out tiny")


def test_a_prompt_that_is_not_utf_8(refused):
    assert "utf-8" in refused("generate tiny -", stdin=b"caf\xe9")


def test_a_second_text_is_checked_before_the_first_is_measured(refused, folder):
    (folder / "empty.txt").write_text("")
    assert "empty.txt: there is no text in it" in refused(f"{EVAL} --text empty.txt")


def test_transformers_has_no_class_for_a_checkpoint_of_ours(refused, folder, capfd):
    load(folder / "tiny").save_pretrained(folder / "ours")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "tiny" / file, folder / "ours" / file)
    capfd.readouterr()
    assert "a kvfold checkpoint, which transformers has no class for" in refused(BENCH.replace("tiny", "ours"))


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (RuntimeError("one\n two"), "failed: RuntimeError: one two: `kvfold --debug ...` shows where"),
        (MemoryError(), "failed: out of memory (MemoryError): make the batch, the context or the cache smaller"),
        (OSError(28, "No space left"), "failed: [Errno 28] No space left"),
        (KeyboardInterrupt(), "stopped"),
    ],
)
def test_what_breaks_while_running_is_a_failure(kvfold, monkeypatch, folder, raised, line):
    def fail(*args, **kwargs):
        raise raised

    monkeypatch.setattr("kvfold.eval.perplexity.measure_quality", fail)
    assert kvfold(EVAL) == (1, "", f"{line}\n")
    assert not (folder / "new").exists()
