"""The settings of training: one validated form for all of it, and a retrofit's. What a recipe may say, what each key means, which
do not go together, and what changes from step to step: how hard gates are pressed, and the learning rate. No torch.

The compression that people ask for is the real one at the end of a training sequence: all owners count, those without gates
too, by their bytes, delay windows included. What the loss presses is the share of decisions that fire; here one is solved
from the other.
"""

import math
import types
import typing
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, TypeAdapter, ValidationError
from pydantic import model_validator as validator

from kvfold.errors import UserError
from kvfold.layout.kvlayout import KVLayout, split_per_owner
from kvfold.methods.base import Method
from kvfold.methods.registry import parse_time


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """What a layout keeps of a sequence at its end, as shares of the bytes of a cache that keeps every token."""

    context_tokens: int
    """Tokens of the sequence."""
    without_gates: float
    """Kept by owners that have none."""
    always: float
    """Kept by owners with gates, whatever these decide: DMS's delay window, DMC's first token."""
    decided: float
    """What gates decide about."""
    time: str
    """The layout's text along time, to name it."""

    @classmethod
    def of(cls, layout: KVLayout, context_tokens: int, model_bytes: int = 2) -> Self:
        """`model_bytes`: one number in the model's dtype; it matters where owners differ in their storage."""
        total = without = always = decided = 0.0
        for owner in layout.owners:
            size, method = entry_bytes(layout, owner, model_bytes), layout.time_of(owner)
            total += size * context_tokens
            if method.trained:
                kept = method.always_kept(context_tokens)
                always, decided = always + size * kept, decided + size * (context_tokens - kept)
            else:
                without += size * method.max_kept(context_tokens)
        return cls(
            context_tokens=context_tokens, without_gates=without / total, always=always / total, decided=decided / total,
            time=layout.time_text(),
        )  # fmt: skip

    def share_for(self, compression: float) -> float:
        """alpha*, the share of decisions that must fire so that 1 / `compression` is kept; 0 where less is kept anyway. Raises
        `UserError` where more is kept whatever fires.
        """
        wanted = 1 / compression - self.without_gates - self.always
        if compression == 1 or wanted >= self.decided > 0:
            return 0.0
        if wanted * self.context_tokens <= 1e-9:
            raise UserError(self._unreachable(compression))
        return 1 - wanted / self.decided

    def compression_for(self, share: float) -> float:
        """The inverse of `share_for`: tokens seen / tokens kept when this share of decisions fires."""
        return 1 / (self.without_gates + self.always + self.decided * (1 - share))

    def nominal_for(self, compression: float) -> float:
        """CR*, what the papers call compression: 1 / (1 - alpha*), delay windows and owners without gates not counted."""
        return 1 / (1 - self.share_for(compression))

    def _unreachable(self, compression: float) -> str:
        tokens = self.context_tokens
        most = math.ceil(tokens * (1 / compression - self.without_gates)) - 2
        remedy = "ask for less, or longer sequences"
        if self.without_gates:
            remedy += ", or leave fewer layers without gates"
        elif most >= 1:
            remedy = f"use a delay of {most} or less, or longer sequences"
        return (
            f"compression {compression:g} of {tokens:,} tokens keeps {tokens / compression:,.0f}, and {self.time} always keeps "
            f"{tokens * (self.without_gates + self.always):,.0f}: it can't be reached: {remedy}"
        )


def entry_bytes(layout: KVLayout, owner: int, model_bytes: int) -> int:
    """Bytes of K and V of one token in all heads of an owner."""
    layer = layout.layers[owner]
    return layer.num_kv_heads * sum(layout.bits_of(owner).slot_bytes(layer.head_dim, model_bytes))


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """The steps of a retrofit: DMC's zero-out, the ramp from no compression to the target, and a tail at the target.

    Source: arXiv 2403.09636, section 3.3; arXiv 2506.05345, section 3.
    Differs: the ramp is linear in the real compression at the training length, not in 1 / (1 - share of decisions).
    """

    compression: float
    """Real compression at the end of the ramp."""
    zero_out_steps: int = 0
    """Steps in which the freed channel fades out, gates off (DMC)."""
    ramp_steps: int
    """Steps from no compression to the target; 0 = the target from the first step on."""
    tail_steps: int = 0
    """Steps at the target."""

    def __post_init__(self) -> None:
        if min(self.zero_out_steps, self.ramp_steps, self.tail_steps) < 0 or not self.total:
            raise UserError(
                f"stages of {self.zero_out_steps} + {self.ramp_steps} + {self.tail_steps} steps: a retrofit takes 1 step or "
                "more: give it more tokens"
            )

    @property
    def total(self) -> int:
        """Steps in all."""
        return self.tail_start + self.tail_steps

    @property
    def tail_start(self) -> int:
        """The first step of the tail, counted from 0."""
        return self.zero_out_steps + self.ramp_steps

    def zero_out_factor(self, step: int) -> float | None:
        """What the freed channel is multiplied by at `step` (from 0): 0 after four fifths of the stage; None after it."""
        return None if step >= self.zero_out_steps else max(0.0, 1 - step / (0.8 * self.zero_out_steps))

    def compression_at(self, step: int) -> float:
        """The real compression that is asked for at `step` (from 0)."""
        if step >= self.tail_start:
            return self.compression
        return 1 + (self.compression - 1) * max(0, step - self.zero_out_steps + 1) / max(1, self.ramp_steps)

    def targets(self, retention: Retention | None) -> list["Target"]:
        """What is asked for in each step; `retention`: where anything is compressed."""
        return [
            Target(
                channel_factor=self.zero_out_factor(step), compression=self.compression_at(step),
                share=0.0 if retention is None else retention.share_for(self.compression_at(step)),
                unit=None if retention is None else self.unit_after(step + 1),
            )
            for step in range(self.total)
        ]  # fmt: skip

    def unit_after(self, done_steps: int) -> int | None:
        """The whole compression (2, 3, ...) that the ramp asked for in the last of `done_steps` steps for the first time,
        and short of the target, whose result is the run's own.
        """
        if not self.zero_out_steps < done_steps <= self.tail_start:
            return None
        now = math.floor(self.compression_at(done_steps - 1) + 1e-9)
        before = 1.0 if done_steps - 1 == self.zero_out_steps else self.compression_at(done_steps - 2)
        return now if math.floor(before + 1e-9) < now < self.compression else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What is asked for in one step."""

    channel_factor: float | None
    """Of the freed channel, while it fades out; None = gates are on, if there are any."""
    compression: float
    """The real one, at the end of a sequence."""
    share: float
    """alpha*: of decisions, those that must fire for it."""
    unit: int | None
    """The whole compression that is come to in this step."""


def cosine_factor(step: int, *, start: int, total: int, warmup_steps: int, final: float) -> float:
    """What the learning rate is multiplied by at `step` (from 0): up in a line, 1 until `start`, a cosine down to `final`."""
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if step < start or start >= total:
        return warm
    return warm * (final + (1 - final) * (1 + math.cos(math.pi * min(1.0, (step - start) / (total - start)))) / 2)


def _number(value: Any) -> Any:
    """YAML reads 3e-5 as text, and true is no number."""
    if isinstance(value, bool):
        raise ValueError
    return float(value) if isinstance(value, str) else value


def _whole(value: Any) -> Any:
    value = _number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number)]
Count = Annotated[Whole, Field(ge=1, description="it is 1 or more: ask for more")]
Steps = Annotated[Whole, Field(ge=0, description="it is 0 or more: use e.g. 0")]
FromZero = Annotated[Number, Field(ge=0, allow_inf_nan=False, description="it is 0 or more: use e.g. 0")]
AboveZero = Annotated[Number, Field(gt=0, allow_inf_nan=False, description="it is a number above 0: use e.g. 1")]
Beta = Annotated[Number, Field(ge=0, lt=1, description="it is from 0 to below 1: use e.g. 0.9")]
Share = Annotated[Number, Field(ge=0, le=1, description="it is a share, 0 to 1: use e.g. 0.1")]
Times = Annotated[Number, Field(ge=1, description="it is times smaller, 1 or more: ask for e.g. 4")]
Texts = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]

_WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "a text", type(None): "empty"}


def refuse(*mistakes: tuple[object, str]) -> None:
    """Raise `UserError` for the first of them that was made."""
    for is_made, told in mistakes:
        if is_made:
            raise UserError(told)


class TrainSettings(BaseModel):
    """What every kind of training may be asked. Raises `UserError`, in one line, for the first value that can't be.

    Keys have the field's usual names; those that they had before are read, too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True)

    data: Texts = ()
    """Text files, parquet files, or hub names."""
    tokens: Whole | None = None
    """Tokens trained on."""
    seq_len: Count = Field(1024, validation_alias="sequence_tokens")
    """Tokens of a sequence."""
    global_batch_size: Count = Field(4, validation_alias="batch_sequences")
    """Sequences of one optimizer step, over all processes."""
    micro_batch_size: Count = Field(1, validation_alias="sequences_at_once")
    """Of these, how many one process computes side by side."""
    learning_rate: AboveZero = 3e-5
    """AdamW's, at its peak."""
    final_learning_rate: Share = 0.1
    """Where a cosine ends, as a share of the peak."""
    weight_decay: FromZero = 0.0
    """AdamW's, on matrices."""
    beta1: Beta = 0.9
    """AdamW's."""
    beta2: Beta = 0.95
    """AdamW's."""
    weight_average: Beta = 0.0
    """Decay a step of a moving average of the trained weights, which is what is written in the end; 0 = the last weights."""
    max_grad_norm: AboveZero = Field(1.0, validation_alias="clip")
    """A gradient whose norm is larger is scaled down to it."""
    seed: Whole = 0
    """Rules new weights, the order of sequences, and the noise."""
    save_steps: Count = 25
    """Steps between checkpoints."""
    gradient_checkpointing: StrictBool = Field(False, validation_alias="checkpoint_activations")
    """Keep only each layer's input for the backward pass: less memory, about a third more time."""
    fsdp: StrictBool = Field(False, validation_alias="shard")
    """Spread weights and optimizer over the processes of torchrun (FSDP2)."""
    mixed_precision: Literal["auto", "bfloat16", "none"] = "auto"
    """`bfloat16`: products in it, weights and optimizer as they are loaded, which is also faster on CPUs that have it
    (AVX512-BF16, AMX) and much slower on others; `auto` = on CUDA alone."""

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(self._told(error)) from None

    @validator(mode="after")
    def _check_sizes(self) -> Self:
        sequences, parts = self.global_batch_size, self.micro_batch_size
        refuse(
            (self.seq_len < 2, f"seq_len {self.seq_len}: a sequence has a token to read and one to predict: use 2 or more"),
            (self.tokens is not None and self.tokens < self.step_tokens, f"tokens {self.tokens or 0:,}: one step takes "
             f"{sequences} sequences of {self.seq_len:,}, {self.step_tokens:,} in all: give it more tokens or smaller steps"),
            (sequences % parts, f"micro_batch_size {parts}: steps of {sequences} are cut in equal parts: use a divisor of it"),
        )  # fmt: skip
        return self

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.global_batch_size * self.seq_len

    def rate_of(self, name: str) -> float:
        """AdamW's peak for a weight, by its name."""
        return self.learning_rate

    def with_values(self, **values: Any) -> Self:
        """The same with some keys changed."""
        return type(self)(**self.model_dump() | values)

    @classmethod
    def key_of(cls, key: str) -> str | None:
        """The key that a name stands for, its own or the one that it had before; None for a name that is none."""
        return next((name for name, one in cls.model_fields.items() if key in (name, one.validation_alias)), None)

    @classmethod
    def value_of(cls, key: str, value: Any) -> Any:
        """A key's value as its kind has it. Raises `UserError` for one that can't be."""
        try:
            return TypeAdapter(cls.model_fields[key].rebuild_annotation()).validate_python(value)
        except ValidationError as error:
            raise UserError(cls._told(error, key)) from None

    @classmethod
    def _told(cls, error: ValidationError, key: str | None = None) -> str:
        """The first mistake in one line: value, rule, remedy. `key`: where the error does not say it."""
        first = error.errors()[0]
        if isinstance(cause := first.get("ctx", {}).get("error"), UserError):
            return str(cause)
        key = key or cls.key_of(str(first["loc"][0])) or str(first["loc"][0])
        if first["type"] == "missing":
            return f"nothing says {key}: add it"
        if key not in cls.model_fields:
            return f"unknown key '{key}': use one of {', '.join(cls.model_fields)}"
        value, rule = first["input"], cls.model_fields[key].description
        if rule is not None and first["type"].startswith(("greater_than", "less_than", "finite")):
            return f"{key} {value:g}: {rule}"
        return f"{key} {value!r}: it is {_words(cls.model_fields[key].annotation)}: correct it"


def _words(kind: Any) -> str:
    """What values a kind has."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _words(parts[0])
    if origin in (types.UnionType, typing.Union, Literal):
        return " or ".join(str(part) if origin is Literal else _words(part) for part in parts)
    return _WORDS.get(kind, "a list of texts")


class RetrofitSettings(TrainSettings):
    """One retrofit; a recipe file holds these keys. With `tokens` the stages are scaled to it. Compression is that at the end
    of a sequence.
    """

    time: str | None = None
    """`dmc[:W]` or `dms[:W]`, for single owners something else (`dms:128; 0-3=full`); None = plain uptraining, nothing is
    evicted or merged."""
    compression: Times = 4.0
    """Real compression at the end of a sequence: delay windows, and owners without gates, included."""
    trains: Literal["adapter", "lora", "full"] = "adapter"
    """What learns: gates beside a frozen model (DMS), a low-rank addition, or all weights."""
    rank: Count = 64
    """Rank of the LoRA on q, k, v and o."""
    source: Literal["channel", "adapter"] | None = None
    """Where decisions come from; None = an adapter for DMS, a freed channel for DMC."""
    reads: Literal["own", "next"] = "own"
    """Whose decision governs a token under DMS: its own, or the next token's (the published form)."""
    channel: Whole | None = None
    """The channel of q and k that is freed for decisions; None = the last, as published."""
    find_channel: StrictBool = False
    """Free the channel that the model misses least, found by a forward pass for each."""
    gate_scale: Number | None = Field(
        None, gt=0, allow_inf_nan=False, description="it is a number above 0: use e.g. 100"
    )
    """Factor of what a gate reads, and so of how fast it learns beside the other weights; None = 100 under DMS, 1 under DMC,
    as published."""
    ratio_weight: AboveZero = 1.0
    """Factor of the loss that asks for the compression; 1 as published. Its gradient is the same however far the compression
    lags behind, so what the rest of the loss would rather keep may hold it up for long."""
    per: Literal["head", "layer"] = "head"
    """A decision for each KV head, or one for all heads of a layer."""
    kl: Literal["reverse", "forward", "none"] | None = None
    """Distillation, or `none` = the next token's loss; None = reverse under DMS or with a teacher, else none."""
    teacher: str | None = None
    """A model to distil from, of the same vocabulary; None = the source itself."""
    teacher_states: str | None = None
    """A folder for what the teacher says of each sequence, so that another run on the same text need not ask again; None =
    nothing is kept."""
    hidden_loss_weight: FromZero = Field(0.0, validation_alias="state_weight")
    """Factor of a loss that holds the states after each layer to the teacher's, beside what comes out of the head; see
    `state_distance`."""
    drawn_layers: str | None = None
    """Layers that may share, as a `--layers` text: in each step each of its readers draws whether it does; None = none."""
    zero_out_steps: Steps = 0
    """Steps in which the freed channel fades out (DMC)."""
    ramp_steps: Steps = 200
    """Steps from no compression to the target."""
    tail_steps: Steps = 50
    """Steps at the target."""
    learning_rate_schedule: Literal["constant", "cosine", "tail-cosine"] = "constant"
    """`constant`; `cosine` over the whole run; `tail-cosine`: constant up to the tail, a cosine from there."""
    warmup_steps: Steps = 0
    """Steps in which the learning rate rises."""
    heads_learning_rate: AboveZero = 0.03
    """AdamW's peak for the numbers that a KV head holds whatever the token (fold's b, c and lambda)."""
    start: str | None = None
    """An adapter to go on from: its folder, or the name of one that comes with kvfold. Its gates train on; a method that has none
    of its own (fold) takes them over as they are, fits what it adds to them, and trains that."""
    warm_start: StrictBool = False
    """Fit the gates to the attention that tokens receive, before training (DMS adapters that read `own`)."""
    calibrate: StrictBool = True
    """Shift the trained gates so that held-out text is compressed as asked for."""
    control: StrictBool = False
    """Train the same without compression, to compare with."""

    @validator(mode="after")
    def _check_method(self) -> Self:
        learned = None if self.time is None else self.spec
        if learned is not None and not learned.trained:
            raise UserError(
                f"time '{self.time}': it learns nothing: use a learned method such as dms or dmc, or leave it out"
            )
        form = None if learned is None else learned.gate_form
        has_adapter, zeroes = form is not None and form.adapter, form is not None and form.zero_out
        whole = "lora" if self.trains == "lora" else learned.name if zeroes else None
        takes, start = form is not None and form.gates_of is not None, self.start
        other, kept, weight = (
            "fsdp" if self.fsdp else f"time '{self.time}'",
            self.teacher_states,
            self.hidden_loss_weight,
        )
        no_states = "spread weights are asked together" if self.fsdp else "nothing is distilled"
        no_loss = "nothing is distilled" if kept is None else "teacher_states keep those of the last layer alone"
        refuse(
            (self.trains == "adapter" and not has_adapter, f"an adapter for {self.time or 'no method'}: it has no gates beside a "
             "frozen model: use lora or full, or time dms"),
            (self.control and self.trains == "adapter", "control of an adapter: a frozen model is its own control: leave one of "
             "the two out"),
            (takes and start is None, f"time '{self.time}': its gates are those of an adapter for {form and form.gates_of}: name "
             "one with start"),
            (start is not None and (self.trains != "adapter" or self.time is None), f"start {start}: gates go on beside a frozen "
             "model: train an adapter, or leave it out"),
            (start is not None and self.warm_start, f"start {start}: its gates have learned already: leave warm_start out"),
            (takes and (self.fsdp or self.weight_decay), f"time '{self.time}': its decisions are frozen: leave fsdp and "
             "weight_decay out"),
            (takes and self.gradient_checkpointing, f"time '{self.time}': it trains in the form of inference, which keeps all "
             "inputs: leave gradient_checkpointing out"),
            (self.fsdp and whole is not None, f"fsdp with {whole}: it writes into whole weights: leave fsdp out"),
            (self.drawn_layers is not None and (learned is not None or self.fsdp), f"drawn_layers {self.drawn_layers} with "
             f"{other}: train one of the two after the other"),
            (kept is not None and (self.fsdp or self.distils == "none"), f"teacher_states {kept}: {no_states}: leave it out"),
            (weight and (self.distils == "none" or kept is not None), f"hidden_loss_weight {weight:g}: {no_loss}: leave one of "
             "the two out"),
            (self.warm_start and (self.gate_source, self.reads) != ("adapter", "own"), "warm_start: it fits DMS adapters that "
             "read their own decision: leave it out"),
            (self.trains == "adapter" and self.source == "channel", "source 'channel' with an adapter: its decisions are its "
             "own: use lora or full, or leave it out"),
            (self.source == "adapter" and learned is not None and not has_adapter, f"source 'adapter' with "
             f"{learned and learned.name}: it reads a freed channel: leave it out"),
            *(
                (self.gate_source != "channel" and getattr(self, name) not in (0, None),  # False is 0
                 f"{name} {getattr(self, name)}: an adapter frees no channel: leave it out")
                for name in ("zero_out_steps", "channel", "find_channel")
            ),
            (self.channel is not None and self.find_channel, f"channel {self.channel} and find_channel: give one of the two"),
        )  # fmt: skip
        if self.trains_gates and split_per_owner(self.time)[1] == []:
            # What single owners keep is counted when the model is there.
            one = KVLayout.plain(1, 1, 1).with_time(learned.format())
            Retention.of(one, self.seq_len).share_for(self.compression)
        return self

    @cached_property
    def spec(self) -> Method:
        """The learned method; where owners have it with different settings, with one of them."""
        assert self.time is not None, "plain uptraining has no method"
        rest, named = split_per_owner(self.time)
        methods = [parse_time(text) for text in (rest, *(text for _, text in named)) if text is not None]
        learned = [one for one in methods if one.trained] or methods
        if len({one.name for one in learned if one.trained}) > 1:
            names = " and ".join(sorted({one.name for one in learned}))
            raise UserError(f"time '{self.time}': gates of one model are of one method, not {names}: choose one")
        return learned[0]

    @property
    def gated(self) -> bool:
        """Whether it is a retrofit with a method, or the control of one."""
        return self.time is not None

    @property
    def compresses(self) -> bool:
        """Whether anything is dropped or merged in training."""
        return self.gated and not self.control

    @property
    def trains_gates(self) -> bool:
        """Whether decisions learn; those of another method's adapter stay as they are."""
        return self.compresses and self.spec.gate_form.gates_of is None

    @property
    def gate_source(self) -> Literal["channel", "adapter"] | None:
        """Where decisions come from."""
        return (self.source or self.spec.gate_form.source) if self.gated else None

    @property
    def distils(self) -> Literal["reverse", "forward", "none"]:
        """The loss: a distillation, or none."""
        unsaid = self.spec.gate_form.distils if self.gated else "none"
        return self.kl or ("reverse" if self.teacher else unsaid)

    @cached_property
    def stages(self) -> Stages:
        """The steps, scaled to `tokens`. From a warm start or another adapter on, the ramp's steps are spent at the target; so
        are all steps where no gate learns to compress.
        """
        zero_out, ramp, tail = self.zero_out_steps, self.ramp_steps, self.tail_steps
        if self.tokens is not None:
            total, planned = self.tokens // self.step_tokens, max(1, zero_out + ramp + tail)
            zero_out, tail = round(total * zero_out / planned), round(total * tail / planned)
            ramp = total - zero_out - tail
        if self.warm_start or self.start is not None:
            ramp, tail = 0, ramp + tail
        if not self.trains_gates:
            return Stages(compression=1.0, ramp_steps=zero_out + ramp, tail_steps=tail)
        return Stages(compression=self.compression, zero_out_steps=zero_out, ramp_steps=ramp, tail_steps=tail)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.stages.total

    def rate_of(self, name: str) -> float:
        """See `TrainSettings`."""
        return self.heads_learning_rate if name.endswith(".fold_proj.heads") else self.learning_rate

    def rate_factor(self, step: int) -> float:
        """What the learning rate is multiplied by at `step` (from 0)."""
        total, warmup = self.total_steps, self.warmup_steps
        start = {"constant": total, "cosine": warmup, "tail-cosine": self.stages.tail_start}[
            self.learning_rate_schedule
        ]
        return cosine_factor(step, start=start, total=total, warmup_steps=warmup, final=self.final_learning_rate)
