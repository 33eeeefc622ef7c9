"""Other projects' grammars for shared layers: read, and refused where they are unsound."""

import pytest

from kvfold.layout.hf_config import layer_windows, read_sharing
from kvfold.layout.kvlayout import KVLayout


def test_lckv_marks_sliding_layers():
    assert layer_windows({"layer_types": "0_0_2s_2s", "sliding_window": 8}, 4) == (None, None, 8, 8)


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
