"""A method that takes over trained gates: the decisions stay, importance is as defined, and what is fitted predicts it."""

import pytest
import torch
from fold_distil import fit_importance, mean_attention, take_gates

from kvfold.errors import UserError
from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.gates import GateConfig
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM
from kvfold.train.settings import RetrofitSettings
from kvfold.train.student import check_method


def build(time="dms:6", gates=True) -> FoldForCausalLM:
    torch.manual_seed(0)
    layout = KVLayout.parse("0_0_2", KVLayout.plain(3, 2, 8))
    model = FoldForCausalLM(
        FoldConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, head_dim=8,
            num_key_value_heads=2, layout=layout,
        )
    )  # fmt: skip
    if gates:
        config = GateConfig(method=time.split(":")[0], source="adapter", scale=40.0, offset=1.0, bias=True)
        model.set_gates(config, time)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return model.eval()


def test_mean_attention_by_its_definition():
    torch.manual_seed(1)
    q, k = torch.randn(2, 140, 4, 8), torch.randn(2, 140, 2, 8)
    found = mean_attention(q, k, delay=5, scale=0.4)
    logits = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, dim=2)) * 0.4
    weights = (
        logits.masked_fill(torch.ones(140, 140).triu(1) > 0, -torch.inf).softmax(dim=-1).unflatten(1, (2, 2)).sum(dim=2)
    )
    for token in (0, 1, 77, 133):
        torch.testing.assert_close(found[:, :, token], weights[:, :, token + 6 :, token].mean(dim=2))
    assert (found[:, :, 134:] == 0).all()


@torch.no_grad()
def test_decisions_stay_and_importance_is_fitted():
    model, ids = build(), torch.randint(3, 61, (6, 90), generator=torch.Generator().manual_seed(0))
    before = model(ids, use_cache=False, output_decisions=True)
    take_gates(model, "fold:6+8@none")
    assert model.config.layout.time_text() == "fold:6+8@none"
    assert [layer.self_attn.fold_proj is None for layer in model.model.layers] == [False, True, False]
    after = model(ids, use_cache=False, output_decisions=True)
    # In the first group nothing has been evicted yet that the gates could read.
    assert torch.equal(before.decisions[0], after.decisions[0])
    facts = fit_importance(model, ids)
    assert facts["tokens"] == ids.numel()
    assert 0.2 < facts["explained_variance"] <= 1
    fitted = model(ids, use_cache=False, output_decisions=True)
    assert torch.equal(fitted.decisions[0], after.decisions[0])
    projection = model.model.layers[0].self_attn.fold_proj
    assert (projection.weight[1::2].abs().sum(dim=1) > 0).all()
    torch.testing.assert_close(projection.heads, torch.tensor([0.0, 0.0, 1.0]).repeat(2, 1))


def test_what_is_refused():
    with pytest.raises(UserError, match="needs an adapter for dms"):
        take_gates(build(gates=False), "fold:6")
    with pytest.raises(UserError, match="takes over no gates"):
        take_gates(build(), "window:6+2")
    with pytest.raises(UserError, match="an adapter for dms: train that"):
        check_method(build(), RetrofitSettings(time="fold:6", seq_len=256, compression=2.0))
