"""Models in which some layers have rotary positions and others have none, or have others: a key is rotated once, for all
who read it, so a group is of one kind. Whatever names a group that is not says so before anything is read or written.
"""

import json
from pathlib import Path

import pytest
import torch

import kvfold
from kvfold.convert.chosen_layers import chosen_layers
from kvfold.convert.conversion import Conversion, convert
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.gates import CallOptions
from kvfold.train.settings import RetrofitSettings
from kvfold.train.student import widest_layout

MIXING = ["cla2", "cla2-keep-ends", "cla2-dense-front", "yoco", "0_0_2_3", "0_1_2_0"]
"""Maps of four layers, of which 1 and 3 have no rotary positions."""


@pytest.fixture
def source(pair, tmp_path) -> Path:
    """A folder of a tiny SmolLM3."""
    pair("smollm3", no_rope_layer_interval=2)[1].save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("layers", MIXING)
def test_a_map_that_mixes_is_one_line_and_nothing_is_written(layers, source, tmp_path):
    plain = KVLayout.plain(4, 2, 16)
    assert KVLayout.parse(layers, plain)
    for refused in (
        lambda: convert(source, tmp_path / "out", Conversion(layers=layers, init="drop")),
        lambda: kvfold.plan(str(source), layers=layers),
    ):
        with pytest.raises(ValueError, match="rotary positions") as error:
            refused()
        assert "\n" not in str(error.value) and f"layers '{layers}'" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("layers", MIXING)
def test_training_and_single_calls_refuse_it_too(layers, source):
    model, asked = kvfold.load(source), KVLayout.parse(layers, KVLayout.plain(4, 2, 16))
    with pytest.raises(ValueError, match="rotary positions"):
        model(torch.tensor([[5, 6]]), use_cache=False, options=CallOptions(sharing=asked))
    with pytest.raises(ValueError, match="rotary positions"):
        widest_layout(model, RetrofitSettings(trains="full", drawn_layers=layers))
    with pytest.raises(ValueError, match="rotary positions"):
        model.config.layout = asked


@pytest.mark.parametrize(
    "keys",
    [
        {"kv_source_layers": [0, 0, 2, 2]},
        {"num_kv_shared_layers": 1},
        {"sharing_pattern": [0, 0, 2, 3]},
        {"use_cla": True, "cla_share_factor": 2},
    ],
    ids=str,
)
def test_a_checkpoint_that_mixes_is_refused(keys, source):
    """Also where the last layers read the nearest before them: transformers does not tell layers apart by rotation."""
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    for refused in (kvfold.load, lambda name: kvfold.plan(str(name))):
        with pytest.raises(ValueError, match="rotary positions") as error:
            refused(source)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("layers", ["0_1_0_1", "trailing:2", "0_1_0_3", "best:2"])
def test_layers_of_one_kind_share(layers, source, ids, tmp_path):
    """As the unshared model gives where its layers read those keys and values for one call."""
    plain = kvfold.load(source)
    if layers == "best:2":
        layers = chosen_layers(plain, torch.cat((ids, ids, ids)), 2)
        assert layers == "0_1_0_1"
    model = convert(source, tmp_path / "out", Conversion(layers=layers, init="drop"))
    asked = KVLayout.parse(layers, plain.config.layout)
    assert model.config.layout == asked == kvfold.plan(str(source), layers=layers).layout
    assert kvfold.load(tmp_path / "out").config.layout == asked
    with torch.no_grad():
        ours = kvfold.load(tmp_path / "out")(ids).logits
        theirs = plain(ids, use_cache=False, options=CallOptions(sharing=asked)).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_folder_of_before_learns_its_rotation_from_the_config(source, tmp_path):
    """Layouts of earlier versions did not say which layers have none."""
    convert(source, tmp_path / "out", Conversion(layers="trailing:2", init="drop"))
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    written = config["layout"]["layers"]
    assert [layer.pop("rope", "default") for layer in written] == ["default", "none"] * 2
    path.write_text(json.dumps(config))
    assert [layer.rope for layer in kvfold.load(tmp_path / "out").config.layout.layers] == ["default", "none"] * 2


def test_attention_types_that_turn_otherwise_do_not_share_even_without_a_window(pair, tmp_path):
    rope = {
        kind: {"rope_type": "default", "rope_theta": theta}
        for kind, theta in (("full_attention", 1e4), ("sliding_attention", 1e6))
    }
    types = ["full_attention", "sliding_attention"] * 2
    theirs = pair("gemma3_text", layer_types=types, sliding_window=None, rope_parameters=rope)[1]
    theirs.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="rotary positions"):
        convert(tmp_path / "source", tmp_path / "out", Conversion(layers="cla2", init="drop"))
    assert convert(tmp_path / "source", tmp_path / "out", Conversion(layers="trailing:2", init="drop"))
