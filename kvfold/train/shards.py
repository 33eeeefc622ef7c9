"""Weights, gradients and optimizer spread over the processes of torchrun (FSDP2), and gathered again.

Trainer and Accelerate know FSDP2 too, but not on CPUs: `AcceleratorState` (1.15) looks at its plugin for GPUs and their like
alone and silently replicates the model (DDP) on others. So the model is sharded here, the same way everywhere.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from kvfold.errors import UserError
from kvfold.models.decoder import FoldForCausalLM

_OPTIMIZER = "optimizer.pt"


def check_processes() -> None:
    """Raise `UserError` where there is nothing to spread over."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise UserError(
            "shard: there is one process, and nothing to spread over: start it with torchrun, or leave it out"
        )


def shard(model: FoldForCausalLM) -> None:
    """Spread the model's parameters, layer by layer, in place; every process has the same weights when it calls this."""
    mesh = init_device_mesh(model.device.type, (torch.distributed.get_world_size(),))
    for layer in model.model.layers:
        # What is spread together has one dtype, and gates stay in fp32.
        gates = [one for one in (layer.self_attn.fold_norm, layer.self_attn.fold_proj) if one is not None]
        if any(weight.dtype != model.dtype for one in gates for weight in one.parameters()):
            fully_shard(gates, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on it."""
    return isinstance(model, FSDPModule)


def gathered(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same names with whole tensors; all processes call it. What is not sharded comes back as it is."""
    return {
        name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach()
        for name, weight in weights.items()
    }


@torch.no_grad()
def put(weight: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into a weight, sharded or not."""
    if isinstance(weight, DTensor):
        weight.copy_(distribute_tensor(whole.to(weight.device), weight.device_mesh, weight.placements))
    else:
        weight.copy_(whole)


def unsharded(model: FoldForCausalLM) -> FoldForCausalLM:
    """A model of its own with the same weights, whole, on the same device; all processes call it."""
    model.reshard()
    weights = gathered(dict(model.named_parameters()))
    device = next(iter(weights.values())).device
    with torch.random.fork_rng(devices=[]):
        plain = FoldForCausalLM(model.config).to(device=device, dtype=model.dtype)
    for name, weight in plain.named_parameters():
        put(weight, weights[name])
    return plain


def save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, *, leads: bool) -> None:
    """Its whole state, by the names of the weights; all processes call it, the leading one writes."""
    state = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    if leads:
        torch.save(state, folder / _OPTIMIZER)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """What `save_optimizer` wrote, each process its part."""
    state: dict[str, Any] = torch.load(folder / _OPTIMIZER, weights_only=True)
    set_optimizer_state_dict(model, optimizer, state, options=_WHOLE)


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
