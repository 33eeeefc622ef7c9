"""Every sharing pattern under every method: cached decoding equals the uncached forward, and readers hold no K and V weights.

Methods that weigh attention (H2O, TOVA) have no uncached form once they drop: here they are held against it while all still
fits, and against their definition, for the same patterns, in tests/cache/test_store_against_slow.py.
"""

import pytest
import torch

from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.gates import GateConfig
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM
from model_driver import CLOSE, MASK, TEXTS, poisoned
from store_driver import PATTERNS

GATES = {
    "dmc:3": GateConfig(method="dmc", scale=40.0, offset=1.0),
    "dms:2": GateConfig(method="dms", scale=40.0, offset=1.0, reads="own"),
    "dms:3": GateConfig(method="dms", source="adapter", scale=40.0, offset=1.0, reads="next"),
}
TIMES = ["full", "window:3+1", "h2o:8+8", "tova:16", *GATES]
NORMS = [{}, {"kv_norm": True}, {"qk_norm": "rotated"}]
LAYERS, HEADS, KV_HEADS = 7, 4, (1, 2, 4)


def build(pattern: str, time: str, kv_heads: int, **norms) -> FoldForCausalLM:
    torch.manual_seed(3)
    layout = KVLayout.parse(pattern, KVLayout.plain(LAYERS, kv_heads, 8))
    model = FoldForCausalLM(
        FoldConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            head_dim=8, num_key_value_heads=kv_heads, layout=layout, **norms,
        )
    )  # fmt: skip
    if time in GATES:
        model.set_gates(GATES[time], time)
    else:
        model.config.layout = layout.with_time(time)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*evicts tokens between calls")
@pytest.mark.parametrize("norms", NORMS, ids=lambda norms: ", ".join(norms) or "norm shared")
@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_cached_decoding_is_the_uncached_forward(pattern, time, norms):
    """Each pattern under each method with each number of KV heads and each norm; all pairs of those two, pattern by pattern."""
    kv_heads = KV_HEADS[(PATTERNS.index(pattern) + TIMES.index(time) + NORMS.index(norms)) % len(KV_HEADS)]
    model = build(pattern, time, kv_heads, **norms)
    with torch.enable_grad():  # the training form, with hard decisions
        whole = model(TEXTS, attention_mask=MASK, use_cache=False).logits.detach()
    cache, logits, start = poisoned(model, len(TEXTS)), [], 0
    for end in (4, 7, 8, 9, 10):
        with torch.no_grad():
            out = model(TEXTS[:, start:end], attention_mask=MASK[:, :end], past_key_values=cache)
        logits.append(out.logits)
        start = end
    real = MASK.bool()
    torch.testing.assert_close(torch.cat(logits, dim=1)[real], whole[real], **CLOSE)
    most = cache.kept_tokens.max().item()
    assert (most == 10) == (time in ("full", "h2o:8+8", "tova:16")) or time in GATES


@pytest.mark.parametrize("pattern", PATTERNS)
def test_readers_have_no_k_and_v(pattern):
    model = build(pattern, "full", 2, kv_norm=True)
    layout = model.config.layout
    assert not all(map(layout.is_owner, range(LAYERS)))
    for number, layer in enumerate(model.model.layers):
        held = {name.split(".")[0] for name, _ in layer.self_attn.named_parameters()}
        assert {"k_proj", "v_proj", "kv_norm"} & held == (
            {"k_proj", "v_proj", "kv_norm"} if layout.is_owner(number) else set()
        )
