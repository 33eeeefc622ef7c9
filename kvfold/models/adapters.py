"""Adapters: what a retrofit adds to a model, in a small folder of its own. Reading one, and putting it on its base.

A folder holds adapter.json (method, gates, the base it was trained on) and adapter.safetensors (gates, and low-rank additions
to q, k, v and o where there are any: these are merged into the weights, so that a model with an adapter is a plain model).
Writing, and the card, are the business of training.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kvfold.errors import UserError, one_line
from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.gates import GateConfig
from kvfold.models.blocks import new_adapter
from kvfold.models.gates import GateSet, gate_table

if TYPE_CHECKING:
    from kvfold.models.decoder import FoldForCausalLM, FoldPreTrainedModel

FORMAT = 1
"""Version of adapter.json."""
ABOUT, WEIGHTS = "adapter.json", "adapter.safetensors"
_NUMBERS = re.compile(r"\[[-+.\deE,\s]+\]")
_PROBED_WEIGHTS, _PROBED_VALUES = 16, 4
_LIKE = 0.98
"""Cosine from which two models are taken for the same one rounded or trained on; 4-bit weights have about 0.995."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """What an adapter remembers of the model that it was trained on."""

    name: str
    """What the model was called."""
    layers: int
    hidden_size: int
    kv_heads: tuple[int, ...]
    """Of each owner, ascending."""
    probe: tuple[float, ...]
    """A few of its weights, to know it again in any dtype."""

    @classmethod
    def of(cls, model: FoldForCausalLM, name: str) -> Self:
        """Of a model that has no adapter yet."""
        layout = model.config.layout
        return cls(
            name=name, layers=layout.num_layers, hidden_size=model.config.hidden_size,
            kv_heads=tuple(layout.layers[owner].num_kv_heads for owner in layout.owners), probe=_probe(model),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterAbout:
    """What adapter.json says."""

    base: Base
    time: str | None = None
    """The method's text form; None where nothing is evicted or merged."""
    gates: dict[str, Any] | None = None
    """`GateConfig` as plain values."""
    lora: dict[str, Any] | None = None
    """`scale` of the low-rank additions; None where there are none."""
    trained_tokens: int | None = None
    """Tokens it was trained on; None = not noted."""
    kept_ratios: dict[str, Any] | None = None
    """What the gates keep of text, per KV stream, at three lengths; None = not measured."""

    def to_text(self) -> str:
        """The file adapter.json: a list of numbers takes one line."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1)
        return _NUMBERS.sub(lambda match: " ".join(match[0].split()), text) + "\n"


def adapter_folder(name: str | Path) -> Path:
    """The folder of an adapter; one that is not there may be the name of an adapter that comes with kvfold."""
    folder = Path(name)
    bundled = Path(__file__).parents[1] / "assets" / "adapters" / folder
    return bundled if not folder.exists() and len(folder.parts) == 1 and bundled.is_dir() else folder


def apply_adapter(model: FoldForCausalLM, folder: str | Path, *, time: str | None = None) -> None:
    """Put an adapter on its base, in place; its method is on from then, under the settings `time` where given.

    Raises `UserError`, in one line, for a folder that is no whole adapter, and for one that belongs to another base.
    """
    about, weights = read_adapter(folder)
    _check_base(model, about.base, Path(folder))
    before = model.config.layout
    if about.time is not None:
        if time is not None:
            gate_table(GateConfig.from_json(about.gates), before.with_time(time), freed_owners=())
        model.set_gates(GateConfig.from_json(about.gates), about.time)
        model.config.kept_ratios = about.kept_ratios
    if about.lora is not None:
        _merge_lora(model, weights, about)
    if about.time is not None and time is not None:
        # Only now: a channel is freed where the gates were trained.
        model.config.layout = before.with_time(time)
    gates = {name: weight for name, weight in weights.items() if ".lora_" not in name}
    own = {name: one for name, one in model.named_parameters() if name.split(".")[-2] in ("fold_norm", "fold_proj")}
    _fill(own, gates, folder)


CHANNEL = "channel"
"""Asks for the published freed channel as it stands."""


def channel_gates(layout: KVLayout) -> GateConfig:
    """The published freed channel of a layout's learned method."""
    learned = {layout.time_of(owner).name for owner in layout.owners if layout.time_of(owner).trained}
    if len(learned) != 1:
        raise UserError(
            f"gates 'channel' under time '{layout.time_text()}': it is for one learned method: leave it out"
        )
    return GateConfig.published_channel(learned.pop())


def gates_for_cache(model: FoldPreTrainedModel, gates: str | Path | GateSet, layout: KVLayout) -> GateSet:
    """What decides for a cache of this layout in place of the model's own gates: an adapter's folder or name, or a gate set;
    `channel` = the published freed channel.
    """
    if gates == CHANNEL:
        found = GateSet(CHANNEL, channel_gates(layout), {})
    else:
        found = gates if isinstance(gates, GateSet) else load_gates(model, gates)
    if model.config.freed_owners:
        raise UserError(
            f"gates {found.name}: this model's own gates are written into its weights, so no others can decide: leave gates out"
        )
    return found


def load_gates(model: FoldPreTrainedModel, folder: str | Path) -> GateSet:
    """The gates of an adapter, beside a model that keeps its own. Raises `UserError` for one that changes weights too."""
    about, weights = read_adapter(folder)
    _check_base(model, about.base, Path(folder))
    if about.gates is None or about.lora is not None:
        has = "no gates" if about.gates is None else "low-rank additions to the weights beside its gates"
        raise UserError(f"gates {folder}: the adapter has {has}: load it with the model, as adapter=")
    config, modules = GateConfig.from_json(about.gates), {}
    for owner in model.config.layout.owners if config.source == "adapter" else ():
        modules[owner] = new_adapter(config, model.config, owner)
    found = GateSet(Path(folder).name, config, modules)
    named = {
        f"model.layers.{owner}.self_attn.{kind}.{name}": weight
        for owner, (norm, projection) in modules.items()
        for kind, module in (("fold_norm", norm), ("fold_proj", projection))
        for name, weight in module.named_parameters()
    }
    _fill(named, weights, folder)
    return found.requires_grad_(False).to(model.device)


@torch.no_grad()
def _fill(targets: dict[str, Tensor], weights: dict[str, Tensor], folder: str | Path) -> None:
    """Write an adapter's weights over these, if they are just these."""
    if weights.keys() != targets.keys() or any(weights[name].shape != targets[name].shape for name in weights):
        raise UserError(f"adapter {folder}: its weights are not those that its {ABOUT} describes: fetch it again")
    for name, weight in weights.items():
        targets[name].copy_(weight)


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder says that it holds an adapter."""
    return (adapter_folder(folder) / ABOUT).is_file()


def read_adapter(folder: str | Path) -> tuple[AdapterAbout, dict[str, Tensor]]:
    """What an adapter says of itself, and its weights."""
    folder = adapter_folder(folder)
    if not is_adapter(folder):
        raise UserError(f"adapter {folder}: no {ABOUT} there: give the folder that `kvfold retrofit` wrote")
    try:
        data = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        found = data.pop("format")
        if found != FORMAT:
            remedy = "update kvfold" if isinstance(found, int) and found > FORMAT else "fetch it again"
            raise UserError(f"adapter {folder}: format {found!r}: this kvfold reads format {FORMAT}: {remedy}")
        base = Base(**data.pop("base"))
        return AdapterAbout(base=base, **data), load_file(folder / WEIGHTS)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, LookupError, SafetensorError) as error:
        raise UserError(f"adapter {folder}: it can't be read ({one_line(error)}): fetch it again") from error


def _check_base(model: FoldForCausalLM, base: Base, folder: Path) -> None:
    ours = Base.of(model, base.name)
    if (ours.layers, ours.hidden_size, list(ours.kv_heads)) != (base.layers, base.hidden_size, list(base.kv_heads)):
        raise UserError(
            f"adapter {folder}: it is for {base.name} ({_shape(base)}), and this model has {_shape(ours)}: load it on its base"
        )
    # Half a percent is more than any dtype's rounding and less than any other model's difference.
    if all(abs(a - b) <= 0.005 * abs(b) + 1e-6 for a, b in zip(ours.probe, base.probe, strict=True)):
        return
    if torch.cosine_similarity(torch.tensor(ours.probe), torch.tensor(base.probe), dim=0) < _LIKE:
        raise UserError(
            f"adapter {folder}: it was trained on {base.name}, and this model has the same shape but other weights: "
            "load it on its base"
        )
    warnings.warn(
        f"adapter {folder}: it was trained on {base.name}; this model's weights are close to that but not the same, as another "
        "quantisation's or a fine-tune's are: the figures of its card don't hold here, measure anew",
        stacklevel=4,
    )


def _shape(base: Base) -> str:
    heads = ", ".join(map(str, sorted(set(base.kv_heads))))
    return f"{base.layers} layers of width {base.hidden_size}, {heads} KV heads in {len(base.kv_heads)} of them"


def _probe(model: FoldForCausalLM) -> tuple[float, ...]:
    """Single weights, evenly spaced over the model's matrices."""
    weights = [one for name, one in sorted(model.named_parameters()) if one.ndim == 2 and ".fold_" not in name]
    chosen = [weights[index * len(weights) // _PROBED_WEIGHTS].detach().view(-1) for index in range(_PROBED_WEIGHTS)]
    places = [(2 * index + 1) / (2 * _PROBED_VALUES) for index in range(_PROBED_VALUES)]
    return tuple(float(f"{float(one[int(one.numel() * place)]):.4g}") for one in chosen for place in places)


@torch.no_grad()
def _merge_lora(model: FoldForCausalLM, weights: dict[str, Tensor], about: AdapterAbout) -> None:
    """Add the low-rank products to the weights. Where gates decide by a channel that training masked out of the base, the
    base's rows of it become 0 first.
    """
    gates = None if about.gates is None else GateConfig.from_json(about.gates)
    if gates is not None and gates.base_masked:
        model.free_channel()
        model.config.gates = about.gates | {"base_masked": False}
    names = sorted(name.removesuffix(".lora_A") for name in weights if name.endswith(".lora_A"))
    modules: dict[str, nn.Module] = dict(model.named_modules())
    for name in names:
        down, up = weights[f"{name}.lora_A"], weights.get(f"{name}.lora_B")
        target = getattr(modules.get(name), "weight", None)
        if up is None or target is None or (up.shape[0], down.shape[1]) != tuple(target.shape):
            raise UserError(f"its low-rank addition to {name} does not fit this model: fetch the adapter again")
        product = (up.float() @ down.float()) * about.lora["scale"]
        target += product.to(device=target.device, dtype=target.dtype)
