"""`kvfold convert`: what it writes and says; bad input ends in one line and leaves nothing."""

import json

import pytest

from kvfold.models.load import load, load_tokenizer


def test_it_writes_a_checkpoint_that_every_command_reads(kvfold, folder):
    done = kvfold("convert tiny out --layers cla2 --heads 1 --time window:8+2")
    assert (done.code, done.out) == (0, "out\n")
    for line in ("layers: full -> cla2", "owners: 2 -> 1", "KV heads: 2 -> 1", "time: full -> window:8+2"):
        assert line in done.err.splitlines()
    assert load("out").config.layout.layers_text() == "cla2"
    assert len(load_tokenizer("out")) == len(load_tokenizer("tiny"))
    assert kvfold("generate out hello --max-new-tokens 3").code == 0


def test_json_is_all_there_is_on_stdout(kvfold):
    done = kvfold("convert tiny out --heads 1 --for transformers --json")
    shown = json.loads(done.out)
    assert shown["kind"] == "convert" and shown["out"] == "out"
    assert shown["changed"] == {"KV heads": [2, 1], "KV bytes a token": [256, 128]}


def test_what_vllm_can_serve_is_kvfolds_own_checkpoint(kvfold):
    done = kvfold("convert tiny out --layers cla2 --time window:8+0 --for vllm")
    assert (done.code, done.out) == (0, "out\n")
    assert load("out").config.layout.layers_text() == "cla2"


def test_fitted_reads_the_text_it_is_given(kvfold):
    done = kvfold("convert tiny out --layers cla2 --init fitted --calibration text.txt --tokens 512")
    assert (done.code, done.out) == (0, "out\n")
    assert load("out").config.layout.owners == (0,)


def test_layers_that_are_chosen_by_measuring(kvfold, folder):
    done = kvfold("convert tiny out --layers best:1 --calibration text.txt --tokens 1k")
    assert (done.code, done.out) == (0, "out\n")
    assert load("out").config.layout.owners == (0,)
    assert list(json.loads((folder / "out" / "layer_costs.json").read_text())["costs"]) == ["0-1"]
    assert not (folder / ".out.layers").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("convert tiny out --layers cla3", "does not fit a model of 2 layers"),
        ("convert tiny out --heads 3", "use 1, 2"),
        ("convert tiny out --init best", "best"),
        ("convert tiny tiny --layers cla2", "not empty"),
        ("convert tiny text.txt --layers cla2", "a file is in the way"),
        ("convert nowhere/at/all out --layers cla2", "there is no such file or folder"),
        ("convert tiny out --layers cla2 --for transformers", "shares layers"),
        ("convert tiny out --layers cla2 --time 'full; 1=tova:8'", "layer 1 stores nothing, it reads layer 0"),
        ("convert tiny out --layers cla2 --calibration text.txt", "only 'fitted' and 'best:N' read any"),
        ("convert tiny out --layers best:2", "1 to 1 can be chosen"),
        ("convert tiny out --layers best:1 --for transformers", "no words for shared layers"),
        ("convert tiny out --layers cla2 --time h2o:4+4 --for vllm", "use `kvfold serve`"),
        ("convert tiny out --layers best:1 --bits int8 --for vllm", "use `kvfold serve`"),
        ("plan tiny --layers best:1", "which layers these are has to be measured"),
        ("convert tiny out --layers cla2 --init fitted --tokens 100", "ask for more"),
        ("convert tiny out --layers cla2 --init fitted --tokens many", "many"),
        ("convert tiny out --layers cla2 --init fitted --calibration none.txt", "there is no such file"),
        ("convert tiny out --layers cla2 --dtype float8", "float8"),
    ],
)
def test_bad_input(kvfold, folder, line, said):
    before = sorted(folder.rglob("*"))
    assert said in kvfold(line).error
    assert sorted(folder.rglob("*")) == before
