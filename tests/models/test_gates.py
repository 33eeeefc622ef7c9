"""Gates: where decisions come from, noise, soft and straight-through decisions, switches, files, and what is refused."""

from dataclasses import replace

import pytest
import torch

import kvfold
from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.gates import GateConfig
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.gates import CallOptions, GateCall, GateTable

IDS = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(1))
ADAPTER = GateConfig(method="dms", source="adapter", scale=40.0, offset=1.0)


def build(gates: GateConfig | None = ADAPTER, time: str = "dms:4", layers: str = "0_0_2") -> FoldForCausalLM:
    torch.manual_seed(0)
    layout = KVLayout.parse(layers, KVLayout.plain(3, 2, 8)).with_time(time)
    model = FoldForCausalLM(
        FoldConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, head_dim=8,
            num_key_value_heads=2, layout=layout, gates=gates and gates.to_json(),
        )
    )  # fmt: skip
    return model.eval()


OFF = CallOptions(gates="off")


def shaken(model: FoldForCausalLM) -> FoldForCausalLM:
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    return model


def soft(model, noise_key=None, **options):
    model.train()
    try:
        return model(IDS, noise_key=noise_key, output_decisions=True, use_cache=False, **options)
    finally:
        model.eval()


def test_a_new_adapter_is_zero_and_decides_nothing():
    model = build()
    names = [name for name, _ in model.named_parameters() if "fold_" in name]
    assert names == [
        f"model.layers.{layer}.self_attn.fold_{part}.weight" for layer in (0, 2) for part in ("norm", "proj")
    ]
    assert not model.model.layers[0].self_attn.fold_proj.weight.any()
    out = model(IDS, output_decisions=True)
    assert [tuple(x.shape) for x in out.decisions] == [(2, 2, 12)] * 2 and not any(x.any() for x in out.decisions)


def test_saved_and_loaded_a_model_decides_alike(tmp_path):
    model = shaken(build())
    model.save_pretrained(tmp_path / "m")
    again = kvfold.load(str(tmp_path / "m"))
    assert again.config.gates == ADAPTER.to_json() and again.config.layout.time_text() == "dms:4"
    assert torch.equal(model(IDS).logits, again(IDS).logits)


def test_loading_sets_adapters_that_a_checkpoint_lacks_to_zero(tmp_path):
    plain = build(None, "full")
    plain.save_pretrained(tmp_path / "m")
    config = plain.config
    config.gates = ADAPTER.to_json()
    model = FoldForCausalLM.from_pretrained(tmp_path / "m", config=config)
    proj, norm = model.model.layers[0].self_attn.fold_proj, model.model.layers[0].self_attn.fold_norm
    assert not proj.weight.any() and (norm.weight == 1).all()


@pytest.mark.parametrize("gates", [ADAPTER, GateConfig.published_channel("dms"), GateConfig.published_channel("dmc")])
def test_decisions_are_straight_through_and_have_gradients(gates):
    model = shaken(build(gates, f"{gates.method}:4"))
    out = soft(model, torch.tensor([5, 6]))
    for hard, probability in zip(out.decisions, out.gate_probs, strict=True):
        assert torch.equal(hard.detach() > 0.5, probability.detach() > 0.5)
        assert torch.allclose(hard.detach(), hard.detach().round(), atol=1e-6)
    sum(x.mean() for x in out.decisions).backward()
    source = {"dmc": "k_proj"}.get(gates.method, "q_proj") if gates.source == "channel" else "fold_proj"
    assert getattr(model.model.layers[0].self_attn, source).weight.grad.abs().sum() > 0


def test_noise_is_a_function_of_the_row_and_the_layer():
    model = shaken(build())
    first, swapped = (soft(model, torch.tensor(keys)).gate_probs for keys in ([5, 6], [6, 5]))
    again, none = soft(model, torch.tensor([5, 6])).gate_probs, soft(model).gate_probs
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[0], swapped[0]) and not torch.equal(first[0], none[0])
    table = GateTable(configs=(replace(ADAPTER, tau=10.0),) * 2, freed=())
    call = GateCall(table=table, training=True, noise_key=torch.tensor([5]))
    noise, other = (10 * call.soft(layer, torch.zeros(1, 20000, 4))[0].double().logit() for layer in (0, 1))
    assert not torch.equal(noise, other)
    assert abs(noise.mean()) < 0.05 and abs(noise.var() - torch.pi**2 / 3) < 0.1


def test_noise_survives_activation_checkpointing():
    plain, saving = shaken(build()), shaken(build())
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    grads = []
    for model in (plain, saving):
        model.train()
        out = model(IDS, labels=IDS, noise_key=torch.tensor([5, 6]), output_decisions=True, use_cache=False)
        (out.loss + sum(x.mean() for x in out.decisions)).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 10
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_gates_off_is_the_plain_model_even_with_a_cache():
    model = shaken(build())
    plain = build(None, "full")
    plain.load_state_dict(model.state_dict(), strict=False)
    cache = model.new_cache(rows=2)
    with torch.no_grad():
        logits = model(IDS, past_key_values=cache, options=OFF).logits
    assert (cache.kept_tokens == 12).all()
    torch.testing.assert_close(logits, plain(IDS).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(IDS).logits, plain(IDS).logits, atol=1e-3)


def test_a_channel_written_out_of_the_weights_stays_out():
    model = shaken(build(GateConfig.published_channel("dmc"), "dmc"))
    zeroed = model(IDS, options=CallOptions(channel_factor=0.0)).logits
    model.free_channel()
    for layer in model.model.layers:
        for projection in filter(None, (layer.self_attn.q_proj, layer.self_attn.k_proj)):
            assert not projection.weight.view(-1, 8, 32)[:, -1].any()
    torch.testing.assert_close(model(IDS, options=OFF).logits, zeroed, atol=1e-4, rtol=1e-4)


def test_under_lora_only_the_base_is_masked():
    """What the base weights write into the channel is gone for the gates; their teacher sees it."""
    gates = GateConfig(method="dmc", base_masked=True)
    model, bare = shaken(build(gates, "dmc")), shaken(build(None, "full"))
    bare.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(IDS, options=OFF).logits, bare(IDS).logits, atol=1e-4, rtol=1e-4)
    out = model(IDS, output_decisions=True)
    assert all(torch.allclose(x, torch.tensor(-50.0).sigmoid(), atol=1e-5) for x in out.gate_probs)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"method": "dmc", "source": "adapter"}, "the method has no such form"),
        ({"method": "dms", "reads": "later"}, "reads 'later' is not known: use own or next"),
        ({"method": "dms", "tau": 0}, "tau 0"),
        ({"method": "dms", "colour": 1}, "unknown key colour"),
        ({}, "no method"),
    ],
)
def test_gates_that_make_no_sense_are_one_line(values, says):
    with pytest.raises(ValueError) as refusal:
        GateConfig.from_json(values)
    assert says in str(refusal.value) and "\n" not in str(refusal.value)
