"""Which layers may share keys and values at the least cost: every group of neighbours is measured by itself, and those are
put together that lose least in all.

A group's cost is what the model loses when that group alone shares, its weights fitted (see `kvfold.convert.fitted`; not its
feed-forward blocks, for speed): KL from the model as it is, in nats, on windows that nothing was fitted on. Costs are taken
to add up. They do not quite: each group is measured below and above layers that still have everything.

Source: ours.
Differs: none.
Letters: W windows, B windows of one batch, T tokens, C model width.
"""

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kvfold.convert.conversion import Conversion, converted_model, new_config
from kvfold.convert.fitted import Fit, Streams, do_layer, fingerprint_of
from kvfold.errors import UserError
from kvfold.eval.progress import Report, silent
from kvfold.eval.reading import score
from kvfold.layout.patterns import explicit_text
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM
from kvfold.record import write_whole_file

Group = tuple[int, ...]
"""Layers that share, ascending; the first is the owner."""
Cuts = dict[int, tuple[float, tuple[Group, ...]]]
"""By the number of groups: the least that they cost together, and which they are."""

_WINDOWS, _TOKENS = 12, 512
"""What a cost is measured on, at most: a third of the windows is held out."""
_HELD_OUT = 3
_BATCH = 2
_FILE = "layer_costs.json"


def layer_kinds(config: FoldConfig) -> list[Hashable]:
    """What layers of one group have in common: shape, window, rotary positions, and what is kept along time and in bits.
    Raises `UserError` for a model that shares layers already.
    """
    layout = config.layout
    if len(layout.owners) < layout.num_layers:
        raise UserError(
            f"a model with layers '{layout.layers_text()}': which layers may share is asked of one that has keys and values "
            "in all: begin with the model that it was made from"
        )
    return [(layer.kind, layout.time_of(index), layout.bits_of(index)) for index, layer in enumerate(layout.layers)]


def group_costs(
    model: FoldForCausalLM, ids_WT: Tensor, *, most: int, folder: Path | None = None, report: Report = silent
) -> dict[Group, float]:
    """The cost of every group of 2 to `most` neighbours of one kind. `ids_WT`: windows of text, three or more. `folder`: where
    costs wait for a second start, for the caller to remove. Raises `UserError` for a model that shares layers already.
    """
    if len(ids_WT) < _HELD_OUT:
        raise UserError(
            f"{len(ids_WT)} windows of text: a third of them is held out, so 3 are the least: give more calibration text"
        )
    # Some windows, evenly spaced, and of each the beginning.
    cut_WT = ids_WT[:: max(1, len(ids_WT) // _WINDOWS)][:_WINDOWS, :_TOKENS]
    return _Search(model, cut_WT, folder).costs(_groups(layer_kinds(model.config), most), report)


def cheapest_owners(costs: Mapping[Group, float], kinds: Sequence[Hashable], owners: int) -> list[int]:
    """One owner per layer, `owners` of them in all, whose groups cost least together; a layer alone costs nothing.

    Raises `UserError` where groups as large as were measured do not come to so few.
    """
    best: Cuts = {0: (0.0, ())}
    for kind in dict.fromkeys(kinds):
        best = _cuts(costs, [layer for layer, one in enumerate(kinds) if one == kind], best)
    if owners not in best:
        raise UserError(
            f"{owners} layers that keep keys and values: neighbours of one kind come to {min(best)} at the least: ask for "
            f"{min(best)} to {max(best) - 1}"
        )
    found = {layer: group[0] for group in best[owners][1] for layer in group}
    return [found[layer] for layer in range(len(kinds))]


def chosen_layers(
    model: FoldForCausalLM, ids_WT: Tensor, owners: int, *, folder: Path | None = None, report: Report = silent
) -> str:
    """A `--layers` text with so many owners, the cheapest. Arguments and errors as above; all costs lie in `folder`."""
    most = check_choice(model.config, owners)
    costs = group_costs(model, ids_WT, most=most, folder=folder, report=report)
    found = cheapest_owners(costs, layer_kinds(model.config), owners)
    return explicit_text(found, [layer.window is not None for layer in model.config.layout.layers])


def check_choice(config: FoldConfig, owners: int) -> int:
    """The size of the largest group that will be measured. Raises `UserError` where so many owners can't be chosen."""
    kinds = layer_kinds(config)
    if not 1 <= owners < len(kinds):
        raise UserError(
            f"layers 'best:{owners}': of {len(kinds)} layers 1 to {len(kinds) - 1} can be chosen to keep keys and values"
        )
    # One layer more than they must on average, and three at least.
    most = max(3, -(-len(kinds) // owners) + 1)
    cheapest_owners(dict.fromkeys(_groups(kinds, most), 0.0), kinds, owners)
    return most


def _groups(kinds: Sequence[Hashable], most: int) -> list[Group]:
    """All that are measured, in the order of their owners."""
    found = []
    for kind in dict.fromkeys(kinds):
        layers = [layer for layer, one in enumerate(kinds) if one == kind]
        for size in range(2, most + 1):
            found += [tuple(layers[at : at + size]) for at in range(len(layers) - size + 1)]
    return sorted(found)


def _cuts(costs: Mapping[Group, float], layers: Sequence[int], before: Cuts) -> Cuts:
    """The cheapest way to each number of groups, of `before` and of layers of one kind together."""
    ways = [before]
    most = max((len(group) for group in costs), default=1)
    for end in range(1, len(layers) + 1):
        here: Cuts = {}
        for size in range(1, min(most, end) + 1):
            group = tuple(layers[end - size : end])
            cost = 0.0 if size == 1 else costs.get(group, math.inf)
            for number, (total, groups) in ways[end - size].items():
                if total + cost < here.get(number + 1, (math.inf,))[0]:
                    here[number + 1] = total + cost, (*groups, group)
        ways.append(here)
    return ways[-1]


class _Search:
    """Costs of groups, from the lowest layer up: only the streams at one layer's border are in memory."""

    def __init__(self, model: FoldForCausalLM, ids_WT: Tensor, folder: Path | None):
        held = torch.arange(len(ids_WT)) % _HELD_OUT == _HELD_OUT - 1
        self._model, self._fitted_on, self._held = model, ids_WT[~held], ids_WT[held].to(model.device)
        self._batch = max(1, min(_BATCH, len(self._fitted_on) // 2))
        self._options = Fit(feed_forward=False, batch=self._batch)
        self._path = None if folder is None else folder / _FILE
        self._key = fingerprint_of(model, model, ids_WT, self._options)

    @torch.no_grad()
    def costs(self, groups: Sequence[Group], report: Report) -> dict[Group, float]:
        """Of each group; those that were found before are not measured again."""
        known, model = self._known(), self._model
        streams = Streams(model, model, self._fitted_on, self._batch)
        held = Streams(model, model, self._held, _BATCH)
        wanted = [model.model(ids, use_cache=False).last_hidden_state for ids in self._held.split(_BATCH)]
        for layer in range(model.config.num_hidden_layers):
            for group in (one for one in groups if one[0] == layer):
                report("measuring which layers may share", groups.index(group), len(groups))
                if group not in known:
                    known[group] = self._cost(group, streams.theirs, held.theirs, wanted)
                    self._keep(known)
            streams.pass_theirs(layer)
            held.pass_theirs(layer)
        report("measuring which layers may share", len(groups), len(groups))
        return {group: known[group] for group in groups}

    def _cost(self, group: Group, start: Sequence[Tensor], held: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
        """KL in nats, mean over the positions that were held out. `start`, `held`: the streams below the group."""
        model, layers = self._model, self._model.config.layout.layers
        owners = [group[0] if layer in group else layer for layer in range(len(layers))]
        text = explicit_text(owners, [layer.window is not None for layer in layers])
        asked = Conversion(layers=text, init="fitted")
        converted = converted_model(model, new_config(model.config, asked), asked)
        streams = Streams(model, converted, self._fitted_on, self._batch, start=start)
        for layer in range(group[0], group[-1] + 1):
            do_layer(streams, layer, self._options, fitting=layer in group)
        lost = 0.0
        for hidden, states in zip(held, wanted, strict=True):
            found = streams.to_the_end(group[0], hidden).flatten(0, 1)
            unused = torch.zeros(len(found), dtype=torch.int64, device=found.device)
            lost += float(score(converted, found, unused, (model, states.flatten(0, 1))).kl.sum())
        return lost / self._held.numel()

    def _known(self) -> dict[Group, float]:
        """What an interrupted search of the same model and text had found."""
        if self._path is None or not self._path.is_file():
            return {}
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            if found["fingerprint"] != self._key:
                return {}
            return {tuple(map(int, name.split("-"))): float(cost) for name, cost in found["costs"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):  # not what was written: measured anew
            return {}

    def _keep(self, costs: Mapping[Group, float]) -> None:
        if self._path is not None:
            named = {"-".join(map(str, group)): cost for group, cost in costs.items()}
            told = {"what": "KL in nats where these layers share", "fingerprint": self._key, "costs": named}
            write_whole_file(self._path, json.dumps(told, indent=1))
