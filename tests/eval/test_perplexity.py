import math
from pathlib import Path

import pytest
import torch

from kvfold.data import read_text_file, text_windows
from kvfold.eval.perplexity import measure_quality
from kvfold.eval.reading import Protocol
from tiny_model import tiny_model

PROTOCOL = Protocol(windows=4, context_tokens=40, batch=4)


def rows_of(model, tokenizer, text: Path, methods, protocol=PROTOCOL, **settings) -> dict[str, dict]:
    result = measure_quality(model, tokenizer, [text], methods, name="tiny", protocol=protocol, **settings)
    return {row["method"]: row for row in result["rows"]}


def windows_of(tokenizer, text: Path) -> torch.Tensor:
    return text_windows(read_text_file(text), tokenizer, windows=4, context_tokens=40).ids_WT


def log_probs_by_hand(model, method: str, ids: torch.Tensor) -> torch.Tensor:
    """Log probabilities [W, T-1, V], one window after the other, one token a call."""
    layout, found = model.config.layout.with_time(method), []
    with torch.no_grad():
        for row in ids:
            cache = model.new_cache(rows=1, time=layout.time_text())
            logits = [model(token.view(1, 1), past_key_values=cache).logits[0, 0] for token in row[:-1]]
            found.append(torch.stack(logits).log_softmax(-1))
    return torch.stack(found)


def test_the_unfolded_row_is_the_loss_of_a_plain_forward(model, tokenizer, text):
    ids = windows_of(tokenizer, text)
    with torch.no_grad():
        loss = model(ids, labels=ids, use_cache=False).loss.item()
    row = rows_of(model, tokenizer, text, [])["full"]
    assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    # One byte a token: the first of each window is read, not scored.
    assert row["bits_per_byte"] == pytest.approx(loss / math.log(2), rel=1e-5)
    assert row["tokens"] == 4 * 39
    assert (row["kl"], row["top1_agreement"], row["compression"], row["kept_tokens"]) == (0, 1, 1, 40)
    assert row["loss_difference"] == {"mean": 0, "standard_error": 0}
    assert row["allocated_bytes"] == row["full_bytes"]


@pytest.mark.parametrize("method", ["window:6+2", "h2o:4+4", "tova:8", "h2o:25%+25%", "tova:25%", "full; 1=h2o:4+4"])
def test_a_row_is_what_a_loop_by_hand_gives(model, tokenizer, text, method):
    ids = windows_of(tokenizer, text)
    ours = log_probs_by_hand(model, method, ids)
    with torch.no_grad():
        plain = model(ids[:, :-1], use_cache=False).logits.log_softmax(-1)
    targets = ids[:, 1:, None]
    loss, base = (-x.gather(2, targets)[..., 0].mean(dim=1).double() for x in (ours, plain))
    row = rows_of(model, tokenizer, text, [method])[method]
    assert row["perplexity"] == pytest.approx(loss.mean().exp().item(), rel=1e-5)
    difference = loss - base
    mean, error = difference.mean().item(), (difference.std() / 2).item()
    assert row["loss_difference"]["mean"] == pytest.approx(mean, abs=1e-6)
    assert row["loss_difference"]["standard_error"] == pytest.approx(error, abs=1e-6)
    percent = row["perplexity_change_percent"]
    assert percent["mean"] == pytest.approx(100 * math.expm1(mean), abs=1e-4)
    assert percent["standard_error"] == pytest.approx(100 * math.exp(mean) * error, abs=1e-4)
    kl = torch.nn.functional.kl_div(ours, plain, log_target=True, reduction="none").sum(-1).mean().item()
    assert row["kl"] == pytest.approx(kl, rel=1e-4)
    assert kl > 1e-4
    assert row["top1_agreement"] == pytest.approx((ours.argmax(-1) == plain.argmax(-1)).float().mean().item())


@pytest.mark.parametrize("method", ["full", "window:6+2", "window:25%+2"])
def test_how_prefix_methods_are_cut_into_calls_and_batches_changes_nothing(model, tokenizer, text, method):
    whole = rows_of(model, tokenizer, text, [method])[method]
    for protocol in (
        Protocol(windows=4, context_tokens=40, batch=3, call_tokens=7),
        Protocol(windows=4, context_tokens=40, batch=1, call_tokens=1),
    ):
        cut = rows_of(model, tokenizer, text, [method], protocol)[method]
        for name in ("perplexity", "bits_per_byte", "kl", "top1_agreement", "compression", "kept_tokens"):
            assert cut[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("method", ["h2o:4+4", "tova:8"])
def test_steps_methods_take_no_notice_of_the_size_of_calls(model, tokenizer, text, method):
    a = rows_of(model, tokenizer, text, [method])[method]
    sized = Protocol(windows=4, context_tokens=40, batch=4, call_tokens=7)
    b = rows_of(model, tokenizer, text, [method], sized)[method]
    assert a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-5)
    assert a["compression_mean_over_time"] == pytest.approx(b["compression_mean_over_time"], rel=0.02)


def test_compression_at_the_end_and_over_time(model, tokenizer, text):
    exact = Protocol(windows=4, context_tokens=40, batch=4, call_tokens=1)
    row = rows_of(model, tokenizer, text, ["window:6+2"], exact)["window:6+2"]
    assert row["compression"] == pytest.approx(5)
    assert row["kept_tokens"] == pytest.approx(8)
    assert row["compression_mean_over_time"] == pytest.approx(sum(t / min(t, 8) for t in range(1, 41)) / 40)
    assert row["allocated_bytes"] < row["full_bytes"]
    assert sum(row["bytes_by_use"].values()) == row["allocated_bytes"] and row["bytes_by_use"]["rings"] == 0


def test_compression_is_weighted_by_bytes_where_owners_differ(model, tokenizer, text):
    method = "full; 1=window:6+2"
    row = rows_of(model, tokenizer, text, [method])[method]
    assert row["compression"] == pytest.approx(2 * 40 / (40 + 8))
    assert (row["title"], row["trained"]) == ("mixed", False)


def test_logit_scale_and_softcap_are_in_the_score(tokenizer, text):
    model = tiny_model(logit_scale=0.5, final_logit_softcap=2.0)
    ids = windows_of(tokenizer, text)
    with torch.no_grad():
        loss = model(ids, labels=ids, use_cache=False).loss.item()
    assert rows_of(model, tokenizer, text, [])["full"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_the_model_comes_back_as_it_was(model, tokenizer, text):
    before = model.config.layout
    rows_of(model, tokenizer, text, ["h2o:4+4"])
    assert model.config.layout is before


def test_one_window_has_no_standard_error(model, tokenizer, text):
    row = rows_of(model, tokenizer, text, ["tova:8"], Protocol(windows=1, context_tokens=40))["tova:8"]
    assert row["loss_difference"]["standard_error"] is None
    assert row["perplexity_change_percent"]["standard_error"] is None


def test_a_method_is_a_row_once_and_the_unfolded_model_the_first(model, tokenizer, text):
    result = measure_quality(
        model, tokenizer, [text, text], ["tova:8", "full", "tova:8"], name="tiny", protocol=PROTOCOL
    )
    assert [row["method"] for row in result["rows"]] == ["full", "tova:8"] * 2
    assert result["protocol"] == {"windows": 4, "context_tokens": 40, "batch": 4}
    assert result["model"]["name"] == "tiny"
    assert result["environment"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("methods", "protocol", "says"),
    [
        (["h2o:0+4"], PROTOCOL, "budget 0"),
        (["sieve:4"], PROTOCOL, "sieve"),
        (["dmc:0"], PROTOCOL, "dmc window 0"),
        ([], Protocol(windows=1, context_tokens=65), "the model reads 64 at most"),
    ],
)
def test_what_can_not_be_measured_is_said_before_anything_is(model, tokenizer, text, tmp_path, methods, protocol, says):
    cells, started = tmp_path / "cells", []
    with pytest.raises(ValueError, match=says) as error:
        rows_of(model, tokenizer, text, methods, protocol, cells=cells, report=lambda *done: started.append(done))
    assert "\n" not in str(error.value)
    assert not started
    assert not cells.exists()


@pytest.mark.parametrize("field", ["windows", "batch", "call_tokens", "context_tokens"])
def test_a_protocol_of_nothing_is_refused(field):
    with pytest.raises(ValueError, match=f"{field} 0"):
        Protocol(**{field: 0})
