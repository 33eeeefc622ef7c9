import pytest
import torch

from kvfold.bench.reading import measure_held
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return FoldForCausalLM(
        FoldConfig(vocab_size=97, num_key_value_heads=2, max_position_embeddings=128, **shape)
    ).eval()


def test_memory_grows_with_the_text_under_full_and_stops_under_a_budget(model):
    ids = torch.arange(2 * 60).view(2, 60) % 97
    memory, _ = measure_held(model, ids, ["full", "window:14+2", "tova:16"], name="tiny")
    full, window, tova = memory["rows"]
    assert memory["batch"] == 2
    for row in memory["rows"]:
        assert row["tokens"][0] == 0
        assert row["tokens"][-1] == 60
        assert row["tokens"] == sorted(set(row["tokens"]))
        assert {16, 32, 48} <= set(row["tokens"])
        assert len(row["allocated_bytes"]) == len(row["tokens"])
    assert full["allocated_bytes"] == sorted(set(full["allocated_bytes"]))
    for row in (window, tova):
        after = [held for seen, held in zip(row["tokens"], row["allocated_bytes"], strict=True) if seen >= 16]
        assert len(set(after)) == 1
        assert after[0] < full["allocated_bytes"][-1]


def test_kept_says_how_many_and_how_old(model):
    ids = torch.arange(40).view(1, 40)
    _, kept = measure_held(model, ids, ["full", "window:6+2", "full; 1=h2o:4+4"], name="tiny")
    full, window, mixed = kept["rows"]
    assert (full["kept"], full["owners"], full["seen_tokens"]) == ([[40, 40]] * 2, [0, 1], 40)
    assert "score" not in full
    assert window["kept"] == [[8, 8]] * 2
    # Tokens 0 and 1 and the six newest: ages 39, 38, 5 ... 0.
    assert window["score"] == [[pytest.approx((39 + 38 + 15) / 8)] * 2] * 2
    assert window["value_name"] == "mean age of the kept tokens"
    assert mixed["kept"] == [[40, 40], [8, 8]]
    assert mixed["score"][0] == [pytest.approx(19.5)] * 2
    assert all(1.5 < age < 36 for age in mixed["score"][1])
