import gzip
import json
from pathlib import Path

import pytest

from kvfold.data import read_text_file


def lines(*texts: str) -> str:
    return "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(texts))


@pytest.mark.parametrize("ending", ["jsonl", "json", "jsonl.gz"])
def test_each_line_of_a_lines_file_is_a_document(tmp_path: Path, ending: str):
    path, data = tmp_path / f"news.{ending}", lines("one", "zwei ä\n", "  ", "three").encode()
    path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    text = read_text_file(path)
    assert text.name == "news"
    assert text.documents == ("one", "zwei ä\n", "three")
    assert text.joined == "one\n\nzwei ä\n\n\nthree"


@pytest.mark.parametrize("ending", ["txt", "txt.gz", "md"])
def test_any_other_file_is_one_document(tmp_path: Path, ending: str):
    path, data = tmp_path / f"a.b.{ending}", '{"text": "not taken apart"}\nü'.encode()
    path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    text = read_text_file(path)
    assert text.name == "a.b"
    assert text.documents == ('{"text": "not taken apart"}\nü',)


def test_the_digest_is_of_the_text_not_of_its_packing(tmp_path: Path):
    data = lines("one", "two").encode()
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "c.jsonl").write_bytes(lines("one", "twO").encode())
    a, b, c = (read_text_file(tmp_path / name).digest for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl"))
    assert a == b != c


def test_a_byte_that_is_not_utf8_is_named(tmp_path: Path):
    plain, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"a\.txt: byte 3 \(0xe9\) is not UTF-8"):
        read_text_file(plain)
    first = lines("one").encode()
    rows.write_bytes(first + b'{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=rf"a\.jsonl: byte {len(first) + 10} \(0xff\) is not UTF-8"):
        read_text_file(rows)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.txt", b"", "no text in it"),
        ("a.txt", b" \n\t\n", "no text in it"),
        ("a.jsonl", b'{"text": "  "}\n', "no text in it"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', "line 2: no text under 'text'"),
        ("a.jsonl", b'{"content": "x"}\n', "line 1: no text under 'text'"),
        ("a.jsonl", b'["x"]\n', "line 1: no text under 'text'"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "x\n', "line 3: not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl.gz", b"not gzip", "can't be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 50, mtime=0)[:-12], "can't be read"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, name: str, data: bytes, says: str):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_text_file(path)
    assert says in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_path_that_leads_nowhere_or_to_a_folder(tmp_path: Path):
    with pytest.raises(ValueError, match="no such file"):
        read_text_file(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="this is a folder"):
        read_text_file(tmp_path)
