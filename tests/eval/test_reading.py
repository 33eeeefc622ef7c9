import pytest
import torch

from kvfold.cache.hf import Usage
from kvfold.eval.reading import Reading, calls, method_about, read_rows
from kvfold.layout.kvlayout import KVLayout

PLAIN = KVLayout.plain(2, 2, 8)


@pytest.mark.parametrize("method", ["full", "window:3+1", "h2o:2+2", "tova:5", "tova:50%"])
def test_states_come_in_order_and_the_cache_is_free_afterwards(model, method):
    ids = torch.arange(60).view(2, 30) + 40
    layout, got = model.config.layout.with_time(method), []
    reading = read_rows(model, layout, ids, lambda states, start: got.append((start, states)), call_tokens=8)
    starts = [start for start, _ in got]
    assert starts == [start for start, _ in calls(layout, 30, 8)]
    assert torch.cat([states for _, states in got], dim=1).shape == (2, 30, model.config.hidden_size)
    assert reading.seen_tokens[-1] == 30
    spec = layout.time_of(0)
    assert reading.kept_share[-1] == pytest.approx(spec.max_kept(30) / 30)
    assert reading.allocated_bytes <= reading.full_bytes


def test_an_error_on_the_way_leaves_the_model_as_it_was(model):
    def fail(states, start):
        raise RuntimeError("stop")

    before = model.config.layout
    with pytest.raises(RuntimeError, match="stop"):
        read_rows(model, before.with_time("tova:4"), torch.arange(20).view(1, 20), fail)
    assert model.config.layout is before
    assert not torch.is_inference_mode_enabled()


NOTHING = Usage(entries=0, waiting=0, rounding=0, rings=0, books=0)


def test_calls_are_large_until_a_steps_method_may_drop():
    assert list(calls(PLAIN.with_time("window:2+1"), 20, 8)) == [(0, 8), (8, 16), (16, 20)]
    assert list(calls(PLAIN.with_time("tova:9"), 12, 8)) == [(0, 8), (8, 9), (9, 10), (10, 11), (11, 12)]
    assert list(calls(PLAIN.with_time("full; 1=tova:1"), 4, 2)) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert list(calls(PLAIN, 130)) == [(0, 64), (64, 128), (128, 130)]


def test_compression_over_time_takes_what_is_kept_between_calls_as_growing_evenly():
    each = {"allocated_bytes": 0, "full_bytes": 0, "usage": NOTHING, "seconds": 0.0}
    every = Reading(kept_share=(1.0, 1.0, 2 / 3, 0.5), seen_tokens=(1, 2, 3, 4), **each)
    assert every.kept_share[-1] == 0.5
    assert every.compression_over_time == pytest.approx((1 + 1 + 1.5 + 2) / 4)
    sparse = Reading(kept_share=(1.0, 0.5), seen_tokens=(2, 4), **each)
    assert sparse.compression_over_time == pytest.approx(every.compression_over_time)


def test_a_method_is_named_by_its_spec():
    assert method_about(PLAIN.with_time("tova:4")) == {"method": "tova:4", "title": "TOVA", "trained": False}
    assert method_about(PLAIN.with_time("full; 1=dmc")) == {
        "method": "full; 1=dmc:12",
        "title": "mixed",
        "trained": True,
    }
    sliding = KVLayout.plain(2, 2, 8, [None, 4]).with_time("tova:4")
    assert method_about(sliding)["title"] == "TOVA"
