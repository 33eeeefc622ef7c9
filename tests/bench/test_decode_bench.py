from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from byte_tokenizer import byte_tokenizer
from kvfold.bench import decode
from kvfold.bench.decode import POINTS, Point, bench_decode, text_prompts
from kvfold.data import TextFile
from kvfold.eval.cells import load_theirs
from kvfold.models.load import load

POINT = Point(name="3 x (12 + 6)", batch=3, prompt_tokens=12, new_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return load(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return load_theirs(folder, dtype=torch.float32, device="cpu")


def test_their_side_is_transformers_own_class(theirs):
    assert type(theirs) is LlamaForCausalLM
    assert theirs.config._attn_implementation == "sdpa"
    assert not theirs.training


def test_both_sides_generate_the_same_at_every_point_with_and_without_padding(ours, theirs):
    told = []
    result = bench_decode(
        ours, theirs, name="tiny", methods=["full", "h2o:2+2"], points=[POINT], repeats=2,
        report=lambda *done: told.append(done),
    )  # fmt: skip
    assert [(row["padded"], row["method"]) for row in result["rows"]] == [
        (False, "full"), (False, "h2o:2+2"), (True, "full"), (True, "h2o:2+2"),
    ]  # fmt: skip
    for row in result["rows"]:
        assert (row["point"], row["batch"], row["context_tokens"], row["new_tokens"]) == (POINT.name, 3, 18, 6)
        for side in ("ours", "theirs"):
            for spread in (row[side]["tokens_per_second"], row[side]["step_ms"]):
                assert 0 < spread["min"] <= spread["median"] <= spread["max"]
        assert 0 < row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
        # Keys and values of 2 layers, 3 rows, 17 columns (the last token is never fed), 2 heads of 8 in fp32.
        assert row["theirs"]["allocated_bytes"] == 2 * 2 * 3 * 17 * 2 * 8 * 4
    full = [row for row in result["rows"] if row["method"] == "full"]
    assert [row["equal_tokens"] for row in full] == [1, 1]
    assert result["environment"]["threads"] == torch.get_num_threads()
    assert told[-1] == (f"{POINT.name}, padded", 9, 9)


def test_sides_take_turns_and_the_warm_up_does_not_count(ours, theirs, monkeypatch):
    turns, original = [], decode._run

    def noted(model, cache, held, prompt, new_tokens):
        turns.append(("ours" if model is ours else "theirs", new_tokens))
        return original(model, cache, held, prompt, new_tokens)

    monkeypatch.setattr(decode, "_run", noted)
    bench_decode(ours, theirs, name="tiny", points=[POINT], padded=[False], repeats=2)
    assert turns == [("theirs", 4), ("ours", 4)] + [("theirs", 6), ("ours", 6)] * 2


def test_ratios_are_taken_round_by_round():
    def run(seconds: float) -> decode._Run:
        steps = (seconds / 2, seconds / 2)
        return decode._Run(step_seconds=steps, allocated_bytes=1, peak_bytes=None, new_ids=torch.zeros(4, 3))

    row = decode._row(POINT, False, _plain(), [run(1.0), run(2.0), run(8.0)], [run(2.0), run(1.0), run(8.0)])
    assert row["ratio"] == {"median": 1, "min": 0.5, "max": 2}
    assert row["ours"]["tokens_per_second"] == {"median": 4, "min": 1, "max": 8}
    assert row["ours"]["step_ms"]["median"] == 1000
    assert row["ours"]["peak_bytes"] is None


def _plain():
    from kvfold.layout.kvlayout import KVLayout

    return KVLayout.plain(1, 1, 8)


def test_without_a_peer_ours_stands_alone(ours):
    rows = bench_decode(ours, None, name="tiny", points=[POINT], padded=[False], repeats=1)["rows"]
    assert len(rows) == 1
    assert "theirs" not in rows[0]
    assert "ratio" not in rows[0]


def test_methods_beside_each_other_at_text(ours):
    text = TextFile(name="text", documents=("what is it worth? " * 12,), digest="")
    prompts = text_prompts(text, byte_tokenizer())
    assert prompts(POINT).shape == (3, 12)
    rows = bench_decode(
        ours,
        None,
        name="tiny",
        methods=["full", "window:3+1"],
        points=[POINT],
        padded=[False],
        prompts=prompts,
        repeats=3,
    )["rows"]
    assert rows[0]["over_first"] == {"median": 1, "min": 1, "max": 1}
    assert 0 < rows[1]["over_first"]["min"] <= rows[1]["over_first"]["max"]
    assert [row["compression"] for row in rows] == pytest.approx([1, 17 / 4])
    with pytest.raises(ValueError, match="text: the text has 18 prompts of 12 tokens, not 19"):
        prompts(replace(POINT, batch=19))


def test_padding_is_on_the_left_and_ragged():
    ids, mask = decode._prompt(POINT, decode.random_ids(POINT, 97), pads=True)
    assert ids.shape == mask.shape == (3, 12)
    pads = (mask == 0).sum(dim=1)
    assert bool((pads >= 1).all())
    assert len(set(pads.tolist())) > 1
    assert all(row.tolist() == sorted(row.tolist()) for row in mask)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"repeats": 0}, "0 repeats"),
        ({"points": POINTS}, "the model reads 64 at most"),
        ({"methods": ["tova:0"]}, "budget 0"),
        ({"methods": ["dms:0"]}, "dms delay 0"),
    ],
)
def test_what_can_not_be_measured_is_one_line(ours, settings, says):
    with pytest.raises(ValueError, match=says) as error:
        bench_decode(ours, None, name="tiny", **({"points": [POINT]} | settings))
    assert "\n" not in str(error.value)


def test_a_point_of_nothing_is_refused():
    with pytest.raises(ValueError, match="batch 0"):
        Point(name="none", batch=0, prompt_tokens=4, new_tokens=4)


def test_a_kvfold_checkpoint_has_no_peer(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="transformers has no class for"):
        load_theirs(tmp_path, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="no such file or folder"):
        load_theirs(tmp_path / "none", dtype=torch.float32, device="cpu")
