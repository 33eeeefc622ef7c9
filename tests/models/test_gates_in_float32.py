"""Gates stay in fp32 whatever becomes of the model around them: a decision is a threshold, and rounding would move it."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import kvfold
from gated_models import gated_model
from kvfold.models.decoder import FoldForCausalLM
from kvfold.train.loop import shard, unsharded

IDS = torch.randint(3, 61, (2, 24), generator=torch.Generator().manual_seed(1))
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def model() -> FoldForCausalLM:
    """In fp32, under its own DMS gates."""
    model = copy.deepcopy(gated_model())
    model.config.layout = model.config.layout.with_time("dms:5")
    return model


def is_gate(name: str) -> bool:
    return ".fold_" in name


def expected(model: FoldForCausalLM, dtype: torch.dtype) -> list[Tensor]:
    """The gates' probabilities where all other weights are rounded, one by one."""
    rounded = copy.deepcopy(model)
    for name, weight in rounded.named_parameters():
        if not is_gate(name):
            weight.data = weight.data.to(dtype)
    return probabilities(rounded)


@torch.no_grad()
def probabilities(model: FoldForCausalLM) -> list[Tensor]:
    found = [one.clone() for one in model(IDS, output_decisions=True).gate_probs]
    assert any((one > 0.5).any() for one in found) and any((one < 0.5).any() for one in found)
    return found


def check(found: FoldForCausalLM, model: FoldForCausalLM, dtype: torch.dtype) -> None:
    """`found` is `model` rounded to `dtype`, all but its gates, and decides alike."""
    for name, weight in found.named_parameters():
        assert weight.dtype == (torch.float32 if is_gate(name) else dtype), name
        if is_gate(name):
            assert torch.equal(weight, model.get_parameter(name)), name
    for ours, theirs in zip(probabilities(found.eval()), expected(model, dtype), strict=True):
        assert torch.equal(ours, theirs)


WAYS = {
    "to": lambda model, dtype: model.to(dtype),
    "to a device too": lambda model, dtype: model.to("cpu", dtype),
    "type": lambda model, dtype: model.type(dtype),
    "half() and bfloat16()": lambda model, dtype: model.half() if dtype is torch.float16 else model.bfloat16(),
    "a copy": lambda model, dtype: copy.deepcopy(model.to(dtype)),
    "there and back": lambda model, dtype: model.to(dtype).double().to(dtype),
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_moving_a_model_to_another_dtype_leaves_its_gates(model, way, dtype):
    check(WAYS[way](copy.deepcopy(model), dtype), model, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_loading_in_another_dtype_leaves_gates(model, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    check(kvfold.load(tmp_path, dtype=dtype), model, dtype)
    check(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), model, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_saved_in_another_dtype_gates_come_back_as_they_were(model, tmp_path, dtype):
    copy.deepcopy(model).to(dtype).save_pretrained(tmp_path)
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        assert weight.dtype == (torch.float32 if is_gate(name) else dtype)
    check(kvfold.load(tmp_path, dtype=dtype), model, dtype)
    check(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"), model, dtype)


def test_a_model_built_without_memory_has_them_too(model):
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    with torch.device("meta"):
        assigned, filled = FoldForCausalLM(model.config), FoldForCausalLM(model.config)
    assigned.load_state_dict(rounded.state_dict(), assign=True)
    check(assigned, model, torch.bfloat16)
    filled = filled.to(torch.bfloat16).to_empty(device="cpu")
    filled.load_state_dict(model.state_dict())
    check(filled, model, torch.bfloat16)


def test_a_checkpoint_of_rounded_gates_does_not_round_what_they_compute(model):
    """Published checkpoints hold theirs in bf16, and are taken over as they lie."""
    weights = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    with torch.device("meta"):
        found = FoldForCausalLM(model.config)
    found.load_state_dict(weights, assign=True)
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    check(found, model, torch.bfloat16)


def test_gates_given_to_a_rounded_model_are_not_rounded(model):
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    rounded.set_gates(model.config.gate_config, "dms:5")
    with torch.no_grad():
        for name, weight in rounded.named_parameters():
            if is_gate(name):
                weight.copy_(model.get_parameter(name))
    check(rounded, model, torch.bfloat16)


@pytest.fixture
def one_process():
    """A group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_spread_over_processes_gates_stay_and_learn(model, one_process):
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    shard(rounded)
    for name, weight in rounded.named_parameters():
        assert weight.dtype == (torch.float32 if is_gate(name) else torch.bfloat16)
    for ours, theirs in zip(probabilities(rounded), expected(model, torch.bfloat16), strict=True):
        assert torch.equal(ours, theirs)
    check(unsharded(rounded), model, torch.bfloat16)
    rounded.train()
    outputs = rounded(IDS, output_decisions=True, use_cache=False)
    sum(one.mean() for one in outputs.decisions).backward()
    for layer in rounded.model.layers:
        assert layer.self_attn.fold_proj.weight.grad.full_tensor().abs().sum() > 0
