import gzip
import json
from pathlib import Path

import pytest

from kvfold.data import holds_lines, read_question_file

GOOD = {"input": "Two and two?", "choices": ["three", "four"], "gold": 1, "prefix": "Reckon."}


def test_questions_of_plain_and_packed_files(tmp_path):
    lines = "\n".join(json.dumps(one) for one in (GOOD, {key: GOOD[key] for key in ("input", "choices", "gold")}))
    (tmp_path / "sums.jsonl").write_text(f"{lines}\n\n")
    (tmp_path / "sums.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    plain, packed = (read_question_file(tmp_path / name) for name in ("sums.jsonl", "sums.jsonl.gz"))
    assert plain.name == packed.name == "sums"
    assert plain.questions == packed.questions
    assert [one.prefix for one in plain.questions] == ["Reckon.", ""]
    assert plain.questions[0].choices == ("three", "four") and plain.questions[0].gold == 1


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "not JSON"),
        ("[]", "not an object"),
        (json.dumps({"input": "a", "choices": ["b", "c"]}), "no 'gold'"),
        (json.dumps({"choices": ["b", "c"], "gold": 0}), "no 'input'"),
        (json.dumps(GOOD | {"input": " "}), "'input' or 'prefix' is no text"),
        (json.dumps(GOOD | {"prefix": None}), "'input' or 'prefix' is no text"),
        (json.dumps(GOOD | {"choices": ["one"]}), "'choices' are not 2 or more texts"),
        (json.dumps(GOOD | {"choices": ["one", 2]}), "'choices' are not 2 or more texts"),
        (json.dumps(GOOD | {"gold": 2}), "'gold' is 2 and there are 2 choices"),
        (json.dumps(GOOD | {"gold": True}), "'gold' is True"),
        (json.dumps(GOOD | {"gold": "four"}), "'gold' is 'four'"),
    ],
)
def test_a_line_of_another_shape_is_named(tmp_path, line, what):
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    with pytest.raises(ValueError) as caught:
        read_question_file(path)
    assert str(caught.value).startswith(f"{path} line 2: {what}")
    assert "each line is one object with 'input', 'choices'" in str(caught.value)


def test_files_without_questions_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="there is no question in it"):
        read_question_file(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="there is no such file"):
        read_question_file(tmp_path / "none.jsonl")


def test_names_of_files_and_of_tasks():
    assert [holds_lines(Path(name)) for name in ("a.jsonl", "b/a.jsonl.gz", "a.json", "hellaswag", "a.gz")] == [
        True, True, True, False, False,
    ]  # fmt: skip
