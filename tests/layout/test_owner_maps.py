"""Owner maps by name, for the paper's 20 layers and for any number."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.patterns import PATTERNS, check_owners, named_map, trailing


def plain(num_layers, windows=None):
    return KVLayout.plain(num_layers, 4, 64, windows)


def owners(text, num_layers, windows=None):
    layout = KVLayout.parse(text, plain(num_layers, windows))
    return [layout.owner_of(layer) for layer in range(num_layers)]


def test_cla_groups_put_the_short_one_first():
    assert owners("cla2", 6) == [0, 0, 2, 2, 4, 4]
    assert owners("cla2", 5) == [0, 1, 1, 3, 3]
    assert owners("cla3", 10) == [0, 1, 1, 1, 4, 4, 4, 7, 7, 7]
    assert owners("cla3", 20)[:5] == [0, 0, 2, 2, 2]
    assert owners("cla4", 7) == [0, 0, 0, 3, 3, 3, 3]


def test_the_papers_uneven_maps_at_20_layers():
    assert owners("cla2-keep-ends", 20) == [0, *(1 + 2 * (i // 2) for i in range(18)), 19]
    assert owners("cla2-dense-front", 20) == [*range(10), *[9] * 9, 19]
    assert owners("cla2-dense-back", 20) == [0, 1, *[1] * 9, *range(11, 20)]
    for text in ("cla2-keep-ends", "cla2-dense-front", "cla2-dense-back"):
        assert len(set(owners(text, 20))) == 11


def test_uneven_maps_at_other_depths():
    assert owners("cla2-keep-ends", 7) == [0, 1, 2, 2, 4, 4, 6]
    assert owners("cla2-dense-front", 5) == [0, 1, 1, 1, 4]
    assert owners("cla2-dense-back", 5) == [0, 1, 1, 3, 4]
    assert owners("yoco", 6) == [0, 1, 2, 3, 3, 3]
    assert owners("yoco", 5) == [0, 1, 2, 2, 2]


def test_trailing_layers_read_the_nearest_owner_of_their_own_kind():
    assert owners("trailing:3", 6) == [0, 1, 2, 2, 2, 2]
    windows = (8, 8, None, 8, 8, None, 8, None)
    assert owners("trailing:4", 8, windows) == [0, 1, 2, 3, 3, 2, 3, 2]


def test_explicit_maps():
    assert owners("0_0_2_2", 4) == [0, 0, 2, 2]
    assert owners("0_1_1_1_4_0", 6) == [0, 1, 1, 1, 4, 0]
    assert owners("0s_1_0s_1", 4, (8, None, 8, None)) == [0, 1, 0, 1]
    assert owners("0_1_0_1", 4, (8, None, 8, None)) == [0, 1, 0, 1]


@given(st.sampled_from(list(PATTERNS)), st.integers(1, 130))
def test_a_pattern_gives_a_sound_map_that_shares_or_says_that_it_does_not_fit(name, num_layers):
    try:
        found = named_map(name, num_layers)
    except ValueError as refusal:
        assert f"does not fit a model of {num_layers} layers" in str(refusal)
        return
    check_owners(found)
    assert len(found) == num_layers
    assert (len(set(found)) < num_layers) == (name != "full")


@given(st.lists(st.booleans(), min_size=2, max_size=40), st.data())
def test_trailing_gives_a_sound_map_or_says_that_it_does_not_fit(kinds, data):
    num_readers = data.draw(st.integers(1, len(kinds) - 1))
    try:
        found = trailing(kinds, num_readers)
    except ValueError as refusal:
        assert set(kinds[: len(kinds) - num_readers]) < set(kinds)
        assert "does not fit" in str(refusal)
        return
    check_owners(found)
    assert len(set(found)) == len(kinds) - num_readers
    assert all(kinds[owner] == kind for owner, kind in zip(found, kinds, strict=True))


@pytest.mark.parametrize(
    ("text", "num_layers", "windows", "says"),
    [
        ("cla5", 10, None, "did you mean 'cla"),
        ("trailing", 10, None, "did you mean 'trailing:N'"),
        ("cla4", 3, None, "does not fit a model of 3 layers"),
        ("cla2-keep-ends", 3, None, "does not fit a model of 3 layers"),
        ("cla2-dense-back", 3, None, "does not fit a model of 3 layers"),
        ("trailing:10", 10, None, "N is 1 to 9"),
        ("trailing:0", 10, None, "N is 1 to 9"),
        ("trailing:3", 4, (8, None, 8, None), "no layer below 1 is of the same kind"),
        ("0_0_2", 4, None, "it names 3 layers"),
        ("1_1", 2, None, "never above its readers"),
        ("0_0_1", 3, None, "write 0 for layer 2"),
        ("0_0s", 2, None, "'s' marks layer 1 as sliding"),
        ("cla2", 4, (8, None, 8, None), "differs in window, head shape or rotary positions"),
        ("0_0_2_ 2", 4, None, "unknown layer pattern"),
    ],
)
def test_refusals_are_one_line(text, num_layers, windows, says):
    with pytest.raises(ValueError) as refusal:
        owners(text, num_layers, windows)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", [*PATTERNS, "trailing:4", "0_0_0_3_3_3_0_0_8_9_8_9"])
def test_a_map_is_named_again(text):
    assert KVLayout.parse(text, plain(12)).layers_text() == text


def test_a_layer_without_keys_of_its_own_can_not_become_an_owner():
    shared = KVLayout.parse("cla2", plain(8))
    assert KVLayout.parse("cla4", shared).owners == (0, 4)
    with pytest.raises(ValueError, match="it reads layer 0 and has none: choose owners among 0, 2, 4, 6"):
        KVLayout.parse("full", shared)
