"""FoldConfig: what it writes, what it reads back, and what it refuses."""

import json

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from kvfold.layout.hf_config import config_layout
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.config import FoldConfig
from kvfold.models.families import FAMILIES, fold_config

SMALL = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}


def test_a_fresh_config_has_the_plain_layout_and_is_its_own_base():
    config = FoldConfig(**SMALL)
    assert config.layout == KVLayout.plain(4, 2, 8)
    assert config.base_layout == config.layout
    assert config.num_key_value_heads == 2 and config.head_dim == 8 and not config.channel_freed


def test_windows_of_the_config_reach_the_layout():
    types = ["sliding_attention", "full_attention"] * 2
    assert FoldConfig(**SMALL, sliding_window=5).layout == KVLayout.plain(4, 2, 8, [5] * 4)
    assert FoldConfig(**SMALL, sliding_window=5, layer_types=types).layout == KVLayout.plain(
        4, 2, 8, [5, None, 5, None]
    )


def test_round_trip_through_the_auto_class(tmp_path):
    plain = KVLayout.plain(4, 2, 8)
    layout = KVLayout.parse("cla2", plain).with_time("h2o:4+4; 2=window:6+1")
    config = FoldConfig(**SMALL, layout=layout, base_layout=plain, channel_freed=True, nope_layers=[0, 1])
    turned = ["none", "none", "default", "default"]
    layout, plain = layout.with_rope(turned), plain.with_rope(turned)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["layout"] == layout.to_json() and written["base_layout"] == plain.to_json()
    assert written["model_type"] == "kvfold" and not [key for key in written if key.startswith("_")]
    read = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(read, FoldConfig)
    assert (read.layout, read.base_layout, read.channel_freed, read.nope_layers) == (layout, plain, True, [0, 1])
    assert read.to_diff_dict() == config.to_diff_dict()


def test_rope_per_attention_type_survives_the_round_trip(tmp_path):
    theirs = CONFIG_MAPPING["gemma3_text"](num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    config = fold_config(theirs)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters == theirs.rope_parameters


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_planner_reads_the_same_layout_from_the_raw_config(model_type):
    config = CONFIG_MAPPING[model_type](num_hidden_layers=6)
    assert fold_config(config).layout == config_layout(config.to_dict())
    assert fold_config(config).layout == config_layout(fold_config(config).to_dict())


def test_layers_with_and_without_rotary_positions_share_nothing():
    shared = KVLayout.parse("cla2", KVLayout.plain(4, 2, 8))
    mixed = FoldConfig(**SMALL, layout=shared, nope_layers=[2, 3]).layout
    assert mixed.layers_text() == "cla2" and [layer.rope for layer in mixed.layers] == ["default"] * 2 + ["none"] * 2
    with pytest.raises(ValueError, match=r"layer 1 reads layer 0 but has .* rotary positions\) \(None, 2, 8, 'none'\)"):
        FoldConfig(**SMALL, layout=shared, nope_layers=[1])


@pytest.mark.parametrize(
    ("layout", "line"),
    [
        (KVLayout.plain(3, 2, 8), "a layout of 3 layers in a config of 4"),
        (KVLayout.plain(4, 2, 16), "layer 0 has 2 KV heads of 16 channels in the layout"),
        (KVLayout.plain(4, 3, 8), "layer 0 has 3 KV heads of 8 channels in the layout"),
        ({"format": 9}, "layout format 9"),
    ],
)
def test_a_layout_of_another_model_is_refused(layout, line):
    with pytest.raises(ValueError) as caught:
        FoldConfig(**SMALL, layout=layout)
    assert line in str(caught.value) and "\n" not in str(caught.value)
