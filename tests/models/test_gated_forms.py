"""Training form = inference form = the definition, for DMC and DMS with random gates: logits and what is kept.

Lengths, rows, left padding, chunk cuts, page sizes, grouped heads and shared layers are drawn.
"""

from functools import cache as remembered

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from kvfold.cache.hf import FoldCache
from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.gates import GateConfig
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.gates import CallOptions
from slow_gated import slow_gated

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
LEAST = 1e-3
"""A decision this close to its threshold could be rounded either way: such examples are redrawn, and counted."""
GATES = {
    "dmc": GateConfig(method="dmc", scale=40.0, offset=1.0),
    "dmc first channel": GateConfig(method="dmc", scale=40.0, offset=1.0, channel=0),
    "dmc per layer": GateConfig(method="dmc", scale=40.0, offset=1.0, per="layer"),
    "dms own": GateConfig(method="dms", scale=40.0, offset=1.0, reads="own"),
    "dms next": GateConfig(method="dms", scale=40.0, offset=1.0, reads="next"),
    "dms adapter own": GateConfig(method="dms", source="adapter", scale=40.0, offset=1.0, reads="own"),
    "dms adapter next": GateConfig(method="dms", source="adapter", scale=40.0, offset=1.0, reads="next"),
    "dms adapter layer": GateConfig(method="dms", source="adapter", scale=40.0, offset=1.0, per="layer", bias=True),
}
WINDOWS = {"dmc": ("dmc:12", "dmc:3", "dmc:1", "dmc:inf", "dmc:3+1", "dmc:inf+2"), "dms": ("dms:1", "dms:4", "dms:9")}


@remembered
def build(name: str, layers: str, kv_heads: int, seed: int) -> FoldForCausalLM:
    torch.manual_seed(seed)
    layout = KVLayout.parse(layers, KVLayout.plain(3, kv_heads, 8))
    model = FoldForCausalLM(
        FoldConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, head_dim=8,
            num_key_value_heads=kv_heads, layout=layout, rms_norm_eps=1e-5,
        )
    )  # fmt: skip
    model.set_gates(GATES[name], GATES[name].method)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    return model.eval()


@st.composite
def cases(draw):
    name = draw(st.sampled_from(sorted(GATES)))
    model = build(
        name,
        draw(st.sampled_from(["full", "0_0_2", "0_0_0"])),
        draw(st.sampled_from([1, 2, 4])),
        draw(st.integers(0, 3)),
    )
    time = draw(st.sampled_from(WINDOWS[name[:3]]))
    if draw(st.booleans()):
        time = f"{time}; 0=full"
    model.config.layout = model.config.layout.with_time(time)
    lengths = draw(st.lists(st.integers(1, 22), min_size=1, max_size=3))
    columns = max(lengths) + draw(st.integers(0, 2))
    ids = torch.randint(
        3, 61, (len(lengths), columns), generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))
    )
    mask = (torch.arange(columns) >= columns - torch.tensor(lengths)[:, None]).long()
    cuts = sorted(draw(st.sets(st.integers(1, columns), max_size=5)) | {columns})
    return model, ids, mask, cuts, draw(st.sampled_from([2, 4, 16])), draw(st.booleans())


def dense(model, ids, mask, **options):
    """The training view with hard decisions: gradients are enabled, nothing is cached."""
    return model(ids, attention_mask=mask, use_cache=False, options=CallOptions(**options)).logits.detach()


@torch.no_grad()
def cached(model, ids, mask, cuts, page_slots, turn):
    """Through the store, cut into calls; with `turn`, a copy goes on from the middle in place of the original."""
    cache = FoldCache(model.config.layout, dtype=torch.float32, rows=len(ids), page_slots=page_slots, poison=True)
    logits, start = [], 0
    for end in cuts:
        out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        logits.append(out.logits)
        if turn and start == 0:
            cache = cache.copy()
        start = end
    return torch.cat(logits, dim=1), cache


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(cases())
def test_training_inference_and_definition_agree(case):
    model, ids, mask, cuts, page_slots, turn = case
    soft_free, (stored, cache) = dense(model, ids, mask), cached(model, ids, mask, cuts, page_slots, turn)
    whole, whole_cache = cached(model, ids, mask, [ids.shape[1]], page_slots, False)
    assert not stored[mask.bool()].isnan().any()
    with torch.no_grad():
        slow = [slow_gated(model, row[real.bool()]) for row, real in zip(ids, mask, strict=True)]
    if min(least for _, _, least in slow) < LEAST:
        event("redrawn: a decision at its threshold")
        return
    for row, (logits, held, _) in enumerate(slow):
        real = mask[row].bool()
        for form in (soft_free, stored, whole):
            torch.testing.assert_close(form[row][real], logits, **CLOSE)
        for found in (cache, whole_cache):
            assert [owner[row] for owner in found.kept_positions] == held
    cache.free()
    assert not any(pool.held_pages for pool in cache.store.pools) or turn


@pytest.mark.parametrize("name", sorted(GATES))
def test_gates_that_never_fire(name):
    """An adapter that never fires is the plain model; a freed channel is plain attention with that channel zeroed."""
    model = build(name, "0_0_2", 2, 7)
    model.config.layout = model.config.layout.with_time(GATES[name].method)
    ids = torch.randint(3, 61, (2, 15), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    plain, zeroed = dense(model, ids, mask, gates="off"), dense(model, ids, mask, channel_factor=0.0)
    model.config.gates = {**GATES[name].to_json(), "offset": 1e6}
    adapter = GATES[name].source == "adapter"
    for logits in (dense(model, ids, mask), cached(model, ids, mask, [4, 5, 15], 4, False)[0]):
        torch.testing.assert_close(logits, zeroed, **CLOSE)
        assert torch.allclose(logits, plain, **CLOSE) == adapter
    model.config.layout = model.config.layout.with_time("full")
    torch.testing.assert_close(dense(model, ids, mask), plain, **CLOSE)
    model.config.gates = GATES[name].to_json()


def test_dmc_that_always_fires_keeps_one_entry():
    model = build("dmc", "full", 2, 1)
    model.config.layout = model.config.layout.with_time("dmc:inf")
    model.config.gates = {**GATES["dmc"].to_json(), "scale": 0.0, "offset": -1.0}
    ids = torch.randint(3, 61, (2, 15), generator=torch.Generator().manual_seed(1))
    cache = cached(model, ids, torch.ones_like(ids), [3, 4, 15], 4, False)[1]
    model.config.gates = GATES["dmc"].to_json()
    assert (cache.kept_tokens == 1).all()
