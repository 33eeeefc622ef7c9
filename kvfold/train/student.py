"""Making a model ready to be trained: its gates, what of it learns, and the teacher that it is held against."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.errors import UserError
from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.gates import GateConfig
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.options import CallOptions
from kvfold.models.packing import unpack
from kvfold.train.schedules import Retention
from kvfold.train.settings import RetrofitSettings
from kvfold.train.teacher import TeacherStates

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
GATE_MODULES = ("fold_norm", "fold_proj")
GATES_OFF = CallOptions(gates="off")


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

    def teacher_states(
        self, ids_BT: Tensor, decoder: Callable[..., Any], *, of_layers: bool = False
    ) -> tuple[Tensor, ...]:
        """What the teacher has before its head, [B, T, C]; with `of_layers`, before that what goes into each layer.
        `decoder`: the student's, see `decoder_of`.
        """
        if self.kept is not None and not of_layers:
            return (self.kept.of(ids_BT, lambda missing: self._asked(missing, decoder)[-1]),)
        return self._asked(ids_BT, decoder, of_layers)

    @torch.no_grad()
    def _asked(self, ids_BT: Tensor, decoder: Callable[..., Any], of_layers: bool = False) -> tuple[Tensor, ...]:
        decoder = decoder if self.teacher is None else self.teacher.model
        with lora_off(self.model) if self.has_lora else nullcontext():
            outputs = decoder(ids_BT, use_cache=False, output_hidden_states=of_layers, options=GATES_OFF)
        return outputs.hidden_states if of_layers else (outputs.last_hidden_state,)

    @property
    def head_of_teacher(self) -> FoldForCausalLM:
        """The model whose head goes with `teacher_states`."""
        return self.teacher or self.model


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
    if settings.compresses:
        model.set_gates(gate_config_of(settings), settings.time)
    model.requires_grad_(settings.trains == "full")
    if settings.trains == "lora":
        add_lora(model, settings.rank)
    for owner, layer in enumerate(model.model.layers):
        for gate in (layer.self_attn.fold_norm, layer.self_attn.fold_proj):
            if gate is not None:  # also where another method rules, which learns nothing
                gate.requires_grad_(model.config.layout.time_of(owner).trained)
    return Student(
        model=model, teacher=teacher, kept=kept, widest=widest_layout(model, settings), has_lora=settings.trains == "lora"
    )  # fmt: skip


def widest_layout(model: FoldForCausalLM, settings: RetrofitSettings) -> KVLayout | None:
    """The layout of `drawn_layers`. Raises `UserError` for one that does not fit the model's layers."""
    if settings.drawn_layers is None:
        return None
    return KVLayout.parse(settings.drawn_layers, model.config.layout)


def check_states(model: FoldForCausalLM, teacher: FoldForCausalLM) -> None:
    """Raises `UserError` where a model's states cannot be held to those of its teacher."""
    ours, theirs = ((one.config.num_hidden_layers, one.config.hidden_size) for one in (model, teacher))
    if ours != theirs:
        raise UserError(
            f"state_weight: the teacher has {theirs[0]} layers of width {theirs[1]}, the model {ours[0]} of {ours[1]}: "
            "leave it out"
        )


def check_method(model: FoldForCausalLM, settings: RetrofitSettings) -> None:
    """Raises `UserError` where the method of the settings has nothing to do in this model."""
    if not settings.gated:
        return
    taken = settings.spec.gate_form.gates_of
    if taken is not None:
        raise UserError(f"time '{settings.time}': its gates are those of an adapter for {taken}: train that")
    layout, dim = model.config.layout.with_time(settings.time), model.config.head_dim
    if not any(layout.time_of(owner).trained for owner in layout.owners):
        raise UserError(
            f"time '{settings.time}': no layer of this model comes under {settings.spec.format()}: what is said of all goes to "
            "layers of full attention: name others, or choose another model"
        )
    if settings.compresses:
        retention_of(model, settings).share_for(settings.compression)
    if settings.channel is not None and not -dim <= settings.channel < dim:
        raise UserError(f"channel {settings.channel}: heads have {dim} channels: use 0 to {dim - 1}")


def retention_of(model: FoldForCausalLM, settings: RetrofitSettings) -> Retention:
    """What the model keeps of a training sequence under the method of the settings."""
    layout = model.config.layout.with_time(settings.time)
    return Retention.of(layout, settings.sequence_tokens, model.dtype.itemsize)


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


def add_lora(model: FoldForCausalLM, rank: int) -> None:
    """A low-rank addition beside q, k, v and o of every layer, of scale 1; all else is frozen."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(LORA_TARGETS))
    peft.inject_adapter_in_model(config, model)


@contextmanager
def lora_off(model: nn.Module) -> Iterator[None]:
    """Inside, low-rank additions add nothing."""
    layers = lora_layers(model)
    for layer in layers.values():
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.enable_adapters(True)


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with a low-rank addition, by their names."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """What learns, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
