"""A model under fold: without a cache and through one, however its calls are cut, it is the same; an adapter keeps all that fold
learns; the engine runs it.
"""

import pytest
import torch

from kvfold.engine.engine import Engine
from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.gates import GateConfig
from kvfold.models.adapters import Base, apply_adapter, load_gates
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM
from kvfold.ops.folding import FoldEntries, fold_entries
from kvfold.train.settings import RetrofitSettings
from kvfold.train.student import write_trained

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
TIME = "fold:5+8@0.1"
GATES = GateConfig(method="fold", source="adapter", scale=40.0, offset=1.0, bias=True)


def build(layers="full", seed=0, gated=True) -> FoldForCausalLM:
    torch.manual_seed(seed)
    layout = KVLayout.parse(layers, KVLayout.plain(3, 2, 8))
    model = FoldForCausalLM(
        FoldConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, head_dim=8,
            num_key_value_heads=2, layout=layout, rms_norm_eps=1e-5,
        )
    )  # fmt: skip
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
        if gated:
            model.set_gates(GATES, TIME)
            for name, weight in model.named_parameters():
                if ".fold_" in name:
                    weight.add_(torch.randn_like(weight) * 0.15)
    return model.eval()


def ids_of(rows=2, tokens=50, seed=0):
    return torch.randint(3, 61, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def cached(model, ids, mask, cuts, **options):
    """Logits through the store, and the cache."""
    cache, logits, start = model.new_cache(len(ids), page_slots=4, **options), [], 0
    for end in cuts:
        logits.append(model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
        start = end
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("layers", ["full", "0_0_2"])
def test_with_and_without_a_cache(layers):
    model, ids = build(layers), ids_of()
    mask = (torch.arange(50) >= torch.tensor([0, 11])[:, None]).long()
    plain = model(ids, attention_mask=mask, use_cache=False).logits.detach()
    whole, cache = cached(model, ids, mask, [50])
    cut, other = cached(model, ids, mask, [13, 14, 15, 16, 17, 30, *range(31, 51)])
    assert 0 < int(cache.kept_tokens.min()) < 40
    assert cache.kept_positions == other.kept_positions
    for logits in (whole, cut):
        torch.testing.assert_close(logits[mask.bool()], plain[mask.bool()], **CLOSE)
    dropped, _ = cached(model, ids, mask, [50], time="fold:5+8@none")
    assert not torch.allclose(dropped, whole, atol=1e-3)


def test_merges_are_not_rounded_by_autocast():
    torch.manual_seed(3)
    k, v = torch.randn(2, 1, 2, 30, 8)
    entries = FoldEntries(
        k_BKED=k, v_BKED=v, position_BKE=torch.arange(30).expand(1, 2, 30), marked_BKE=torch.rand(1, 2, 30) < 0.5,
        s_BKE=torch.randn(1, 2, 30), bias_BKE=torch.zeros(1, 2, 30),
    )  # fmt: skip
    options = {"before_B": torch.tensor([0]), "seen_B": torch.tensor([30]), "delay": 3, "grid": 8, "threshold": -1.0}
    options |= {"reach": 32, "heads_KP": torch.tensor([[0.1, 0.5, 0.8]] * 2)}
    lives, after = fold_entries(entries, **options)
    with torch.autocast("cpu", torch.bfloat16):
        rounded_lives, rounded_after = fold_entries(entries, **options)
    assert after["changed_BKE"].any()
    for plain, rounded in ((lives, rounded_lives), (after, rounded_after)):
        assert all(torch.equal(plain[name], rounded[name]) for name in plain)


def test_all_that_is_learned_gets_a_gradient():
    model, ids = build(), ids_of()
    model.train()
    model(ids, use_cache=False).logits.square().mean().backward()
    for layer in model.model.layers[:2]:
        projection = layer.self_attn.fold_proj
        assert (projection.heads.grad.abs() > 0).all(dim=0).all()
        assert float(projection.weight.grad[1::2].abs().max()) > 0
        # Decisions are hard: what they are learned by is another method's training.
        assert float(projection.weight.grad[::2].abs().max()) == 0


def test_an_adapter_keeps_all_of_it(tmp_path):
    model, ids = build(), ids_of()
    mask, base = torch.ones_like(ids), Base.of(build(gated=False), "tiny")
    settings = RetrofitSettings(time="dms:5", seq_len=50, compression=2.0)
    write_trained(model, None, settings, base, tmp_path)
    again, beside = build(gated=False), build(gated=False)
    apply_adapter(again, tmp_path)
    assert again.config.layout.time_text() == TIME
    theirs = cached(model, ids, mask, [9, 50])[0]
    assert torch.equal(cached(again, ids, mask, [9, 50])[0], theirs)
    given = cached(beside, ids, mask, [9, 50], time=TIME, gates=load_gates(beside, tmp_path))[0]
    assert torch.equal(given, theirs)
    model.save_pretrained(tmp_path / "whole")
    loaded = FoldForCausalLM.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(cached(loaded, ids, mask, [9, 50])[0], theirs)


def test_the_engine_runs_it():
    model = build()
    requests = [{"prompt": row[: 20 + 9 * at].tolist(), "max_tokens": 24, "temperature": 0, "ignore_eos": True}
                for at, row in enumerate(ids_of(3, 40))]  # fmt: skip
    alone = [
        model.generate(torch.tensor([one["prompt"]]), max_new_tokens=24, do_sample=False, eos_token_id=None)[0].tolist()
        for one in requests
    ]
    with Engine(model, kv_memory="200kB", prefill_tokens=16) as engine:
        answers = engine.generate(requests)
    for request, answer, theirs in zip(requests, answers, alone, strict=True):
        assert answer.error is None
        assert request["prompt"] + list(answer.token_ids) == theirs
