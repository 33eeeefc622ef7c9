"""Which layers may share: the cheapest cut against all cuts, costs against a slow reference, and a search that goes on."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold.convert import chosen_layers as subject
from kvfold.convert.chosen_layers import cheapest_owners, check_choice, chosen_layers, group_costs, layer_kinds
from kvfold.convert.conversion import Conversion, converted_model, new_config
from kvfold.convert.fitted import Fit, Streams, do_layer
from kvfold.layout.kvlayout import KVLayout
from tiny_model import tiny_model

IDS = torch.randint(5, 90, (12, 40), generator=torch.Generator().manual_seed(0))


def cut_in_all_ways(kinds):
    """Every owner map whose groups are neighbours of one kind: the slow, obvious enumeration."""
    runs = [[layer for layer, one in enumerate(kinds) if one == kind] for kind in dict.fromkeys(kinds)]
    maps = [{}]
    for run in runs:
        grown = []
        for number in range(len(run)):
            for borders in combinations(range(1, len(run)), number):
                parts = [run[a:b] for a, b in zip((0, *borders), (*borders, len(run)), strict=True)]
                grown += [old | {layer: part[0] for part in parts for layer in part} for old in maps]
        maps = grown
    return [[one[layer] for layer in range(len(kinds))] for one in maps]


def price(costs, owners):
    groups = [tuple(layer for layer, own in enumerate(owners) if own == owner) for owner in sorted(set(owners))]
    found = [costs.get(group, None if len(group) > 1 else 0.0) for group in groups]
    return None if None in found else sum(found)


@given(st.data())
def test_the_cheapest_of_all_cuts_is_found(data):
    kinds = data.draw(st.lists(st.sampled_from("ab"), min_size=2, max_size=7))
    most = data.draw(st.integers(2, 4))
    groups = subject._groups(kinds, most)
    costs = {group: data.draw(st.floats(0, 10)) for group in groups}
    for owners in range(1, len(kinds)):
        prices = [price(costs, one) for one in cut_in_all_ways(kinds) if len(set(one)) == owners]
        prices = [one for one in prices if one is not None]
        if prices:
            assert price(costs, cheapest_owners(costs, kinds, owners)) == pytest.approx(min(prices))
        else:
            with pytest.raises(ValueError, match="at the least: ask for"):
                cheapest_owners(costs, kinds, owners)


def slow_cost(model, group) -> float:
    """The model converted and fitted in that group alone, and called as any model is."""
    owners = [group[0] if layer in group else layer for layer in range(model.config.num_hidden_layers)]
    wanted = Conversion(layers="_".join(map(str, owners)), init="fitted")
    converted = converted_model(model, new_config(model.config, wanted), wanted)
    held = torch.arange(len(IDS)) % 3 == 2
    streams = Streams(model, converted, IDS[~held], 2)
    with torch.no_grad():
        for layer in range(group[-1] + 1):
            do_layer(streams, layer, Fit(feed_forward=False), fitting=layer in group)
        ours, theirs = (one(IDS[held], use_cache=False).logits.double().log_softmax(-1) for one in (converted, model))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def test_a_cost_is_that_of_the_model_with_this_group_shared():
    model = tiny_model(num_hidden_layers=4)
    costs = group_costs(model, IDS, most=3)
    assert set(costs) == {(0, 1), (1, 2), (2, 3), (0, 1, 2), (1, 2, 3)}
    for group in ((1, 2), (0, 1, 2)):
        assert costs[group] == pytest.approx(slow_cost(model, group), rel=1e-3)


def test_layers_that_need_nothing_of_their_own_are_chosen():
    """A layer whose attention says nothing may read any other."""
    model = tiny_model(num_hidden_layers=5)
    with torch.no_grad():
        model.model.layers[3].self_attn.o_proj.weight.zero_()
    assert chosen_layers(model, IDS, 4) in ("0_1_2_2_4", "0_1_2_3_3")
    costs = group_costs(model, IDS, most=2)
    assert max(costs[2, 3], costs[3, 4]) < 0.4 * min(costs[0, 1], costs[1, 2])


def test_a_search_goes_on_where_it_was_and_begins_anew_on_another_text(tmp_path, monkeypatch):
    model, measured = tiny_model(num_hidden_layers=4), []
    original = subject._Search._cost

    def noted(self, group, *rest):
        if len(measured) == 2:
            measured.append(None)
            raise KeyboardInterrupt
        measured.append(group)
        return original(self, group, *rest)

    monkeypatch.setattr(subject._Search, "_cost", noted)
    with pytest.raises(KeyboardInterrupt):
        chosen_layers(model, IDS, 2, folder=tmp_path / "kept")
    told = []
    found = chosen_layers(model, IDS, 2, folder=tmp_path / "kept", report=lambda *one: told.append(one))
    assert len([one for one in measured if one]) == len({one for one in measured if one}) == 5
    assert found == chosen_layers(model, IDS, 2) and told[-1][1:] == (5, 5)
    measured.clear()
    measured += [None] * 3
    chosen_layers(model, IDS + 1, 2, folder=tmp_path / "kept")
    assert len(measured) == 3 + 5


def test_only_layers_of_one_kind_share():
    config = tiny_model(num_hidden_layers=6).config
    config.layout = KVLayout.plain(6, 2, 8, windows=[4, None] * 3)
    kinds = layer_kinds(config)
    assert kinds[0] == kinds[2] != kinds[1] == kinds[3]
    assert subject._groups(kinds, 2) == [(0, 2), (1, 3), (2, 4), (3, 5)]
    with pytest.raises(ValueError, match=r"best:6': of 6 layers 1 to 5"):
        check_choice(config, 6)
    with pytest.raises(ValueError, match="come to 2 at the least: ask for 2 to 5"):
        check_choice(config, 1)


def test_what_can_not_be_asked_is_one_line():
    shared = tiny_model(num_hidden_layers=4).config
    shared.layout = KVLayout.parse("cla2", shared.layout)
    with pytest.raises(ValueError, match="layers 'cla2'"):
        check_choice(shared, 1)
    with pytest.raises(ValueError, match="2 windows of text"):
        group_costs(tiny_model(), IDS[:2], most=2)
