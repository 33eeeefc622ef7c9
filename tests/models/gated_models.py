"""A small model whose random gates mark and merge: its own are a DMS adapter, the freed channel decides for DMC."""

from functools import cache

import torch

from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.gates import GateConfig
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.gates import GateSet

METHODS = ("full", "window:6+2", "h2o:4+4", "tova:8", "dms:5", "dmc:3")
"""One setting of each method, small enough to evict or merge a lot."""
LAYOUTS = ("full", "cla2", "0_0_0_0", "trailing:2", "cla2-keep-ends")
CHANNEL = GateSet("random channel", GateConfig(method="dmc", scale=40.0, offset=1.0), {})


@cache
def gated_model(layers: str = "full", seed: int = 0) -> FoldForCausalLM:
    """Four layers of two KV heads; every call gives the same model."""
    torch.manual_seed(seed)
    model = FoldForCausalLM(
        FoldConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
            num_key_value_heads=2, layout=KVLayout.parse(layers, KVLayout.plain(4, 2, 8)), rms_norm_eps=1e-5,
        )
    )  # fmt: skip
    model.set_gates(GateConfig(method="dms", source="adapter", scale=40.0, offset=1.0), "dms:5")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    model.config.layout = model.config.layout.with_time("full")
    return model.eval()


def cache_under(model: FoldForCausalLM, method: str, rows: int, **options):
    """A cache of small pages; DMC takes its decisions from the channel, DMS from the model's own gates."""
    gates = CHANNEL if method.startswith("dmc") else None
    return model.new_cache(rows, time=method, gates=gates, **({"page_slots": 4} | options))
