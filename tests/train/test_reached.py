"""The compression of a training batch is what a cache really holds at the end of its sequences."""

import pytest
import torch

from kvfold.eval.reading import entry_bytes, kept_shares
from kvfold.train.objectives import KeptAtEnd, kept_tokens
from kvfold.train.settings import RetrofitSettings
from kvfold.train.student import make_student
from tiny_model import tiny_model

IDS = torch.randint(0, 200, (3, 40), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "given",
    [{"time": "dms:5"}, {"time": "dms:5", "reads": "next"}, {"time": "dms:60", "compression": 1.0},
     {"time": "dmc:3", "trains": "full"}, {"time": "dmc:inf", "trains": "full"}, {"time": "dms:5; 0=full", "compression": 1.3},
     {"time": "dms:5; 1=dms:9"}, {"time": "dms:5; 1=window:8+2"}, {"time": "1=dmc:3", "trains": "full", "compression": 1.3}],
    ids=["own", "next", "longer delay", "dmc", "dmc unbounded", "beside full", "two delays", "beside a window", "one of two"],
)  # fmt: skip
def test_it_is_what_the_cache_keeps(given):
    model = tiny_model()
    settings = RetrofitSettings(**({"compression": 2.0, "seq_len": 40} | given))
    make_student(model, settings)
    model.eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("fold_proj.weight"):
                weight.copy_(torch.randn(weight.shape, generator=draw) * 0.03)
        said = model(IDS, use_cache=False, output_decisions=True)
        cache = model.new_cache(rows=3)
        model(IDS, past_key_values=cache)
    from_next = given.get("reads") == "next"
    assert any(0 < one.mean() < 1 for one in said.decisions if one is not None)
    for place, owner in enumerate(model.config.layout.owners):
        spec = model.config.layout.time_of(owner)
        assert (said.decisions[place] is not None) == spec.trained
        if not spec.trained:
            continue
        ours = kept_tokens(said.decisions[place], spec, from_next=from_next)
        assert ours.tolist() == cache.kept_tokens[place].tolist()
    found = KeptAtEnd(model.config.layout, from_next=from_next).shares(said.decisions)
    layout = model.config.layout
    assert float(found["kept"]) == pytest.approx(
        kept_shares(cache, entry_bytes(layout, 4, cache.store.device)).mean().item()
    )
    gated = [place for place, owner in enumerate(layout.owners) if layout.time_of(owner).trained]
    assert found["kept_O"].tolist() == pytest.approx((cache.kept_tokens[gated].float().mean(dim=(1, 2)) / 40).tolist())
