"""KVLayout: what it accepts, and what the axes' texts do to it."""

import pytest

from kvfold.layout.kvlayout import KVLayout, LayerKV
from kvfold.methods.bits import BitsSpec
from kvfold.methods.registry import parse_time
from kvfold.methods.window import Full


@pytest.fixture
def mixed():
    """Sliding and full layers in turn, sharing within their kind."""
    return KVLayout.parse("0_1_2_3_2_3", KVLayout.plain(6, 8, 64, (16, None) * 3))


def layer(owner, **changes):
    return LayerKV(**{"owner": owner, "num_kv_heads": 4, "head_dim": 64, "window": None} | changes)


def build(*layers):
    num_owners = len({one.owner for one in layers})
    return KVLayout(layers=layers, time=(Full(),) * num_owners, bits=(BitsSpec(),) * num_owners)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ((), "1 layer or more"),
        ((layer(1), layer(1)), "never above its readers"),
        ((layer(0), layer(0), layer(1)), "an owner owns itself"),
        ((layer(0), layer(0, window=8)), "a group has one of each"),
        ((layer(0), layer(0, num_kv_heads=2)), "a group has one of each"),
        ((layer(0), layer(0, head_dim=32)), "a group has one of each"),
        ((layer(0), layer(5)), "use 0 to 1"),
    ],
)
def test_unsound_layers_are_refused(layers, says):
    with pytest.raises(ValueError, match=says):
        build(*layers)


@pytest.mark.parametrize(
    "changes", [{"num_kv_heads": 0}, {"head_dim": -1}, {"window": 0}, {"window": 2.5}, {"owner": None}]
)
def test_unsound_numbers_are_refused(changes):
    with pytest.raises(ValueError, match="whole number"):
        layer(**{"owner": 0} | changes)


def test_one_spec_per_owner():
    with pytest.raises(ValueError, match="2 time entries for 1 owners"):
        KVLayout(layers=(layer(0), layer(0)), time=(Full(),) * 2, bits=(BitsSpec(),))


def test_time_for_all_goes_to_full_attention_owners_only(mixed):
    folded = mixed.with_time("h2o:4+4")
    assert [folded.time_of(owner).format() for owner in folded.owners] == ["window:16+0", "h2o:4+4"] * 2
    assert folded.time_text() == "h2o:4+4"
    assert folded.with_time("full") == mixed


def test_a_named_sliding_owner_gets_what_it_names_and_keeps_its_window(mixed):
    folded = mixed.with_time("h2o:4+4; 2=tova:5")
    assert folded.time_of(2) == parse_time("tova:5")
    assert folded.layers[2].window == 16
    assert folded.time_of(0) == parse_time("window:16+0")
    assert folded.time_text() == "h2o:4+4; 2=tova:5"


def test_parts_name_ranges_and_lists_and_the_last_wins(mixed):
    folded = mixed.with_time("h2o:4+4; 0-3=full; 1=dms:8")
    assert [spec.format() for spec in folded.time] == ["full", "dms:8", "full", "full"]
    assert mixed.with_time("tova:9; 1, 3 = full") == mixed
    assert [spec.format() for spec in mixed.with_bits("int8; 0-1=model").bits] == ["model", "model", "int8", "int8"]
    assert mixed.with_bits("int8,int4; 2=fp8").bits_text() == "int8,int4; 2=fp8"


def test_parts_alone_leave_the_rest_as_it_was(mixed):
    folded = mixed.with_time("tova:9").with_time("1=full")
    assert [spec.format() for spec in folded.time] == ["full", "full", "full", "tova:9"]
    assert mixed.with_bits("int8").with_bits("3=int4").bits_text() == "int8; 3=int4"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("full; 4=full", "layer 4 stores nothing, it reads layer 2: name an owner: 0, 1, 2, 3"),
        ("full; 0-6=full", "no layer 6"),
        ("full; 3-1=full", "no layer or range"),
        ("full; x=full", "no layer or range"),
        ("full; h2o:4+4", "only the first part may hold for all"),
        ("full; 0=", "a part is empty"),
        ("full;", "a part is empty"),
        ("full; 0=fulll", "did you mean 'full'"),
    ],
)
def test_bad_parts_are_refused_in_one_line(mixed, text, says):
    with pytest.raises(ValueError) as refusal:
        mixed.with_time(text)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_heads_merge_downwards_in_equal_groups(mixed):
    assert {one.num_kv_heads for one in mixed.with_heads(2).layers} == {2}
    assert mixed.with_heads(8) == mixed
    for num_kv_heads in (0, 3, 16, -1):
        with pytest.raises(ValueError, match="use 1, 2, 4, 8"):
            mixed.with_heads(num_kv_heads)


def test_sharing_keeps_the_remaining_owners_specs():
    folded = KVLayout.plain(4, 4, 64).with_time("h2o:4+4; 2=dms:16").with_bits("int8; 0=model")
    shared = KVLayout.parse("cla2", folded)
    assert (shared.time_text(), shared.bits_text()) == ("h2o:4+4; 2=dms:16", "model; 2=int8")


def test_owners_are_given_one_per_layer():
    with pytest.raises(ValueError, match="3 owners for 4 layers"):
        KVLayout.plain(4, 4, 64).with_owners([0, 0, 0])
    with pytest.raises(ValueError, match="never above its readers"):
        KVLayout.plain(4, 4, 64).with_owners([0, 0, 7, 0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "layout format 2: this kvfold reads format 1: update kvfold"),
        ({"format": None}, "layout format None: this kvfold reads format 1: write the layout again"),
        ({"layers": [{"owner": 0}]}, "missing or unknown part"),
        ({"layers": [{"owner": 0, "num_kv_heads": 1, "head_dim": 1, "window": None, "hue": 1}]}, "missing or unknown"),
        ({"layers": [{"owner": 0, "num_kv_heads": 1, "head_dim": 1, "rope": 1}]}, "rope 1: it names a kind of rotary"),
        ({"time": None}, "missing or unknown part"),
        ({"time": [3]}, "missing or unknown part"),
        ({"time": ["h2o:4+4", "full"]}, "2 time entries"),
        ({"bits": ["int3"]}, "unknown storage"),
    ],
)
def test_foreign_json_is_refused_in_one_line(change, says):
    data = KVLayout.plain(1, 4, 64).to_json() | change
    with pytest.raises(ValueError) as refusal:
        KVLayout.from_json(data)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_is_no_json_object_is_refused():
    with pytest.raises(ValueError, match="layout format 'list'"):
        KVLayout.from_json([])
