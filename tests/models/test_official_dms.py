"""A checkpoint in the published DMS format: a tiny random one is written, loaded, and decides as the formulas say."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvfold
from kvfold.models.gates import CallOptions

KEYS = {"dms_separate_alpha": True, "dms_window_size": 4, "dms_initial_alpha_offset": 1.0}
IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def checkpoint(tmp_path, pair):
    """`checkpoint(**keys)` writes a folder: a Qwen3 with adapters where the keys ask for them."""

    def write(**keys):
        _, theirs = pair("qwen3", head_dim=16)
        theirs.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3ForCausalLMDMS"]} | keys))
        if keys.get("dms_separate_alpha"):
            weights = load_file(tmp_path / "model.safetensors")
            for layer in range(4):
                stem = f"model.layers.{layer}.self_attn.dms_proj_alpha"
                weights[f"{stem}.weight"] = torch.randn(2, 64) * 0.05
                weights[f"{stem}_norm.weight"] = torch.rand(64) + 0.5
            save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        return kvfold.load(str(tmp_path)), theirs, load_file(tmp_path / "model.safetensors")

    return write


@pytest.mark.parametrize("per", ["head", "layer"])
def test_an_adapter_decides_as_the_formula_says(checkpoint, per):
    model, _, weights = checkpoint(**KEYS, dms_alpha_per=per)
    assert model.config.layout.time_text() == "dms:4"
    with torch.no_grad():
        out = model(IDS, output_hidden_states=True, output_decisions=True)
    fired = 0
    for layer in range(4):
        h, stem = out.hidden_states[layer], f"model.layers.{layer}.self_attn.dms_proj_alpha"
        normed = h / torch.sqrt((h * h).mean(dim=-1, keepdim=True) + 1e-6) * weights[f"{stem}_norm.weight"]
        logit = 100 * (normed @ weights[f"{stem}.weight"].T) - 1
        if per == "layer":
            logit = logit[..., :1].expand_as(logit)
        assert logit.abs().min() > 1e-3
        assert torch.equal(out.decisions[layer].transpose(1, 2) > 0.5, logit > 0)
        fired += int((logit > 0).sum())
    assert 0 < fired < 4 * 2 * 2 * 11


def test_keys_that_are_not_written_are_the_published_defaults(checkpoint):
    model, theirs, _ = checkpoint()
    gates = model.config.gates
    assert (gates["source"], gates["reads"], gates["scale"], gates["offset"]) == ("channel", "next", 100.0, 5.0)
    assert model.config.layout.time_text() == "dms:512"
    assert not any("fold_" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(
            model(IDS, options=CallOptions(gates="off")).logits, theirs(IDS).logits, atol=1e-4, rtol=1e-4
        )


def test_eviction_may_be_switched_off_in_the_config(checkpoint):
    model, theirs, _ = checkpoint(**KEYS, dms_disable_eviction=True)
    assert model.config.layout.time_text() == "full"
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_without_its_adapters_is_refused(checkpoint, tmp_path):
    checkpoint(**KEYS)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "alpha" not in k}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 8 weights, the first is model.layers.0.self_attn.fold_norm.weight"):
        kvfold.load(str(tmp_path))
