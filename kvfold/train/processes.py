"""One process, or several that torchrun started: what they sum, wait for and agree on, and a model's weights, which every
process has whole (replicas) or in part (FSDP2).

Every function here is called by all processes, in the same order.
"""

import atexit
import os
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from kvfold.errors import UserError
from kvfold.models.decoder import FoldForCausalLM

_PATIENCE = timedelta(hours=12)
"""The leading process may pack text for hours. One that dies is noticed at once, by its closed connections."""


def check_processes() -> None:
    """Raise `UserError` where there is nothing to spread over."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise UserError(
            "fsdp: there is one process, and nothing to spread over: start it with torchrun, or leave it out"
        )


def join(device: torch.device) -> torch.device:
    """Meet the other processes, if there are any. Gives the device of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return device
    on_cuda = device.type == "cuda"
    if on_cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=_PATIENCE)
        atexit.register(dist.destroy_process_group)
    return device


def place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """In place."""
    if dist.is_initialized():
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()


def wait_for_all() -> None:
    """Until every process is here."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


def leaders(make: Callable[[], str]) -> str:
    """What the leading process makes, in all of them."""
    made = [make() if place()[0] == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(made, src=0, device=torch.device("cpu"))
    return made[0]


def shard(model: FoldForCausalLM) -> None:
    """Spread the model's parameters, layer by layer, in place; every process has the same weights when it calls this."""
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
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


def decoder_of(model: FoldForCausalLM) -> Callable[..., Any]:
    """What takes token ids [B, T] to states before the head: the decoder, or a way through the whole model where weights are
    spread, since that is what gathers them; it then makes one row of logits that nothing needs.
    """
    if not is_sharded(model):
        return model.model

    def through(ids_BT: Tensor, **options: Any) -> SimpleNamespace:
        outputs = model(ids_BT, **options | {"logits_to_keep": 1, "output_hidden_states": True})
        return SimpleNamespace(last_hidden_state=outputs.hidden_states[-1], **outputs)

    return through


def whole(weight: Tensor) -> Tensor:
    """A weight in one piece, without its gradient."""
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach()


@torch.no_grad()
def unsharded(model: FoldForCausalLM) -> FoldForCausalLM:
    """A model of its own with the same weights, whole, on the same device; the same model where its weights are."""
    if not is_sharded(model):
        return model
    model.reshard()
    weights: Mapping[str, Tensor] = {name: whole(weight) for name, weight in model.named_parameters()}
    device = next(iter(weights.values())).device
    with torch.random.fork_rng(devices=[]):
        plain = FoldForCausalLM(model.config).to(device=device, dtype=model.dtype)
    for name, weight in plain.named_parameters():
        weight.copy_(weights[name])
    return plain
