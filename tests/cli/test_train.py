"""`kvfold train`: a model from a recipe, a sweep, and one line for whatever is wrong."""

import json

import pytest

SMALL = """
num_layers: 2
hidden_size: 32
intermediate_size: 48
num_heads: 4
num_kv_heads: 1
head_dim: 8
vocabulary: 300
layers: cla2
tokens: 512
seq_len: 32
global_batch_size: 4
validation_tokens: 64
learning_rate: 0.01
"""
RUN = "train small.yaml --data text.txt --out out"


@pytest.fixture(autouse=True)
def recipe(folder):
    (folder / "small.yaml").write_text(SMALL)


def test_a_model_is_trained_and_read(kvfold, folder):
    done = kvfold(RUN)
    assert done.code == 0, done.err
    assert done.out == "out\n"
    first, *_, last = done.err.splitlines()
    assert first.startswith("small.yaml: 33,216 weights, 32 bytes of KV cache a token at 16 bit; 4 steps of 128 tokens")
    assert last.startswith("held-out perplexity ") and last.endswith(" on 62 tokens")
    result = json.loads((folder / "out/results/pretraining.json").read_text())
    assert result["kind"] == "pretraining" and result["rows"][0]["validation_perplexity"] < 300
    assert kvfold("generate out Hello --max-new-tokens 3").code == 0
    assert kvfold("report out/results --out page.html").code == 0
    again = kvfold(f"{RUN} --json")
    assert json.loads(again.out)["rows"] == result["rows"] and again.err.endswith("out: done already\n")


def test_a_sweep_names_its_best(kvfold, folder):
    done = kvfold(f"{RUN} --sweep-lr 1000 --json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["rows"]
    assert [row["learning_rate"] for row in rows] == [0.01, 10.0]
    assert [row["note"] for row in rows] in (["best", ""], ["best", "diverged"])
    assert (folder / "out/model.safetensors").read_bytes() == (folder / "out/lr-0.01/model.safetensors").read_bytes()
    assert "the best: out/lr-0.01" in done.err


def test_recipes_are_listed(kvfold):
    rows = json.loads(kvfold("train --list --json").out)["rows"]
    found = {row["name"]: (row["parameters"], row["kv_bytes_per_token"]) for row in rows}
    assert found["1b-h128-mqa-cla2"][1] == 5120 and found["mini-h128-mqa-cla2"] == (4_544_448, 192)
    assert "tinyllama-cla2" in kvfold("train --list").out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train", "no recipe: give a name that `kvfold train --list` shows, or a .yaml file"),
        ("train mini-h128-mqa-cla9", "unknown recipe 'mini-h128-mqa-cla9' (did you mean 'mini-h128-mqa-cla4'?)"),
        ("train none.yaml", "none.yaml: there is no such file"),
        ("train small.yaml", "no data to train on: give --data FILES"),
        (f"{RUN} --data nowhere.txt", "nowhere.txt: there is no such file"),
        (f"{RUN} --set layer=cla2", "unknown key 'layer' (did you mean 'layers'?)"),
        (f"{RUN} --set layers=cla3", "layers 'cla3' does not fit a model of 2 layers"),
        (f"{RUN} --set num_kv_heads=3", "num_kv_heads 3: each serves as many of the 4 query heads: use a divisor"),
        (f"{RUN} --set head_dim=5", "head_dim 5: rotary positions turn channels in pairs"),
        (f"{RUN} --set vocabulary=100", "vocabulary 100: a tokenizer of bytes has 257 tokens or more"),
        (f"{RUN} --set tokenizer=./tiny", "tokenizer tiny: it has 768 tokens and the model's vocabulary 300"),
        (f"{RUN} --set tokenizer=./none", "there is no such file or folder"),
        (f"{RUN} --set validation_tokens=1M", "validation_tokens '1M': it is a whole number"),
        (f"{RUN} --set validation_tokens=100000", "sequences of 32 tokens are held out, and none is left: give more text"),
        (f"{RUN} --set fsdp=true", "fsdp: there is one process"),
        (f"{RUN} --tokens 100", "tokens 100: one step takes 4 sequences of 32"),
        (f"{RUN} --sweep-lr 1", "--sweep-lr 1: each rate is so many times the one before"),
        (RUN.replace("--out out", "--out tiny"), "the folder holds something else"),
    ],
)  # fmt: skip
def test_bad_input(kvfold, folder, line, said):
    before = sorted(folder.rglob("*"))
    done = kvfold(line)
    assert (done.code, done.out) == (2, "") and sorted(folder.rglob("*")) == before, done
    told = done.err.splitlines()[-1]
    assert told.startswith("error: ") and said in told


def test_a_recipe_that_lacks_something_or_knows_too_much(kvfold, folder):
    (folder / "small.yaml").write_text(SMALL.replace("head_dim: 8\n", ""))
    assert "recipe small.yaml: nothing says head_dim: add what" in kvfold(RUN).error
    (folder / "small.yaml").write_text(SMALL + "owner: 3\n")
    assert "recipe small.yaml: unknown key 'owner'" in kvfold(RUN).error
