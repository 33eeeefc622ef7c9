"""Tasks through `measure_tasks`: what is asked, what is kept, what a row says."""

import importlib.util
import json
import sys

import pytest

from byte_tokenizer import byte_tokenizer
from tiny_model import tiny_model

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'kvfold[eval]'")

from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from kvfold.eval import lm_eval, tasks
from kvfold.eval.lm_eval import find_tasks, worded
from kvfold.eval.tasks import largest_difference, likelihoods, measure_tasks

QUESTIONS = [
    {"input": f"What is {a} and {b}? ", "choices": [str(a + b), str(a * b), "many"], "gold": 0, "prefix": prefix}
    for a, b, prefix in [(2, 3, ""), (4, 5, "Reckon.\n"), (7, 1, ""), (3, 3, ""), (9, 2, "Reckon."), (6, 5, "")]
]
YAML = """
task: {name}
dataset_path: ""
custom_dataset: !function made.questions
output_type: generate_until
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "x"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
MADE = """
from datasets import Dataset


def questions(max_seq_lengths=(7,), tokenizer=None, **more):
    assert tokenizer is not None
    return {"test": Dataset.from_list([{"text": "y" * length} for length in max_seq_lengths])}
"""


@pytest.fixture(scope="module")
def long_model():
    return tiny_model(max_position_embeddings=128)


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)))
    return str(path)


@pytest.fixture
def yaml_folder(tmp_path, monkeypatch):
    """A folder with one synthetic task, and an lm-eval that knows no other, for indexing its own takes long."""
    folder = tmp_path / "yaml"
    folder.mkdir()
    (folder / "counting.yaml").write_text(YAML.format(name="counting"))
    (folder / "made.py").write_text(MADE)
    whole = lm_eval.TaskManager
    monkeypatch.setattr(lm_eval, "TaskManager", lambda include_defaults, **more: whole(include_defaults=False, **more))
    return folder


@pytest.fixture
def evaluations(monkeypatch) -> list[str]:
    """What is measured, as it happens."""
    found, measured = [], tasks._measured
    monkeypatch.setattr(tasks, "_measured", lambda lm, *more: found.append(lm.about) or measured(lm, *more))
    return found


def test_scores_of_the_unfolded_model_are_those_of_hf(long_model, questions):
    rows = measure_tasks(long_model, byte_tokenizer(), [questions], ["h2o:25%+25%"], name="tiny")
    assert [(row["task"], row["method"], row["metric"], row["items"]) for row in rows] == [
        ("sums", "full", "acc", 6),
        ("sums", "h2o:25%+25%", "acc", 6),
    ]
    # Without a cache the tiny model reads as transformers' would: tests/models proves it.
    theirs = evaluate(
        lm=HFLM(long_model, backend="causal", tokenizer=byte_tokenizer()), task_dict=find_tasks([questions])[0].load()
    )
    assert rows[0]["value"] == theirs["results"]["sums"]["acc,none"]
    assert rows[0]["standard_error"] == theirs["results"]["sums"]["acc_stderr,none"]
    assert rows[0]["difference"] == {"mean": 0, "standard_error": 0}
    assert rows[0]["compression"] == 1 and rows[1]["compression"] > 1.8
    assert rows[1]["difference"]["mean"] == pytest.approx(rows[1]["value"] - rows[0]["value"])
    assert rows[1]["kept_tokens"] == pytest.approx(rows[1]["seen_tokens"] / rows[1]["compression"], rel=0.1)


def test_a_question_is_worded_without_doubled_spaces():
    assert worded("Reckon.\n", " What? ") == "Reckon.\nQ: What?\nA:"
    assert worded("", "What?") == "Q: What?\nA:"
    task = find_tasks_of(QUESTIONS[1])
    assert task.doc_to_text(task.test_docs()[0]) == "Reckon.\nQ: What is 4 and 5?\nA:"


def find_tasks_of(question):
    from kvfold.data import Question, QuestionFile

    one = Question(**{**question, "choices": tuple(question["choices"])})
    return lm_eval._task_of_file(QuestionFile(name="one", questions=(one,), digest="")).load()["tasks"]["one"]


def test_finished_cells_are_not_measured_again(long_model, questions, evaluations, tmp_path):
    settings = {"name": "tiny", "limit": 2, "cells": tmp_path / "cells"}
    first = measure_tasks(long_model, byte_tokenizer(), [questions], ["tova:9"], **settings)
    assert evaluations == ["sums full", "sums tova:9"]
    assert [row["items"] for row in first] == [2, 2]
    again = measure_tasks(long_model, byte_tokenizer(), [questions, questions], ["tova:9", "tova:10"], **settings)
    assert evaluations[2:] == ["sums tova:10"]
    assert again[:2] == first
    measure_tasks(long_model, byte_tokenizer(), [questions], [], **settings | {"limit": 3})
    assert evaluations[3:] == ["sums full"]


def test_a_synthetic_task_is_made_to_each_length(long_model, questions, yaml_folder, evaluations):
    rows = measure_tasks(
        long_model,
        byte_tokenizer(),
        ["counting", questions],
        [],
        name="tiny",
        folder=yaml_folder,
        lengths=[11, 23],
        limit=1,
    )
    assert [(row["task"], row["length_tokens"]) for row in rows] == [("counting", 11), ("counting", 23), ("sums", None)]
    assert rows[1]["seen_tokens"] - rows[0]["seen_tokens"] == 12
    assert evaluations == ["counting 11 full", "counting 23 full", "sums full"]


def test_a_group_has_one_row_and_a_tag_one_for_each_task(long_model, yaml_folder):
    for name in ("adding", "taking"):
        (yaml_folder / f"{name}.yaml").write_text(YAML.format(name=name) + "tag: both\n")
    score = "{metric: exact_match, aggregation: mean, weight_by_size: true}"
    (yaml_folder / "sums.yaml").write_text(
        f"group: sums\ntask: [adding, taking]\naggregate_metric_list: [{score}]\nmetadata: {{version: 1}}\n"
    )
    rows = measure_tasks(long_model, byte_tokenizer(), ["sums", "both"], [], name="tiny", folder=yaml_folder)
    assert [(row["task"], row["items"], row["requests"]) for row in rows] == [
        ("sums", 2, 2), ("adding", 1, 2), ("taking", 1, 2),
    ]  # fmt: skip


def test_lm_evals_own_folder_of_a_task_is_enough(monkeypatch):
    asked, whole = [], lm_eval.TaskManager
    monkeypatch.setattr(lm_eval, "TaskManager", lambda **more: asked.append(more) or whole(**more))
    (task,) = find_tasks(["sciq"])
    assert [(one["include_defaults"], len(one["include_path"])) for one in asked] == [(False, 1)]
    assert task.name == "sciq" and set(task.identity) == {"lm_eval", "config", "task", "length"}


def test_an_unknown_task_is_named_with_the_nearest(long_model, yaml_folder):
    with pytest.raises(ValueError, match=r"task 'countin': lm-eval knows no such task: the nearest is 'counting': "):
        measure_tasks(long_model, byte_tokenizer(), ["countin"], [], name="tiny", folder=yaml_folder)
    with pytest.raises(ValueError, match="task 'zzz': lm-eval knows no such task: name one of its tasks"):
        find_tasks(["zzz"], folder=yaml_folder)
    with pytest.raises(ValueError, match="no such folder of tasks"):
        find_tasks(["counting"], folder=yaml_folder / "none")


def test_data_that_cannot_be_had_and_packages_that_lack(long_model, yaml_folder, tmp_path):
    (yaml_folder / "lost.yaml").write_text(
        YAML.format(name="lost")
        .replace("custom_dataset: !function made.questions", "")
        .replace('""', str(tmp_path / "no"))
    )
    with pytest.raises(RuntimeError, match=r"task 'lost': its data can't be had \(\w+: "):
        measure_tasks(long_model, byte_tokenizer(), ["lost"], [], name="tiny", folder=yaml_folder)
    (yaml_folder / "made.py").write_text("import wonder_of_words\n\n\ndef questions(**more): ...\n")
    sys.modules.pop("made", None)
    with pytest.raises(ValueError, match=r"task 'counting': it needs wonder_of_words, which is not installed: run pip"):
        measure_tasks(long_model, byte_tokenizer(), ["counting"], [], name="tiny", folder=yaml_folder)


def test_lm_eval_may_be_missing(long_model, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"lm_eval is not installed: .*: run pip install 'kvfold\[eval\]'"):
        measure_tasks(long_model, byte_tokenizer(), ["sciq"], [], name="tiny")


def test_the_peer_stands_in_the_last_row_and_gives_the_same_likelihoods(long_model, questions, tmp_path):
    loads = []
    settings = {"name": "tiny", "cells": tmp_path / "cells", "peer": lambda: loads.append(1) or long_model}
    full, folded, theirs = measure_tasks(long_model, byte_tokenizer(), [questions], ["h2o:5+4"], **settings)
    assert theirs["method"] == "hf" and theirs["title"].endswith("by lm-eval's hf") and "compression" not in theirs
    assert theirs["value"] == full["value"] and theirs["difference"] == {"mean": 0, "standard_error": 0}
    assert theirs["largest_likelihood_difference"] < 1e-4 and full["largest_likelihood_difference"] == 0
    assert folded["largest_likelihood_difference"] > 1e-2
    assert measure_tasks(long_model, byte_tokenizer(), [questions], ["h2o:5+4"], **settings) == [full, folded, theirs]
    assert loads == [1]


def test_likelihoods_that_answer_other_requests_are_not_compared():
    assert largest_difference([1.0, 2.0], [1.0, 2.5]) == 0.5
    assert largest_difference([1.0], [1.0, 2.5]) is None is largest_difference(None, [1.0])


def test_written_answers_have_no_likelihoods():
    pairs = {"resps": [[(-1.5, True)], [(-2.5, False)]]}
    assert likelihoods({"a": [pairs], "b": [pairs]}) == [-1.5, -2.5, -1.5, -2.5]
    assert likelihoods({"a": [{"resps": [["written"]]}]}) is None
    assert likelihoods({"a": [{"resps": [[-3.0]]}]}) is None
