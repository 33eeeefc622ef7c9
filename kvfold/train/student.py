"""Making a model ready to be trained: its gates, what of it learns, and the teacher that it is held against."""

import copy
import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from kvfold.eval.cells import layout_key, model_key
from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.base import Method
from kvfold.methods.gates import GateConfig
from kvfold.models.adapters import ABOUT, WEIGHTS, AdapterAbout, Base, apply_adapter, read_adapter
from kvfold.models.blocks import unpack
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.gates import CallOptions
from kvfold.record import write_whole_file
from kvfold.train.run_folder import staged
from kvfold.train.settings import Retention, RetrofitSettings, refuse

_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
GATE_MODULES = ("fold_norm", "fold_proj")
GATES_OFF = CallOptions(gates="off")
_SHARE = 0.5
"""How often a layer that may share does."""
_STATES = "states"


class TeacherStates:
    """What a teacher says, kept on the disk: another run on the same text need not ask it again. States before the head, a
    file for each sequence: tokens x width x bytes of the dtype.

    A sequence is known by its tokens, a teacher by its weights and layout: runs of any order, method and batch share a folder.
    What was computed beside other sequences differs in rounding; what was computed under autocast is kept apart.
    """

    def __init__(self, folder: Path, teacher: FoldForCausalLM):
        """`teacher`: as it is before anything is trained or added."""
        key = model_key(teacher, "")
        layout = layout_key(teacher.config.layout)[:8]
        about = "-".join([key["fingerprint"][:16], layout, key["device"], key["dtype"].removeprefix("torch.")])
        self._folder, self._device = folder / about, teacher.device.type
        self._folder.mkdir(parents=True, exist_ok=True)

    def of(self, ids_BT: Tensor, ask: Callable[[Tensor], Tensor]) -> Tensor:
        """[B, T, C] on the device of `ids_BT`; `ask` is called with the sequences that are not there yet, if any."""
        paths = [self._path(ids_T) for ids_T in ids_BT.cpu()]
        found = [_read(path, ids_BT.device) for path in paths]
        missing = [row for row, states in enumerate(found) if states is None]
        if missing:
            for row, states in zip(missing, ask(ids_BT[missing]), strict=True):
                found[row] = states
                write_whole_file(paths[row], save({_STATES: states.contiguous()}))
        return torch.stack(found)

    def _path(self, ids_T: Tensor) -> Path:
        known = hashlib.sha256(ids_T.long().numpy().tobytes())
        if torch.is_autocast_enabled(self._device):
            known.update(str(torch.get_autocast_dtype(self._device)).encode())
        return self._folder / f"{known.hexdigest()[:32]}.safetensors"


def _read(path: Path, device: torch.device) -> Tensor | None:
    try:
        return load_file(path, device=str(device))[_STATES]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Student:
    """A model to be trained, and its teacher."""

    model: FoldForCausalLM
    teacher: FoldForCausalLM | None
    """A model of its own; None = the student's own weights, with what is trained switched off."""
    kept: TeacherStates | None = None
    """What the teacher has said before, in this run or another."""
    widest: KVLayout | None = None
    """Where layers draw whether they share: all that may."""
    has_lora: bool = False
    """Whether what is trained is a low-rank addition."""


def make_student(
    model: FoldForCausalLM, settings: RetrofitSettings, *, teacher: FoldForCausalLM | None = None
) -> Student:
    """Give the model its gates and say what of it learns; the model is changed in place.

    Distilling all weights takes a frozen copy of the original as the teacher, unless another was given.
    """
    kept = None
    if settings.teacher_states is not None:
        kept = TeacherStates(Path(settings.teacher_states), teacher or model)
    if settings.distils == "none":
        teacher = None
    elif teacher is None and settings.trains == "full":
        teacher = copy.deepcopy(model)
    if teacher is not None:
        # Training mode is the plain form without a cache; there is nothing random in it.
        teacher.requires_grad_(False).train()
    unpack(model)  # copies for decoding, which training would only make stale
    torch.manual_seed(settings.seed)
    if settings.start is not None:
        go_on_from(model, settings)
    elif settings.compresses:
        model.set_gates(gate_config_of(settings), settings.time)
    model.requires_grad_(settings.trains == "full")
    if settings.trains == "lora":
        import peft

        # Of scale 1; all else is frozen.
        rank, of = settings.rank, list(_LORA_TARGETS)
        config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=of)
        peft.inject_adapter_in_model(config, model)
    for owner, layer in enumerate(model.model.layers):
        for gate in (layer.self_attn.fold_norm, layer.self_attn.fold_proj):
            if gate is not None:  # also where another method rules, which learns nothing
                gate.requires_grad_(model.config.layout.time_of(owner).trained)
        if settings.compresses and not settings.trains_gates and layer.self_attn.fold_proj is not None:
            _freeze_decisions(layer.self_attn, settings.spec.gate_form.outputs)
    return Student(
        model=model, teacher=teacher, kept=kept, widest=widest_layout(model, settings), has_lora=settings.trains == "lora"
    )  # fmt: skip


def takes_over(settings: RetrofitSettings) -> bool:
    """Whether the adapter that training goes on from has the gates of another method, which are taken over. Raises `UserError`
    for one that can't be gone on from.
    """
    about, _ = read_adapter(settings.start)
    method, form = settings.spec.name, settings.spec.gate_form
    has = None if about.gates is None else GateConfig.from_json(about.gates)
    said = "no gates" if has is None else f"gates for {has.method}"
    refuse(
        (about.lora is not None, f"start {settings.start}: it adds to the weights, too: go on from gates alone"),
        (has is None or has.method not in (method, form.gates_of), f"start {settings.start}: it has {said}, and {method} can't "
         "go on from that: choose another"),
        (settings.trains_gates and has is not None and (has.per, has.reads) != (settings.per, settings.reads), f"start "
         f"{settings.start}: its gates decide per {has and has.per} and read '{has and has.reads}': say so for this run, too"),
    )  # fmt: skip
    return has.method != method


def go_on_from(model: FoldForCausalLM, settings: RetrofitSettings) -> None:
    """Give the model the gates of the adapter that training goes on from, under the settings' method."""
    if takes_over(settings):
        apply_adapter(model, settings.start)
        take_gates(model, settings.spec, settings.time)
    else:
        apply_adapter(model, settings.start, time=settings.time)
    model.config.kept_ratios = None


@torch.no_grad()
def take_gates(model: FoldForCausalLM, method: Method, time: str) -> None:
    """Put a model that has an adapter of another method under `method`, whose settings `time` says, in place: the decisions stay,
    whatever else its adapters give is as in new ones. Raises `UserError` for a method that does not take gates like these.
    """
    gates, wanted = model.config.gate_config, None if method.gate_form is None else method.gate_form.gates_of
    has = "no gates" if gates is None else f"gates of {gates.method} from its {gates.source}"
    refuse(
        (wanted is None, f"time '{time}': {method.name} takes over no gates: choose a method that does"),
        (gates is None or wanted != gates.method or gates.source != "adapter", f"time '{time}': the model has {has}, and it "
         f"needs an adapter for {wanted}: load one with the model"),
    )  # fmt: skip
    layers = [one.self_attn for one in model.model.layers]
    old = [(one.fold_norm, one.fold_proj) for one in layers]
    model.set_gates(replace(gates, method=method.name), time)
    for layer, (norm, projection) in zip(layers, old, strict=True):
        if norm is None:
            continue
        layer.fold_norm.load_state_dict(norm.state_dict())
        for name in ("weight", "bias"):
            given = getattr(projection, name)
            if given is not None:
                getattr(layer.fold_proj, name)[:: method.gate_form.outputs] = given


def _freeze_decisions(attention: nn.Module, outputs: int) -> None:
    """What decides stays as it is: of so many numbers a head the first, and the norm that all of them read."""

    def without_decisions(grad: Tensor) -> Tensor:
        return grad.index_fill(0, torch.arange(0, grad.shape[0], outputs, device=grad.device), 0.0)

    attention.fold_norm.requires_grad_(False)
    for weight in (attention.fold_proj.weight, attention.fold_proj.bias):
        if weight is not None and weight.requires_grad:
            weight.register_hook(without_decisions)


def widest_layout(model: FoldForCausalLM, settings: RetrofitSettings) -> KVLayout | None:
    """The layout of `drawn_layers`. Raises `UserError` for one that does not fit the model's layers."""
    drawn = settings.drawn_layers
    return None if drawn is None else KVLayout.parse(drawn, model.config.layout)


def drawn_layout(base: KVLayout, widest: KVLayout, *, seed: int, step: int) -> KVLayout:
    """A layout between `base` and `widest`, in which most layers share, the same on every process: each layer that has
    another owner in `widest` stays where `base` has it, or reads what the layer before it in its group of `widest` reads. So
    every layout can come up whose owners include those of `widest` and whose readers read the nearest owner before them.

    Source: arXiv 2604.22782 draws, in pretraining, a layer's own keys and values or an earlier layer's.
    Differs: readers and owners are those of a pattern, and a trained model is trained on; drawn for a step, not a sample.
    """
    draw = random.Random(f"{seed} {step}")
    owners: list[int] = []
    newest: dict[int, int] = {}
    for layer in range(base.num_layers):
        own, group = base.owner_of(layer), widest.owner_of(layer)
        goes = draw.random() < _SHARE and group in newest
        # The owner that it had may have become a reader itself.
        owners.append(newest[group] if goes else layer if own == layer else owners[own])
        newest[group] = owners[-1]
    return base.with_owners(owners)


def check_method(
    model: FoldForCausalLM, settings: RetrofitSettings, teacher: FoldForCausalLM | None = None
) -> None:  # fmt: skip
    """Raises `UserError` where the settings, or a teacher of its own, don't go with this model."""
    if teacher is not None:
        ours, theirs = (
            (one.config.num_hidden_layers, one.config.hidden_size, one.config.vocab_size) for one in (model, teacher)
        )
        refuse(
            (ours[2] != theirs[2], f"teacher {settings.teacher}: its vocabulary has {theirs[2]:,} tokens and the model's "
             f"{ours[2]:,}: distil from a model with the same tokenizer"),
            (settings.hidden_loss_weight and ours != theirs, f"hidden_loss_weight: the teacher has {theirs[0]} layers of width "
             f"{theirs[1]}, the model {ours[0]} of {ours[1]}: leave it out"),
        )  # fmt: skip
    if not settings.gated:
        return
    layout, dim = model.config.layout.with_time(settings.time), model.config.head_dim
    channel = settings.channel
    refuse(
        (not any(layout.time_of(owner).trained for owner in layout.owners), f"time '{settings.time}': no layer of this model "
         f"comes under {settings.spec.format()}: what is said of all goes to layers of full attention: name others, or choose "
         "another model"),
        (not -dim <= (channel or 0) < dim, f"channel {channel}: heads have {dim} channels: use 0 to {dim - 1}"),
    )  # fmt: skip
    if settings.start is not None:
        takes_over(settings)
    if settings.trains_gates:
        retention_of(model, settings).share_for(settings.compression)


def retention_of(model: FoldForCausalLM, settings: RetrofitSettings) -> Retention:
    """What the model keeps of a training sequence under the method of the settings."""
    layout = model.config.layout.with_time(settings.time)
    return Retention.of(layout, settings.seq_len, model.dtype.itemsize)


def gate_config_of(settings: RetrofitSettings) -> GateConfig:
    """The gates that the settings describe. An adapter has a bias, which warm start and calibration set."""
    form = settings.spec.gate_form
    return GateConfig(
        method=settings.spec.name, source=settings.gate_source, per=settings.per, bias=settings.gate_source == "adapter",
        reads=settings.reads if settings.reads in form.reads else form.reads[0],
        channel=-1 if settings.channel is None else settings.channel,
        scale=form.scale if settings.gate_scale is None else settings.gate_scale,
        base_masked=form.zero_out and settings.trains == "lora",
    )  # fmt: skip


@contextmanager
def lora_off(model: nn.Module) -> Iterator[None]:
    """Inside, low-rank additions add nothing."""
    layers = _lora_layers(model)
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _lora_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """What learns, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def num_trained(model: nn.Module, settings: RetrofitSettings) -> int:
    """Numbers that learn. Decisions that were taken over stand in the same tensors, and don't."""
    weights = trained_weights(model)
    frozen = 0
    if settings.compresses and not settings.trains_gates:
        rows = [weight.numel() for name, weight in weights.items() if not name.endswith(".heads")]
        frozen = sum(rows) // settings.spec.gate_form.outputs
    return sum(weight.numel() for weight in weights.values()) - frozen


def write_trained(
    model: FoldForCausalLM, tokenizer: Any, settings: RetrofitSettings, base: Base, folder: Path, *,
    card: str | None = None, tokens: int | None = None,
) -> None:  # fmt: skip
    """The adapter or the whole model in `folder`, with the card where there is one; what else lies there stays. `tokens`:
    trained on, where that is known.
    """
    config = model.config
    if settings.trains == "full":
        before = config.trained_tokens
        config.trained_tokens = before if tokens is None else (before or 0) + tokens
        write_model(model, tokenizer, folder, card=card)
        config.trained_tokens = before  # a snapshot is not the end
        return
    named, learned = dict(model.named_parameters()), config.gates is not None
    weights = {name: weight for name, weight in named.items() if name.split(".")[-2] in GATE_MODULES}
    weights |= {name.removesuffix(".default.weight"): weight for name, weight in named.items() if ".lora_" in name}
    assert weights, "nothing was trained that an adapter could hold"
    scales = {layer.scaling["default"] for layer in _lora_layers(model)}
    about = AdapterAbout(
        base=base, time=config.layout.time_text() if learned else None, gates=config.gates,
        lora={"scale": scales.pop()} if scales else None, trained_tokens=tokens,
        kept_ratios=config.kept_ratios if learned else None,
    )  # fmt: skip
    with staged(folder, card) as place:
        save_adapter(about, weights, place)


def write_model(model: FoldForCausalLM, tokenizer: Any, folder: Path, *, card: str | None) -> None:
    """A model's folder, with its card; what else lies there stays."""
    with staged(folder, card) as place:
        model.save_pretrained(place)
        if tokenizer is not None:
            tokenizer.save_pretrained(place)


def save_adapter(about: AdapterAbout, weights: dict[str, Tensor], folder: Path) -> None:
    """The files of an adapter; a folder is loaded by the last."""
    told = {"device": "cpu", "dtype": torch.float32}
    save_file({name: weight.detach().to(**told).contiguous() for name, weight in weights.items()}, folder / WEIGHTS)
    (folder / ABOUT).write_text(about.to_text(), encoding="utf-8")
