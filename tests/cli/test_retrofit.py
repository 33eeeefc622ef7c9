"""`kvfold retrofit`: a result, a card, a run that goes on, and one line for whatever is wrong."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

TINY = "retrofit tiny out --data text.txt --context 64 --batch 2 --tokens 512"
DMS = f"{TINY} --adapter --time dms:8 --compression 2"


@pytest.fixture(autouse=True)
def longer_text(folder):
    (folder / "text.txt").write_text((folder / "text.txt").read_text() * 4)


def test_an_adapter_is_trained_loaded_and_measured(kvfold, folder):
    done = kvfold(f"{DMS} --warm-start --learning-rate 1e-3")
    assert done.code == 0, done.err
    assert done.out == "out\n"
    first, *_, last = done.err.splitlines()
    assert first == "4 steps of 128 tokens, compression 2 at 64 tokens (2.39 by the gates alone)"
    assert last.startswith("held-out perplexity ") and "compression" in last
    card = (folder / "out" / "README.md").read_text()
    for part in ("base | tiny", "`dms:8`", "compression reached on held-out text", "gates alone", "512, in sequences of 64",
                 "data | text.txt", "hardware", "held-out perplexity of the original", "the original: its weights are frozen",
                 "warm start", "calibrated", "commit"):  # fmt: skip
        assert part in card, part
    read = kvfold("eval tiny --adapter out --text text.txt --context 64 --windows 2 --json")
    methods = {row["method"]: row["compression"] for row in json.loads(read.out)["rows"]}
    assert methods["full"] == 1 and methods["dms:8"] > 1.2
    assert "dms:8: " in kvfold("generate tiny Hello --adapter out --max-new-tokens 4").err
    again = kvfold(DMS + " --warm-start --learning-rate 1e-3 --json")
    assert json.loads(again.out)["kind"] == "retrofit" and again.err == "out: done already\n"


def test_plain_uptraining_of_all_weights(kvfold, folder):
    done = kvfold(f"{TINY} --full --json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["tokens"] == 512 and facts["after"]["perplexity"] > 0
    assert kvfold("eval out --text text.txt --context 64 --windows 1").code == 0


def test_heads_then_time_from_the_original(kvfold):
    """The road of studies/time-axis.sh: fewer heads, then DMS on top as a LoRA, warm-started, distilled from the original."""
    assert kvfold("convert tiny gqa --heads 1").code == 0
    how = "--lora 2 --time dms:8 --compression 2 --warm-start --kl reverse --teacher tiny"
    done = kvfold(f"{TINY.replace('tiny', 'gqa', 1)} {how} --json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["warm_start"]["tokens"] > 0 and facts["after"]["compression"] > 1.5
    read = kvfold("eval tiny --time full --beside gqa,out --text text.txt --context 64 --windows 4 --json")
    both = json.loads(read.out)["rows"][1]
    assert both["compression"] > 1.3 and both["allocated_bytes"] < 0.5 * both["full_bytes"]


@pytest.fixture
def refused(kvfold, folder):
    def run(line):
        before = sorted(folder.rglob("*"))
        error = kvfold(line)
        assert error.code == 2 and error.out == "" and sorted(folder.rglob("*")) == before, error
        return error.err.splitlines()[-1]

    return run


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (TINY, "nothing says what learns: give --adapter, --lora R, --full or a recipe"),
        (f"{DMS} --full", "--adapter and --full: one of them says what learns"),
        ("retrofit tiny out --full", "no data to train on: give --data FILES"),
        (f"{DMS} --compression 0.5", "compression 0.5: it is times smaller, 1 or more"),
        (f"{DMS} --compression 8", "use a delay of 6 or less, or longer sequences"),
        (f"{DMS} --context 64k --tokens 1M", "seq_len 65,536: the model reads 256 at most"),
        (f"{DMS} --tokens 100", "tokens 100: one step takes 2 sequences of 64"),
        (f"{DMS} --data nowhere.txt", "nowhere.txt: there is no such file"),
        (f"{DMS} --recipe smollm2-dmz-cpu", "unknown recipe 'smollm2-dmz-cpu' (did you mean 'smollm2-dms-cpu'?)"),
        (f"{DMS} --set learning_rats=3", "unknown key 'learning_rats' (did you mean 'learning_rate'?)"),
        (f"{DMS} --kl sideways", "kl 'sideways': it is reverse or forward or none or empty"),
        (f"{DMS} --time tova:4", "it learns nothing"),
        (f"{DMS} --control", "a frozen model is its own control"),
        (f"{DMS} --teacher ./none", "there is no such file or folder"),
        (DMS.replace("tiny", "./none", 1), "there is no such file or folder"),
        (f"{DMS} --snapshot shot", "out: no checkpoint there yet: wait for the first"),
        (f"{DMS} --snapshot tiny", "tiny: the folder is not empty"),
        (DMS.replace("out", "tiny", 1), "the folder holds something else"),
        (DMS.replace("out", "text.txt", 1), "a file is in the way"),
    ],
)
def test_bad_input(refused, line, said):
    told = refused(line)
    assert told.startswith("error: ") and said in told


def test_too_little_text(refused, folder):
    (folder / "short.txt").write_text("Hello there.")
    assert "data of 0 sequences of 64 tokens: a run takes 3" in refused(DMS.replace("text.txt", "short.txt"))


def test_an_adapter_for_another_base(kvfold, folder):
    assert kvfold(f"{DMS} --no-calibrate").code == 0
    about = folder / "out" / "adapter.json"
    about.write_text(about.read_text().replace('"layers": 2', '"layers": 3'))
    done = kvfold("generate tiny Hello --adapter out")
    assert done.code == 2 and "it is for tiny (3 layers" in done.err and done.err.count("\n") == 1


@pytest.mark.slow
def test_two_processes_write_one_result_and_end_well(folder):
    """The other process has nothing to measure or to show, and does not bring the leading one down."""
    program = Path(sys.executable).parent / "kvfold"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run(
        [*launch, str(program), *shlex.split(f"{DMS} --device cpu --json")], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["after"]["compression"] > 1 and (folder / "out" / "adapter.json").is_file()
