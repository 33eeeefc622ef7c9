"""Refitting: exact where an exact answer exists, better than what it starts from in every family, and it goes on when stopped."""

import pytest
import torch

from kvfold.convert.conversion import Conversion, convert, converted_model, new_config
from kvfold.convert.fitted import Fit, fit, held_places
from kvfold.convert.fitted_group import LeastSquares
from kvfold.models.decoder import FoldForCausalLM

FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "olmo2",
    "phi3",
    "gemma2",
    "gemma3_text",
    "granite",
    "smollm3",
    "mistral",
    "hunyuan_v1_dense",
]
SETTINGS = {
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32},
    "granite": {"residual_multiplier": 0.22, "logits_scaling": 6.0, "attention_multiplier": 0.02},
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 6},
    "phi3": {"partial_rotary_factor": 0.5},
    "smollm3": {"no_rope_layer_interval": 2},
}
MANY = torch.randint(3, 97, (24, 32), generator=torch.Generator().manual_seed(3))
OTHERS = torch.randint(3, 97, (8, 32), generator=torch.Generator().manual_seed(4))


def turned_into(model: FoldForCausalLM, **wanted) -> FoldForCausalLM:
    wanted = Conversion(**wanted)
    return converted_model(model, new_config(model.config, wanted), wanted)


@torch.no_grad()
def logits(model, ids) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def error(model, original, ids=OTHERS) -> float:
    """Mean square of the logits' difference."""
    return float((logits(model, ids) - logits(original, ids)).square().mean())


def fitted(original, options=None, **wanted) -> FoldForCausalLM:
    model = turned_into(original, init="fitted", **wanted)
    fit(original, model, MANY, options=options or Fit(batch=4))
    return model


def test_a_model_that_is_as_it_was_stays_so(pair):
    ours, _ = pair("llama")
    assert torch.equal(logits(fitted(ours), OTHERS), logits(ours, OTHERS))


def test_layers_below_the_first_shared_one_are_left_alone(pair):
    ours, _ = pair("llama")
    found = fitted(ours, layers="0_1_2_2")
    same = [
        all(map(torch.equal, mine.parameters(), theirs.parameters()))
        for mine, theirs in zip(found.model.layers, ours.model.layers, strict=True)
    ]
    assert same == [True, True, False, False]


def test_like_heads_that_lie_apart_are_merged_and_fitted_exactly(pair, tmp_path):
    """Heads 0 and 2 are the same, and 1 and 3: paired, nothing is lost, with fitting or without."""
    ours, _ = pair("llama", num_key_value_heads=4)
    with torch.no_grad():
        for layer in ours.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                rows = projection.weight.unflatten(0, (4, -1))
                rows[2:] = rows[:2].clone()
    ours.save_pretrained(tmp_path / "source")
    wanted = Conversion(heads=2, pair_heads=True, init="fitted")
    found = convert(tmp_path / "source", tmp_path / "out", wanted, calibration_WT=MANY)
    assert error(found, ours) < 1e-6


@pytest.mark.parametrize("biased", [False, True])
def test_heads_that_differ_by_what_attention_cannot_see_are_shared_exactly(pair, biased):
    """Layer 0 adds nothing to the stream; layer 1's keys are layer 0's times a complex number a frequency, its values are
    mixed. One set of keys and values serves both, with other queries and another output projection.
    """
    ours, _ = pair("llama", attention_bias=biased)
    first, second = ours.model.layers[:2]
    drawn = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for block in (first.self_attn.o_proj, first.mlp.down_proj):
            for weight in block.parameters():
                weight.zero_()
        # An output projection of zeros would say that layer 0's values don't matter, which they do not.
        second.input_layernorm.weight.copy_(first.input_layernorm.weight)
        factor = torch.polar(torch.rand(2, 8, generator=drawn) + 0.5, 6.3 * torch.rand(2, 8, generator=drawn))
        mix = torch.randn(2, 16, 16, generator=drawn)
        for kind in ("weight", "bias") if biased else ("weight",):
            keys = getattr(first.self_attn.k_proj, kind).view(2, 16, -1)
            turned = torch.complex(keys[:, :8], keys[:, 8:]) * factor[..., None]
            getattr(second.self_attn.k_proj, kind).copy_(
                torch.cat((turned.real, turned.imag), 1).view_as(getattr(second.self_attn.k_proj, kind))
            )
            values = getattr(first.self_attn.v_proj, kind).view(2, 16, -1)
            getattr(second.self_attn.v_proj, kind).copy_((mix @ values).view_as(getattr(second.self_attn.v_proj, kind)))
    dropped, found = turned_into(ours, layers="0_0_2_3", init="drop"), fitted(ours, layers="0_0_2_3")
    assert error(found, ours) < 1e-4 < 1e-2 < error(dropped, ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_better_than_what_it_starts_from(family, pair):
    ours, _ = pair(family, **SETTINGS.get(family, {}))
    layers = "0_1_0_1" if family in ("gemma2", "smollm3") else "cla2"
    errors = [error(turned_into(ours, layers=layers, init=init), ours) for init in ("drop", "mean")]
    assert error(fitted(ours, layers=layers), ours) < 0.9 * min(errors)


def test_every_step_takes_the_error_further_down(pair):
    ours, _ = pair("llama")
    found = [
        error(turned_into(ours, layers="cla2", init="drop"), ours),
        error(fitted(ours, Fit(batch=4, group=False, feed_forward=False), layers="cla2"), ours),
        error(fitted(ours, Fit(batch=4, feed_forward=False), layers="cla2"), ours),
        error(fitted(ours, Fit(batch=4), layers="cla2"), ours),
    ]
    assert found == sorted(found, reverse=True)


def test_query_steps_turn_queries_of_a_model_with_normed_keys(pair):
    ours, _ = pair("qwen3", head_dim=32)
    plain, stepped = (fitted(ours, Fit(batch=4, query_steps=steps), layers="cla2") for steps in (0, 24))
    assert not torch.equal(*(one.model.layers[1].self_attn.q_proj.weight for one in (plain, stepped)))
    assert error(stepped, ours, MANY) < error(plain, ours, MANY)


@pytest.mark.parametrize("layers", ["full", "yoco", "trailing:2", "cla4"])
def test_merged_heads_and_wide_groups_are_fitted(layers, pair):
    ours, _ = pair("llama")
    mean = turned_into(ours, layers=layers, heads=1)
    assert error(fitted(ours, layers=layers, heads=1), ours) < 0.9 * error(mean, ours)


def test_the_original_is_left_alone(pair):
    ours, _ = pair("qwen2")
    before = {name: weight.clone() for name, weight in ours.state_dict().items()}
    fitted(ours, layers="cla2", heads=1)
    assert all(torch.equal(before[name], weight) for name, weight in ours.state_dict().items())


def test_an_interrupted_fit_goes_on_where_it_was(pair, tmp_path):
    pair("llama")[1].save_pretrained(tmp_path / "source")
    wanted, done = Conversion(layers="cla2", init="fitted"), []

    def stop(_: str, layer: int, total: int) -> None:
        if layer == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "source", tmp_path / "out", wanted, calibration_WT=MANY, report=stop)
    folder = tmp_path / ".out.fitting"
    assert sorted(path.name for path in folder.iterdir()) == ["layer-0000.safetensors", "layer-0001.safetensors"]
    (folder / "layer-0001.safetensors").write_bytes(b"torn")
    again = convert(
        tmp_path / "source", tmp_path / "out", wanted, calibration_WT=MANY, report=lambda *at: done.append(at)
    )
    assert not folder.exists()
    whole = convert(tmp_path / "source", tmp_path / "whole", wanted, calibration_WT=MANY)
    assert done[-1][1:] == (4, 4)
    assert all(torch.equal(weight, whole.state_dict()[name]) for name, weight in again.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "whole"]


def test_what_was_begun_with_another_text_is_not_gone_on_with(pair, tmp_path):
    ours, _ = pair("llama")
    models = [turned_into(ours, layers="cla2", init="fitted") for _ in range(3)]

    def stop(_: str, layer: int, total: int) -> None:
        if layer == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(ours, models[0], OTHERS, folder=tmp_path / "state", report=stop)
    for model, folder in ((models[1], tmp_path / "state"), (models[2], None)):
        fit(ours, model, MANY, folder=folder)
    assert torch.equal(logits(models[1], OTHERS), logits(models[2], OTHERS))


def test_the_strength_is_chosen_on_text_that_is_not_fitted_on(pair):
    assert [list(held_places(batches)) for batches in (2, 3, 4, 9)] == [[1], [2], [3], [3, 7]]
    ours, _ = pair("llama")
    few, many = turned_into(ours, init="fitted", layers="cla2"), turned_into(ours, init="fitted", layers="cla2")
    fit(ours, few, MANY[:4], options=Fit(batch=4))
    fit(ours, many, MANY, options=Fit(batch=4))
    assert error(many, ours) < error(few, ours) < error(turned_into(ours, init="drop", layers="cla2"), ours)
    with pytest.raises(ValueError, match="on 1 window of text"):
        fit(ours, few, MANY[:1])


def test_a_group_that_is_shared_already_does_not_grow(pair):
    shared = turned_into(pair("llama")[0], layers="cla2")
    with pytest.raises(ValueError, match="layers 0, 2 are read by others already: keep these groups as they are"):
        fit(shared, turned_into(shared, layers="cla4"), MANY)


def test_a_model_that_shares_already_may_share_more(pair):
    first = turned_into(pair("llama")[0], init="fitted", layers="0_1_2_2")
    fit(pair("llama")[0], first, MANY)
    fitted, dropped = (turned_into(first, init=init, layers="0_0_2_2") for init in ("fitted", "drop"))
    fit(first, fitted, MANY)
    assert fitted.config.layout.owners == (0, 2)
    assert error(fitted, first) < 0.7 * error(dropped, first)
    same = "model.layers.2.self_attn.k_proj.weight"
    assert torch.equal(fitted.get_parameter(same), first.get_parameter(same))


@pytest.mark.parametrize(("noise", "most", "least"), [(0.0, 1e-2, 0.0), (100.0, 1e9, 1.0)])
def test_the_ridge_is_as_strong_as_held_out_text_asks(noise, most, least):
    drawn = torch.Generator().manual_seed(0)
    truth = torch.randn(20, 5, generator=drawn)
    seen, held = LeastSquares(20, 5, torch.device("cpu")), LeastSquares(20, 5, torch.device("cpu"))
    for sums, count in ((seen, 40), (held, 200)):
        x = torch.randn(count, 20, generator=drawn)
        sums.add(x, x @ truth + noise * torch.randn(count, 5, generator=drawn))
    assert least <= seen.best_strength(held) <= most


def test_a_fit_that_could_not_be_written_is_not_lost(pair, tmp_path, monkeypatch):
    pair("llama")[1].save_pretrained(tmp_path / "source")

    def full(*_) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("kvfold.convert.conversion.write_model", full)
    with pytest.raises(OSError, match="no space"):
        convert(tmp_path / "source", tmp_path / "out", Conversion(layers="cla2", init="fitted"), calibration_WT=MANY)
    assert len(list((tmp_path / ".out.fitting").iterdir())) == 4
