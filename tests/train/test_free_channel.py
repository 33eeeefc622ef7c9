"""The channel that gates take for their decisions: the one that the model misses least."""

import json

import pytest
import torch

from kvfold.models.adapters import read_adapter
from kvfold.train.calibrate import least_missed_channel
from kvfold.train.settings import RetrofitSettings
from tiny_model import tiny_model

UNUSED = 5


def with_an_unused_channel():
    """A tiny model whose keys and queries say nothing in channel 5 and in its partner under rotary positions."""
    model, dim = tiny_model(), tiny_model().config.head_dim
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                for channel in (UNUSED, (UNUSED + dim // 2) % dim):
                    projection.weight.unflatten(0, (-1, dim))[:, channel] = 0
    return model


@pytest.mark.parametrize("method", ["dmc", "dms"])
def test_the_channel_that_says_nothing_is_found(method):
    model = with_an_unused_channel()
    layout, weights = model.config.layout, {name: one.clone() for name, one in model.state_dict().items()}
    settings = RetrofitSettings(time=method, trains="full", source="channel", compression=1.5, data=("x",))
    ids = torch.randint(5, 90, (3, 40), generator=torch.Generator().manual_seed(0))
    found = least_missed_channel(model, ids, settings)
    assert found["channel"] % (model.config.head_dim // 2) == UNUSED % (model.config.head_dim // 2)
    assert found["kl"] < 1e-6 < found["kl_of_last"] == found["kl_of_each"][-1] and len(found["kl_of_each"]) == 8
    assert model.config.layout == layout and model.config.gates is None
    assert all(torch.equal(one, weights[name]) for name, one in model.state_dict().items())


def test_a_run_takes_it_and_says_so(retrofit):
    run = retrofit("out", model=with_an_unused_channel(), time="dmc:3", trains="lora", rank=2, find_channel=True)
    facts = run.run()
    channel = facts["freed"]["channel"]
    assert channel % (run.model.config.head_dim // 2) == UNUSED % (run.model.config.head_dim // 2)
    assert json.loads((run.folder.training / "channel.json").read_text())["channel"] == channel
    assert read_adapter(run.folder.out)[0].gates["channel"] == channel
    assert f"| freed channel | {channel}, " in (run.folder.out / "README.md").read_text()
    assert run.settings.find_channel  # the run is known again by what was asked for


def test_a_channel_that_heads_do_not_have_is_refused(retrofit):
    with pytest.raises(ValueError, match="channel 8: heads have 8 channels: use 0 to 7"):
        retrofit("out", time="dmc:3", trains="full", channel=8).run()


def test_a_method_without_a_layer_to_rule_is_refused(retrofit):
    model = tiny_model(sliding_window=16)
    with pytest.raises(
        ValueError, match="no layer of this model comes under dms:4: what is said of all goes to layers of full"
    ):
        retrofit("out", model=model, time="dms:4", trains="adapter").run()
