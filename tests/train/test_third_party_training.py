"""A learned method of a third party trains, is saved, loaded and evaluated through the same doors as kvfold's own."""

import sys
from pathlib import Path

import pytest
import torch

from byte_tokenizer import byte_tokenizer
from kvfold.eval.perplexity import measure_quality
from kvfold.eval.reading import Protocol
from kvfold.methods import registry
from kvfold.models.adapters import apply_adapter, load_gates
from kvfold.models.load import load
from tiny_model import tiny_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party"
IDS = torch.randint(0, 200, (2, 40), generator=torch.Generator().manual_seed(3))
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def sheltered(monkeypatch):
    """The example, found as an installed package would be."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from kvfold_keepeven.sheltered import Sheltered

    monkeypatch.setitem(registry.METHODS, "sheltered", Sheltered)
    yield Sheltered
    for name in [name for name in sys.modules if name.startswith("kvfold_keepeven")]:
        del sys.modules[name]


def through(model, cuts, **options):
    """Logits through a cache, cut into calls, and what is kept."""
    cache, parts = model.new_cache(rows=2, page_slots=4, **options), []
    with torch.no_grad():
        for piece in IDS.split(cuts, dim=1):
            parts.append(model(piece, past_key_values=cache).logits)
    return torch.cat(parts, dim=1), cache.kept_positions


def test_it_trains_is_saved_loaded_and_evaluated(retrofit, sheltered, tmp_path, text):
    run = retrofit("out", time="sheltered:4+2", compression=2.0, learning_rate=3e-2)
    run.run()
    adapted = tiny_model()
    apply_adapter(adapted, run.folder.out)
    assert adapted.config.gates["method"] == "sheltered" and adapted.config.layout.time_text() == "sheltered:4+2"
    assert adapted.model.layers[0].self_attn.fold_proj.weight.abs().max() > 0, "the gates have learned"
    adapted.eval().save_pretrained(tmp_path / "saved")
    saved = load(tmp_path / "saved")
    torch.testing.assert_close(through(saved, [40])[0], through(adapted, [40])[0])
    quality = measure_quality(
        saved, byte_tokenizer(), [Path(text)], ["sheltered:4+2", "full"], name="tiny",
        protocol=Protocol(windows=2, context_tokens=48, batch=2),
    )  # fmt: skip
    assert {row["method"] for row in quality["rows"]} == {"full", "sheltered:4+2"}


def test_its_three_forms_agree_and_its_first_tokens_stay(retrofit):
    run = retrofit("out", time="sheltered:4+2", compression=2.0)
    run.run()
    model = tiny_model()
    apply_adapter(model, run.folder.out)
    with torch.no_grad():
        for layer in model.model.layers:  # gates that mark about half of all tokens
            layer.self_attn.fold_proj.weight.normal_(generator=torch.Generator().manual_seed(layer.self_attn.layer))
            layer.self_attn.fold_proj.bias.fill_(model.config.gates["offset"] / model.config.gates["scale"])
    model.eval()
    trained = model(IDS, use_cache=False).logits.detach()
    whole, kept = through(model, [40])
    for cuts in ([1] * 40, [7, 1, 1, 20, 11]):
        logits, again = through(model, cuts)
        torch.testing.assert_close(logits, whole, **CLOSE)
        assert again == kept
    torch.testing.assert_close(trained, whole, **CLOSE)
    heads = [positions for owner in kept for row in owner for positions in row]
    assert all({0, 1} <= set(positions) for positions in heads)
    assert min(map(len, heads)) < 36, "something was evicted"


def test_its_gates_may_come_with_a_cache(retrofit):
    run = retrofit("out", time="sheltered:4+2", compression=2.0)
    run.run()
    model, adapted = tiny_model().eval(), tiny_model()
    apply_adapter(adapted, run.folder.out)
    gates = load_gates(model, run.folder.out)
    ours, theirs = through(model, [9, 1, 30], time="sheltered:4+2", gates=gates), through(adapted.eval(), [9, 1, 30])
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[1] == theirs[1] and model.config.gates is None
