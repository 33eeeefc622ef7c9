"""What holds for every layout: it survives JSON, copies and its own text forms, and its look-ups agree."""

import copy
import json
import pickle
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from kvfold.layout.kvlayout import KVLayout, LayerKV
from kvfold.methods.bits import BitsSpec
from kvfold.methods.registry import parse_time

TIMES = ["full", "window:8+2", "window:25%+0", "h2o:4+4", "h2o:12%+13%", "tova:6", "dmc:12", "dmc:inf", "dms:16"]
BITS = ["model", "fp8", "int8", "int4", "int8,int4", "model,int4"]


@st.composite
def layouts(draw, max_layers: int = 9) -> KVLayout:
    """Any owner map, windows and head shapes that differ between groups, any specs."""
    layers: list[LayerKV] = []
    for index in range(draw(st.integers(1, max_layers))):
        owner = draw(st.sampled_from([*sorted({layer.owner for layer in layers}), index]))
        if owner == index:
            layer = LayerKV(
                owner=index,
                num_kv_heads=draw(st.sampled_from([1, 2, 3, 4])),
                head_dim=draw(st.sampled_from([16, 45, 64])),
                window=draw(st.sampled_from([None, None, 7])),
            )
        else:
            layer = layers[owner]
        layers.append(replace(layer, owner=owner))
    num_owners = len({layer.owner for layer in layers})
    some = {"min_size": num_owners, "max_size": num_owners}
    return KVLayout(
        layers=tuple(layers),
        time=tuple(map(parse_time, draw(st.lists(st.sampled_from(TIMES), **some)))),
        bits=tuple(map(BitsSpec.parse, draw(st.lists(st.sampled_from(BITS), **some)))),
    )


@given(layouts())
def test_json_round_trip(layout):
    assert KVLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@given(layouts())
def test_text_round_trips(layout):
    every_layer_owns = replace(
        layout,
        layers=tuple(replace(layer, owner=index) for index, layer in enumerate(layout.layers)),
        time=(parse_time("full"),) * layout.num_layers,
        bits=(BitsSpec(),) * layout.num_layers,
    )
    parsed = KVLayout.parse(layout.layers_text(), every_layer_owns)
    assert parsed == layout.base()
    assert parsed.with_time(layout.time_text()).with_bits(layout.bits_text()) == layout
    assert layout.with_time(layout.time_text()).with_bits(layout.bits_text()) == layout


@given(layouts())
def test_copies_are_equal_and_work(layout):
    for twin in (copy.deepcopy(layout), pickle.loads(pickle.dumps(layout)), replace(layout)):
        assert twin == layout and hash(twin) == hash(layout)
        assert [twin.time_of(owner) for owner in twin.owners] == [layout.time_of(owner) for owner in layout.owners]


@given(layouts())
def test_look_ups_agree(layout):
    assert sorted(layer for owner in layout.owners for layer in layout.readers_of(owner)) == list(
        range(layout.num_layers)
    )
    assert list(layout.owners) == sorted(layout.owners)
    for place, owner in enumerate(layout.owners):
        readers = layout.readers_of(owner)
        assert readers[0] == owner and list(readers) == sorted(readers)
        assert layout.last_reader(owner) == max(
            layer for layer in range(layout.num_layers) if layout.owner_of(layer) == owner
        )
        assert layout.index_of(owner) == place
        assert layout.bits_of(owner) == layout.bits[place]
        window = layout.layers[owner].window
        asked = layout.time[place]
        if asked == parse_time("full") and window is not None:
            assert layout.time_of(owner) == parse_time(f"window:{window}+0")
        else:
            assert layout.time_of(owner) == asked
    for layer in range(layout.num_layers):
        assert layout.is_owner(layer) == (layout.owner_of(layer) == layer)


@given(layouts())
def test_base_folds_nothing_along_time_and_bits(layout):
    base = layout.base()
    assert base.layers == layout.layers
    assert set(base.time) == {parse_time("full")} and set(base.bits) == {BitsSpec()}
    assert base.base() == base
