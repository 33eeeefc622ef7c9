"""Other models beside the one that is measured: held against it, not against themselves."""

import math

import pytest
import torch

from kvfold.eval.cells import Beside
from kvfold.eval.passkey import measure_passkey
from kvfold.eval.perplexity import measure_quality
from test_perplexity import PROTOCOL, log_probs_by_hand, windows_of
from tiny_model import tiny_model


def moved_model(time: str = "full", **settings):
    """Other weights, the head's too."""
    model = tiny_model(**settings)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    model.config.layout = model.config.layout.with_time(time)
    return model


def measured(model, tokenizer, text, beside, methods=(), **settings):
    result = measure_quality(
        model, tokenizer, [text], methods, name="tiny", beside=beside, protocol=PROTOCOL, **settings
    )
    return {row["method"]: row for row in result["rows"]}


def test_the_same_model_beside_itself_has_the_same_row(model, tokenizer, text):
    rows = measured(model, tokenizer, text, [Beside(label="copy", open=tiny_model)], ["window:6+2"])
    assert list(rows) == ["full", "window:6+2", "full of copy"]
    ours, theirs = rows["full of copy"], rows["full"]
    assert (ours["title"], ours["model"], ours["trained"]) == ("copy", "copy", True)
    assert ours["perplexity"] == theirs["perplexity"] and ours["kl"] == pytest.approx(0, abs=1e-6)
    assert ours["top1_agreement"] == 1


def test_a_row_beside_is_held_against_the_first_model(model, tokenizer, text):
    other = moved_model("window:6+2")
    ids = windows_of(tokenizer, text)
    ours, plain = log_probs_by_hand(other, "window:6+2", ids), log_probs_by_hand(model, "full", ids)
    rows = measured(model, tokenizer, text, [Beside(label="moved", open=lambda: other)])
    row = rows["window:6+2 of moved"]
    loss = -ours.gather(2, ids[:, 1:, None]).mean().item()
    assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    kl = torch.nn.functional.kl_div(ours, plain, log_target=True, reduction="none").sum(-1).mean().item()
    assert row["kl"] == pytest.approx(kl, rel=1e-4) and kl > 1e-3
    assert row["kept_tokens"] == 8 and row["title"] == "window + sinks"


def test_a_full_cache_is_that_of_the_first_model(model, tokenizer, text):
    row = measured(model, tokenizer, text, [Beside(label="mqa", open=lambda: moved_model(num_key_value_heads=1))])[
        "full of mqa"
    ]
    assert row["compression"] == 1
    assert row["full_bytes"] == measured(model, tokenizer, text, [])["full"]["full_bytes"]
    assert row["allocated_bytes"] < 0.6 * row["full_bytes"]


def test_what_was_measured_beside_is_not_measured_again(model, tokenizer, text, tmp_path):
    reports = []

    def report(what, done, total):
        reports.append(what)

    def again(beside):
        reports.clear()
        return measured(model, tokenizer, text, beside, cells=tmp_path / "cells", report=report)

    moved = Beside(label="moved", open=moved_model)
    first = again([moved])
    assert {"full", "moved full"} == {what.split(", ")[1].strip() for what in reports}
    assert again([moved]) == first and reports == []
    again([moved, Beside(label="window", open=lambda: moved_model("window:6+2"))])
    assert {"full", "window window:6+2"} == {what.split(", ")[1].strip() for what in reports}


def test_passkeys_of_other_models(model, tokenizer):
    other = moved_model("window:6+2", max_position_embeddings=512)
    first = tiny_model(max_position_embeddings=512)
    asked = {"lengths": (420,), "tries": 2, "depths": (0.5,)}
    beside = [Beside(label="moved", open=lambda: other)]
    *_, row = measure_passkey(first, tokenizer, [], name="first", beside=beside, **asked)
    _, theirs = measure_passkey(other, tokenizer, ["window:6+2"], name="moved", **asked)
    own = {name: row[name] for name in ("made", "seconds")}
    assert row == theirs | {"method": "window:6+2 of moved", "model": "moved"} | own


def test_models_that_can_not_stand_beside(model, tokenizer, text):
    same = [Beside(label="a", open=tiny_model)] * 2
    with pytest.raises(ValueError, match="two models beside are called 'a'"):
        measured(model, tokenizer, text, same)
    foreign = Beside(label="b", open=lambda: tiny_model(vocab_size=300))
    with pytest.raises(ValueError, match="b: its vocabulary has 300 tokens"):
        measured(model, tokenizer, text, [foreign])
