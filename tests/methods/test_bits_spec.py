"""Storage of kept entries: text forms and bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.methods.bits import BitsSpec

storages = st.sampled_from(["model", "fp8", "int8", "int4"])
bits_specs = st.builds(BitsSpec, k=storages, v=storages)


@given(bits_specs)
def test_format_and_parse_are_inverse(spec):
    assert BitsSpec.parse(spec.format()) == spec


def test_keys_and_values_apart():
    assert BitsSpec.parse("int8") == BitsSpec(k="int8", v="int8")
    assert BitsSpec.parse(" int8 , int4 ") == BitsSpec(k="int8", v="int4")
    assert BitsSpec() == BitsSpec.parse("model")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("model", (128, 128)), ("fp8", (64, 64)), ("int8", (68, 68)), ("int4", (36, 36)), ("int8,int4", (68, 36))],
)
def test_bytes_at_head_dim_64(text, expected):
    assert BitsSpec.parse(text).slot_bytes(64, 2) == expected


def test_odd_head_dims_round_up():
    assert BitsSpec.parse("int8,int4").slot_bytes(45, 2) == (45 + 4, 23 + 4)
    assert BitsSpec.parse("model").slot_bytes(45, 4) == (180, 180)


@pytest.mark.parametrize(
    ("text", "says"), [("int3", "unknown storage 'int3'"), ("int8,int4,fp8", "once, or"), ("", "storage")]
)
def test_refusals_are_one_line(text, says):
    with pytest.raises(ValueError) as refusal:
        BitsSpec.parse(text)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)
