"""Other projects' grammars for shared layers: read, written, and refused where they can't say it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.sharing_formats import GRAMMARS, read_sharing, read_sliding, write_sharing


@st.composite
def shared_layouts(draw):
    windows = tuple(draw(st.lists(st.sampled_from([None, 8]), min_size=1, max_size=8)))
    owners = []
    for index, window in enumerate(windows):
        group = [owner for owner in dict.fromkeys(owners) if windows[owner] == window]
        owners.append(draw(st.sampled_from([*group, index])))
    return KVLayout.plain(len(windows), 2, 16, windows).with_owners(owners)


def unshared(layout):
    return KVLayout.plain(layout.num_layers, 2, 16, [layer.window for layer in layout.layers])


@pytest.mark.parametrize("grammar", GRAMMARS)
@given(layout=shared_layouts())
def test_what_is_written_is_read_again(grammar, layout):
    try:
        config = write_sharing(layout, grammar)
    except ValueError as refusal:
        assert "write kv_source_layers instead" in str(refusal)
        assert grammar not in ("kv_source_layers", "lckv")
        return
    assert read_sharing(config, unshared(layout)) == layout


@given(layout=shared_layouts())
def test_lckv_marks_sliding_layers(layout):
    assert read_sliding(write_sharing(layout, "lckv")) == [layer.window is not None for layer in layout.layers]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"kv_source_layers": [0, 1, 0, 3, 1, 3]}, [0, 1, 0, 3, 1, 3]),
        ({"num_kv_shared_layers": 2}, [0, 1, 2, 3, 3, 3]),
        ({"layer_types": "0_0_2_2_4_4"}, [0, 0, 2, 2, 4, 4]),
        ({"layer_types": ["full_attention"] * 6}, [0, 1, 2, 3, 4, 5]),
        ({"sharing_pattern": [0, 0, 0, 3, 3, 5]}, [0, 0, 0, 3, 3, 5]),
        ({"use_cla": True, "cla_share_factor": 4}, [0, 0, 0, 0, 4, 4]),
        ({"use_cla": False, "cla_share_factor": 2}, [0, 1, 2, 3, 4, 5]),
        ({"use_cla": True}, [0, 1, 2, 3, 4, 5]),
        ({"num_kv_shared_layers": 0, "kv_source_layers": None, "sharing_pattern": None}, [0, 1, 2, 3, 4, 5]),
        ({"sharing_pattern": [0, 0, 2, 2, 4, 4], "kv_source_layers": [0, 0, 2, 2, 4, 4]}, [0, 0, 2, 2, 4, 4]),
    ],
)
def test_grammars_are_read(config, expected):
    layout = read_sharing(config, KVLayout.plain(6, 2, 16))
    assert [layout.owner_of(layer) for layer in range(6)] == expected


def test_the_last_layers_read_the_last_owner_of_their_own_type():
    layout = read_sharing({"num_kv_shared_layers": 3}, KVLayout.plain(8, 2, 16, (8, 8, 8, None) * 2))
    assert [layout.owner_of(layer) for layer in range(8)] == [0, 1, 2, 3, 4, 4, 4, 3]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"kv_source_layers": [0, 0, 1, 3, 4, 5]}, "an owner owns itself"),
        ({"kv_source_layers": [0, 0]}, "2 owners for 6 layers"),
        ({"kv_source_layers": "0_0_2_2_4_4"}, "a list of layer numbers"),
        ({"layer_types": "0_5_5_5_5_5"}, "never above its readers"),
        ({"num_kv_shared_layers": 6}, "does not fit"),
        ({"use_cla": True, "cla_share_factor": 0}, "cla_share_factor 0"),
        ({"use_cla": True, "cla_share_factor": 2, "num_kv_shared_layers": 3}, "owner maps that differ"),
    ],
)
def test_unsound_sharing_is_refused_in_one_line(config, says):
    with pytest.raises(ValueError) as refusal:
        read_sharing(config, KVLayout.plain(6, 2, 16))
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_dolomite_can_not_go_back():
    layout = KVLayout.parse("0_1_1_1_4_0", KVLayout.plain(6, 2, 16))
    with pytest.raises(ValueError, match=r"'0_1_1_1_4_0': dolomite.* layer 5 reads 0 after 4"):
        write_sharing(layout, "dolomite")


def test_hunyuan_counts_groups_from_layer_0():
    assert write_sharing(KVLayout.parse("cla2", KVLayout.plain(6, 2, 16)), "hunyuan") == {
        "use_cla": True,
        "cla_share_factor": 2,
    }
    with pytest.raises(ValueError, match="groups of one size"):
        write_sharing(KVLayout.parse("cla2", KVLayout.plain(5, 2, 16)), "hunyuan")


def test_an_unknown_grammar_is_named():
    with pytest.raises(ValueError, match="did you mean 'dolomite'"):
        write_sharing(KVLayout.plain(2, 2, 16), "dolomit")
