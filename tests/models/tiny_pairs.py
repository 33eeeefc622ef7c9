"""Tiny random models: `theirs` of transformers, and `ours` with the same weights."""

import os
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.families import fold_config, fold_weights
from model_driver import Both, fold

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEEDED = {"hunyuan_v1_dense": {"head_dim": 16}}
"""What a family's config does not work out for itself."""


def build_theirs(model_type: str, **settings) -> PreTrainedModel:
    """A transformers model whose every weight is random, norms and biases included; eager attention, which knows softcaps."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**(TINY | NEEDED.get(model_type, {}) | settings))
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return theirs.eval()


def build_ours(theirs: PreTrainedModel) -> FoldForCausalLM:
    """Our model with a copy of `theirs`' weights."""
    config = fold_config(theirs.config)
    ours = FoldForCausalLM(config)
    ours.load_state_dict(fold_weights(config, {name: tensor.clone() for name, tensor in theirs.state_dict().items()}))
    return ours.eval()


@pytest.fixture(scope="session")
def pair() -> Callable[..., tuple[FoldForCausalLM, PreTrainedModel]]:
    """`pair(model_type, **settings)` gives ours and theirs."""

    def build(model_type: str, **settings) -> tuple[FoldForCausalLM, PreTrainedModel]:
        theirs = build_theirs(model_type, **settings)
        return build_ours(theirs), theirs

    return build


@pytest.fixture
def ids() -> torch.Tensor:
    """Two texts of 13 tokens without the padding token."""
    return torch.randint(3, 97, (2, 13), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def _small(pair):
    return pair("llama", num_hidden_layers=2)


@pytest.fixture
def both(_small) -> Both:
    """A small Llama, ours and theirs, the same in every test: a test changes nothing but our layout's method."""
    fold(_small[0], "full")
    return _small


@pytest.fixture
def ours(both) -> FoldForCausalLM:
    """Ours of `both`."""
    return both[0]
