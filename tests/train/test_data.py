import gzip
import json
import random
import tracemalloc

import pytest
import torch

from byte_tokenizer import BOS, byte_tokenizer
from kvfold.train.data import TrainingOrder, draw_text, training_texts


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Two files of numbered lines: `a.jsonl.gz` with short documents, `b.txt` one long one."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"id": n, "text": f"document {n}\n" * 3}) for n in range(40)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (tmp_path / "b.txt").write_text("".join(f"line {n}\n" for n in range(500)))
    return ["a.jsonl.gz", "b.txt"]


def draw(texts, **settings):
    return draw_text(texts, byte_tokenizer(), **({"tokens": 960, "seq_len": 32, "seed": 0, "spared": 4} | settings))


def rows(blocks):
    return {tuple(row) for row in blocks.tolist()}


def test_the_seed_rules_the_draw(texts):
    first, again, other = draw(texts), draw(texts), draw(texts, seed=1)
    for part in ("train", "calibration", "held_out"):
        assert torch.equal(getattr(first, part), getattr(again, part))
    assert not torch.equal(first.train, other.train)


def test_parts_have_their_sizes_and_share_no_block(texts):
    drawn = draw(texts)
    assert (drawn.train.shape, drawn.calibration.shape, drawn.held_out.shape) == ((30, 32), (4, 32), (4, 32))
    assert drawn.train.dtype == torch.int64
    assert not rows(drawn.train) & rows(drawn.calibration) and not rows(drawn.train) & rows(drawn.held_out)


def test_all_of_the_text_is_there_when_all_is_asked_for(texts):
    drawn = draw(texts, tokens=10**6)
    whole = torch.cat([drawn.held_out, drawn.calibration, drawn.train]).flatten().tolist()
    told = byte_tokenizer().decode(whole)
    assert sum(f"document {n}\n" in told for n in range(40)) >= 38
    assert sum(f"line {n}\n" in told for n in range(500)) >= 490


def test_a_bos_opens_each_block_where_the_tokenizer_adds_one(texts):
    drawn = draw_text(texts, byte_tokenizer(adds_bos=True), tokens=320, seq_len=32, seed=0)
    assert drawn.train.shape[1] == 32 and (drawn.train[:, 0] == BOS).all() and not (drawn.train[:, 1:] == BOS).any()


def test_too_little_text(texts, tmp_path):
    (tmp_path / "tiny.txt").write_text("x" * 80)
    with pytest.raises(ValueError, match="data of 1 sequences of 64 tokens: a run takes 3"):
        draw(["tiny.txt"], seq_len=64)


def test_parquet(tmp_path, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.table({"text": ["one " * 50, "", "two " * 50]}), tmp_path / "t.parquet")
    parquet.write_table(arrow.table({"body": ["one"]}), tmp_path / "bad.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1xx")
    assert len(list(training_texts([str(tmp_path / "t.parquet")], seed=0, piece_characters=10**6))) == 2
    for name, said in (("bad", "no column 'text' among body"), ("torn", "it can't be read"), ("none", "no such file")):
        with pytest.raises(ValueError, match=said):
            list(training_texts([str(tmp_path / f"{name}.parquet")], seed=0, piece_characters=100))


def pieces(sources, **settings):
    return list(training_texts(sources, **({"seed": 0, "piece_characters": 200, "buffer_characters": 2000} | settings)))


def test_text_that_memory_has_no_room_for_is_all_there(texts):
    small, large = pieces(texts), pieces(texts, buffer_characters=10**9)
    assert sorted("\n".join(small).split("\n")) == sorted("\n".join(large).split("\n"))
    assert small != large and small == pieces(texts) != pieces(texts, seed=1)


def test_files_are_mixed_by_their_share_of_the_text_however_they_are_packed(tmp_path):
    """Two files of as much text, one packed to half its size; a small one is among the first."""
    drawn = random.Random(0)
    words = [f"{n} {drawn.randbytes(200).hex()}" for n in range(6000)]
    lines = "".join(json.dumps({"text": f"packed {one}"}) + "\n" for one in words).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "b.txt").write_text("".join(f"plain {one}\n" for one in words))
    (tmp_path / "c.txt").write_text("small\n" * 40)
    names = [str(tmp_path / name) for name in ("a.jsonl.gz", "b.txt", "c.txt")]
    found = pieces(names, piece_characters=500, buffer_characters=300_000)
    tenth = len(found) // 10
    for part in range(10):
        here = found[part * tenth : (part + 1) * tenth]
        assert 0.25 < sum("packed" in one for one in here) / tenth < 0.75
    assert any("small" in one for one in found[: 2 * tenth])
    twice = pieces([str(tmp_path / "c.txt")] * 2, buffer_characters=100)
    assert sum(one.count("small") for one in twice) == 80


def test_no_more_text_is_read_than_is_asked_for(tmp_path):
    """Memory stays small, and an end that is torn is not come to."""
    line = json.dumps({"text": "word " * 200}).encode() + b"\n"
    whole = gzip.compress(line * 20_000, compresslevel=1)
    (tmp_path / "long.jsonl.gz").write_bytes(whole[:-50])
    texts = training_texts([str(tmp_path / "long.jsonl.gz")], seed=0, piece_characters=500, buffer_characters=10_000)
    tracemalloc.start()
    assert sum(len(next(texts)) for _ in range(1000)) > 200_000
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    with pytest.raises(ValueError, match="it can't be read"):
        list(texts)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.jsonl", b'{"text": "one"}\nnone\n', "line 2: not JSON"),
        ("a.jsonl", b'{"body": "one"}\n', "line 1: no text under 'text'"),
        ("a.txt", b"one \xff", "not UTF-8"),
        ("a.jsonl", b'{"text": "\xff"}', "is not UTF-8"),
        ("a.txt", b" \n", "there is no text in it"),
        ("a.txt.gz", gzip.compress(b"one " * 99, mtime=0)[:-9], "can't be read"),
    ],
)
def test_a_file_that_cannot_be_read(name, data, said, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=said):
        pieces([str(tmp_path / name)])


def test_a_missing_file(texts):
    with pytest.raises(ValueError, match=r"nowhere\.txt: there is no such file"):
        pieces([*texts, "nowhere.txt"], buffer_characters=10)
    with pytest.raises(ValueError, match=r"nowhere\.txt: there is no such file"):
        draw([*texts, "nowhere.txt"])


def order(**settings):
    blocks = torch.arange(7 * 5).view(7, 5)
    return TrainingOrder(blocks, **({"steps": 6, "batch": 3, "seed": 0} | settings))


def test_every_pass_sees_every_block_in_another_order():
    samples = order()
    firsts = [int(first) for step in range(5) for first in samples.batch(step, range(3)).ids_BT[:, 0]][:14]
    assert sorted(firsts[:7]) == sorted(firsts[7:]) == [5 * n for n in range(7)] and firsts[:7] != firsts[7:]


def test_a_sample_depends_on_its_number_alone():
    one, other = order(), order(steps=60)
    for step, row in ((5, 2), (1, 0), (0, 0), (3, 2)):
        ours, theirs = one.batch(step, [row]), other.batch(step, range(3))
        assert ours.ids_BT[0].equal(theirs.ids_BT[row]) and ours.noise_key_B[0] == theirs.noise_key_B[row]
    assert len({key for step in range(6) for key in one.batch(step, range(3)).noise_key_B.tolist()}) == 18
    assert not one.batch(1, [1]).noise_key_B.equal(order(seed=1).batch(1, [1]).noise_key_B)


def test_tokens_of_a_step_are_those_that_count():
    """The last position of a block predicts nothing, and ignored tokens are not counted."""
    assert order().batch(0, range(2)).step_positions == 3 * 4
    samples = order(ignored=[0, 7])
    for step in (0, 1):
        batch = samples.batch(step, range(3))
        counted = ~torch.isin(batch.ids_BT[:, :-1], torch.tensor([0, 7]))
        assert batch.step_positions == samples.batch(step, [1]).step_positions == int(counted.sum())
