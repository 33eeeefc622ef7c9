"""Checkpoints that others have quantised load as plain weights: exactly the values that they store."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

from kvfold.models.load import load

BLOCK, GROUP = 32, 32


@pytest.fixture
def theirs(pair):
    return copy.deepcopy(pair("llama")[1])


def save(folder, theirs, weights, about):
    folder.mkdir()
    theirs.config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": about}))
    save_file({name: one.contiguous() for name, one in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def projections(theirs):
    """Name and layer of what gets quantised; the layer's weight is set to what is stored, so that theirs stays the judge."""
    return [(name, layer) for name, layer in theirs.named_modules() if name.endswith("_proj")]


def assert_equal_logits(ours, theirs, ids):
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert {type(one.data) for one in ours.parameters()} == {torch.Tensor}
    assert {one.dtype for one in ours.parameters()} == {torch.float32}


@torch.no_grad()
def test_fp8_in_blocks(theirs, tmp_path, ids):
    weights = theirs.state_dict()
    for name, layer in projections(theirs):
        blocks = layer.weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        weights |= {f"{name}.weight": codes.flatten(2).flatten(0, 1), f"{name}.weight_scale_inv": scales}
        layer.weight.copy_((codes.float() * scales[:, None, :, None]).flatten(2).flatten(0, 1))
    about = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    ours = load(save(tmp_path / "fp8", theirs, weights, about))
    assert_equal_logits(ours, theirs, ids)
    ours.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()
    assert_equal_logits(load(tmp_path / "saved"), theirs, ids)


@pytest.mark.parametrize(
    ("form", "bits", "kind", "strategy"),
    [
        ("float-quantized", 8, "float", "channel"),
        ("int-quantized", 8, "int", "channel"),
        ("pack-quantized", 4, "int", "group"),
    ],
)
@torch.no_grad()
def test_compressed_tensors(theirs, tmp_path, ids, form, bits, kind, strategy):
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    args = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True}
    args |= {"group_size": GROUP} if strategy == "group" else {}
    about = {
        "config_groups": {"all": {"targets": ["Linear"], "weights": args, "format": form}},
        "ignore": ["lm_head"],
        "format": form,
    }
    stored = copy.deepcopy(theirs)
    frozen = QuantizationConfig(**about, quantization_status="frozen")
    apply_quantization_config(stored, frozen)
    most = 448 if kind == "float" else 2 ** (bits - 1) - 1
    for (_, layer), (_, reference) in zip(projections(stored), projections(theirs), strict=True):
        width = GROUP if strategy == "group" else layer.in_features
        groups = layer.weight.unflatten(1, (-1, width))
        scales = groups.abs().amax(-1, keepdim=True) / most
        codes = groups / scales
        codes = codes.to(torch.float8_e4m3fn).float() if kind == "float" else codes.round()
        layer.weight_scale.copy_(scales[..., 0])
        reference.weight.copy_((codes * scales).flatten(1))
    ModelCompressor(quantization_config=frozen).compress_model(stored)
    about |= {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
    assert_equal_logits(load(save(tmp_path / "model", theirs, stored.state_dict(), about)), theirs, ids)


@torch.no_grad()
def test_torchao(theirs, tmp_path, ids):
    quantization = pytest.importorskip("torchao.quantization", reason="the package torchao is not installed")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    theirs.save_pretrained(tmp_path / "plain")
    stored = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()), dtype=torch.float32
    )
    stored.save_pretrained(tmp_path / "int8")
    for (_, layer), (_, reference) in zip(projections(stored), projections(theirs), strict=True):
        assert not torch.equal(layer.weight.dequantize(), reference.weight)
        reference.weight.copy_(layer.weight.dequantize())
    assert_equal_logits(load(tmp_path / "int8"), theirs, ids)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_what_cannot_be_read_is_refused(theirs, tmp_path, method):
    folder = save(tmp_path / method, theirs, theirs.state_dict(), {"quant_method": method})
    with pytest.raises(ValueError, match=f"quantised by {method}, which transformers reads with kernels of other"):
        load(folder)


def test_a_missing_package_is_named(theirs, tmp_path, monkeypatch):
    monkeypatch.setattr("kvfold.models.source.find_spec", lambda name: None)
    folder = save(tmp_path / "model", theirs, theirs.state_dict(), {"quant_method": "compressed-tensors"})
    with pytest.raises(ValueError, match="run 'pip install compressed-tensors'"):
        load(folder)
