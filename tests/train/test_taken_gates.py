"""A method that takes over trained gates: the decisions stay, importance is as defined, and what is fitted predicts it."""

import pytest
import torch

from kvfold.errors import UserError
from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.gates import GateConfig
from kvfold.methods.registry import parse_time
from kvfold.models.adapters import apply_adapter
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM
from kvfold.train.calibrate import fit_importance, mean_attention
from kvfold.train.settings import RetrofitSettings
from kvfold.train.student import take_gates
from tiny_model import tiny_model


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
    take_gates(model, parse_time("fold:6+8@none"), "fold:6+8@none")
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
        take_gates(build(gates=False), parse_time("fold:6"), "fold:6")
    with pytest.raises(UserError, match="takes over no gates"):
        take_gates(build(), parse_time("window:6+2"), "window:6+2")
    with pytest.raises(UserError, match="an adapter for dms: name one with start"):
        RetrofitSettings(time="fold:6", seq_len=256, compression=2.0)
    for given, said in (
        ({"weight_decay": 0.1}, "leave fsdp and weight_decay out"),
        ({"gradient_checkpointing": True}, "leave gradient_checkpointing out"),
        ({"trains": "lora"}, "train an adapter"),
    ):
        with pytest.raises(UserError, match=said):
            RetrofitSettings(time="fold:6", start="an-adapter", **given)


def decisions_of(model, ids):
    with torch.no_grad():
        outputs = model.eval()(ids, use_cache=False, output_decisions=True)
    return [one for one in outputs.decisions if one is not None]


@pytest.fixture
def marked(retrofit, tmp_path):
    """The folder of an adapter that marks tokens."""
    retrofit("dms", time="dms:4", compression=3.0, ramp_steps=4, tail_steps=2, learning_rate=3e-2).run()
    return str(tmp_path / "dms")


def test_a_retrofit_takes_gates_over_and_trains_what_stands_beside_them(retrofit, marked, tmp_path):
    facts = retrofit("fold", time="fold:4+4", start=marked, heads_learning_rate=0.1).run()
    assert facts["warm_start"]["tokens"] and facts["after"]["compression"] > 1.2
    width, heads, layers = tiny_model().config.hidden_size, 2, len(tiny_model().model.layers)
    assert facts["trained_parameters"] == layers * heads * (width + 1 + 3)  # importance, its bias, and b, c and lambda
    model, taken = tiny_model(), tiny_model()
    apply_adapter(model, tmp_path / "fold")
    apply_adapter(taken, marked)
    assert model.config.layout.time_text() == model.config.kept_ratios["time"] == "fold:4+4@0.65"
    for layer, before in zip(model.model.layers, taken.model.layers, strict=True):
        ours, theirs = layer.self_attn, before.self_attn
        assert torch.equal(ours.fold_proj.weight[::2], theirs.fold_proj.weight)
        assert torch.equal(ours.fold_proj.bias[::2], theirs.fold_proj.bias)
        assert torch.equal(ours.fold_norm.weight, theirs.fold_norm.weight)
        assert (ours.fold_proj.heads != torch.tensor([0.0, 0.0, 1.0])).any()
    card = (tmp_path / "fold" / "README.md").read_text()
    assert f"those of {marked}, as they are" in card and "compression asked for" not in card


def test_a_retrofit_goes_on_from_an_adapter(retrofit, marked, tmp_path):
    points = []
    facts = retrofit("on", time="dms:4", compression=1.5, start=marked, calibrate=True, on_step=points.append).run()
    assert points[0]["target_compression"] == 1.5  # no ramp
    assert abs(points[0]["compression"] - 1.5) < 0.3 < facts["warm_start"]["before"] - facts["warm_start"]["after"]
    with pytest.raises(UserError, match="it has gates for fold, and dms can't go on from that"):
        retrofit("back", time="dms:4", start="smollm2-135m-fold-4x").run()


def test_it_resumes_with_the_importance_that_it_had(gone_on, marked):
    whole, rest = gone_on(time="fold:4+4", start=marked)
    theirs = dict(whole.model.named_parameters())
    assert all(torch.equal(weight, theirs[name]) for name, weight in rest.model.named_parameters())
