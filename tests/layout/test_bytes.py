"""The byte arithmetic, against sums written out by hand, and the inverses of a plan."""

from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import (
    LENGTH_BYTES,
    PAGE_OVERHEAD_BYTES,
    PAGE_SLOTS,
    POSITION_BYTES,
    SEQUENCE_BYTES,
    PageClass,
    layout_bytes,
    page_bytes,
    page_classes,
    plan,
)

TINY = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "dtype": "float32"}
SLIDING = TINY | {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"] * 2}

times = st.sampled_from(
    ["full", "window:8+2", "window:25%+3", "h2o:4+4", "h2o:30%+30%; 1=full", "tova:20%", "dmc:12", "dmc:inf", "dms:16"]
)
folds = st.fixed_dictionaries(
    {
        "time": times,
        "bits": st.sampled_from(["model", "fp8", "int8,int4", "int4; 1=model"]),
        "layers": st.sampled_from(["full", "trailing:2", "trailing:1"]),
        "heads": st.sampled_from([1, 2, 4]),
        "page_slots": st.sampled_from([1, 16, 32]),
    }
)
plans = st.builds(lambda config, fold: plan(config, **fold), st.sampled_from([TINY, SLIDING]), folds)


def page(slots, k_bytes, v_bytes, state=0):
    return slots * (k_bytes + v_bytes + 4 + state) + 40


def test_the_terms():
    assert (PAGE_SLOTS, POSITION_BYTES, PAGE_OVERHEAD_BYTES, LENGTH_BYTES, SEQUENCE_BYTES) == (16, 4, 40, 4, 8)


def test_full_attention_by_hand():
    # 4 layers x 4 heads of 16 channels in fp32; 17 tokens are 2 pages, 16 are 1, 0 are none.
    layout = KVLayout.plain(4, 4, 16)
    lanes = 4 * 4
    assert layout_bytes(layout, [17, 16, 0], 4) == lanes * (3 * page(16, 64, 64) + 3 * 4) + 3 * 8
    assert layout_bytes(layout, [], 4) == 0


def test_every_axis_by_hand():
    layout = KVLayout.parse("cla2", KVLayout.plain(4, 4, 16)).with_heads(2).with_time("h2o:8+9; 2=dmc:3")
    layout = layout.with_bits("int8,int4")
    one_page = page(16, 16 + 2, 8 + 2, state=4)  # both owners share a class: the score is reserved in all of its pages
    h2o, dmc = 2 * (4 + 2 * one_page), 2 * (4 + 3 * 33 * 4 + 7 * one_page)
    assert layout_bytes(layout, [100], 4) == 8 + h2o + dmc


def test_slot_state_is_that_of_the_class():
    layout = KVLayout.plain(2, 4, 16).with_time("h2o:8+8; 1=full").with_bits("model; 1=int8")
    classes = page_classes(layout)
    assert classes == {
        PageClass(head_dim=16, k="model", v="model"): 4,
        PageClass(head_dim=16, k="int8", v="int8"): 0,
    }
    sizes = [page_bytes(one, 16, model_bytes=2, slot_state_bytes=state) for one, state in classes.items()]
    assert sizes == [page(16, 32, 32, 4), page(16, 18, 18)]


def test_a_sliding_owner_is_counted_as_its_window():
    layout = KVLayout.plain(1, 1, 16, (20,))
    assert layout_bytes(layout, [1000], 4) == 8 + 4 + 2 * page(16, 64, 64)


@given(plans, st.lists(st.integers(0, 300), max_size=5), st.integers(0, 4))
def test_more_tokens_never_cost_less(one, seen, place):
    more = [tokens + (index == place) for index, tokens in enumerate(seen)]
    assert one.bytes(seen) <= one.bytes(more)
    assert one.bytes(seen) == sum(one.bytes([tokens]) for tokens in seen)


@settings(max_examples=200)
@given(plans, st.integers(0, 10**7), st.integers(0, 500))
def test_max_rows_is_the_last_number_that_fits(one, memory_bytes, context_tokens):
    rows = one.max_rows(memory_bytes, context_tokens)
    assert rows * one.bytes([context_tokens]) <= memory_bytes < (rows + 1) * one.bytes([context_tokens])
    assert one.bytes([context_tokens] * min(rows, 20)) <= memory_bytes


@settings(max_examples=200)
@given(plans, st.integers(0, 10**7), st.integers(1, 5))
def test_max_context_is_the_last_length_that_fits(one, memory_bytes, rows):
    tokens = one.max_context_tokens(memory_bytes, rows)
    if tokens is None:
        assert one.bytes([10**9] * rows) <= memory_bytes
        return
    assert tokens == 0 or one.bytes([tokens] * rows) <= memory_bytes
    assert one.bytes([tokens + 1] * rows) > memory_bytes
    if tokens:
        assert one.max_rows(memory_bytes, tokens) >= rows > one.max_rows(memory_bytes, tokens + 1)


def test_a_bounded_cache_reads_as_much_as_the_model_was_made_for():
    config = TINY | {"max_position_embeddings": 2048}
    assert plan(config, time="tova:32").max_context_tokens(10**6, 1) == 2048
    assert plan(config, time="tova:32").max_context_tokens(10, 1) == 0
    assert plan(TINY, time="tova:32").max_context_tokens(10**6, 1) is None
    assert plan(config).max_context_tokens(10**9, 1) > 2048


def test_compression_is_in_bytes_against_the_base():
    plain, folded = plan("llama-2-7b"), plan("llama-2-7b", layers="cla2", bits="int8", heads=8)
    assert plain.compression(4096) == 1
    assert folded.bytes_per_token * (2 * 4) * 256 == plain.bytes_per_token * (128 + 8)
    assert folded.compression(4096) == plain.bytes([4096]) / folded.bytes([4096])
    assert plan("llama-2-7b", time="dms").compression(4096) < 1  # an upper bound: the gates alone know how much goes


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda one: one.max_rows(-1, 5), "memory_bytes -1"),
        (lambda one: one.max_rows(5, -1), "context_tokens -1"),
        (lambda one: one.max_context_tokens(-1, 1), "memory_bytes -1"),
        (lambda one: one.max_context_tokens(5, 0), "rows 0"),
        (lambda one: plan(TINY, page_slots=0), "page_slots 0"),
    ],
)
def test_amounts_are_checked(call, says):
    with pytest.raises(ValueError, match=says):
        call(plan(TINY))


def test_thousands_of_rows_are_planned_at_once():
    one = plan("llama-2-70b", time="h2o:64+64")
    started = perf_counter()
    one.bytes(list(range(50_000)))
    assert perf_counter() - started < 5
