"""The settings of a retrofit: what a recipe may say, what each key means, and which do not go together. No torch."""

from dataclasses import dataclass, replace
from typing import Literal, Self

from kvfold.errors import UserError
from kvfold.layout.per_layer import split_per_owner
from kvfold.methods.base import Method
from kvfold.methods.registry import parse_time
from kvfold.train.numbers import check_numbers
from kvfold.train.schedules import LearningRate, Retention, Stages, learning_rate_factor


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrofitSettings:
    """One retrofit; a recipe file holds these keys."""

    time: str | None = None
    """`dmc[:W]` or `dms[:W]`, for single owners something else (`dms:128; 0-3=full`); None = plain uptraining, nothing is
    evicted or merged."""
    compression: float = 4.0
    """Real compression at the end of a sequence: delay windows, and owners without gates, included."""
    trains: Literal["adapter", "lora", "full"] = "adapter"
    """What learns: gates beside a frozen model (DMS), a low-rank addition, or all weights."""
    rank: int = 64
    """Rank of the LoRA on q, k, v and o."""
    source: Literal["channel", "adapter"] | None = None
    """Where decisions come from; None = an adapter for DMS, a freed channel for DMC."""
    reads: Literal["own", "next"] = "own"
    """Whose decision governs a token under DMS: its own, or the next token's (the published form)."""
    channel: int | None = None
    """The channel of q and k that is freed for decisions; None = the last, as published."""
    find_channel: bool = False
    """Free the channel that the model misses least, found by a forward pass for each."""
    gate_scale: float | None = None
    """Factor of what a gate reads, and so of how fast it learns beside the other weights; None = 100 under DMS, 1 under DMC,
    as published."""
    ratio_weight: float = 1.0
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
    state_weight: float = 0.0
    """Factor of a loss that holds the states after each layer to the teacher's, beside what comes out of the head; see
    `state_distance`."""
    drawn_layers: str | None = None
    """Layers that may share, as a `--layers` text: in each step each of its readers draws whether it does; None = none."""
    data: tuple[str, ...] = ()
    """Text files, parquet files, or hub names."""
    tokens: int | None = None
    """Tokens trained on: the stages below are scaled to it; None = as many as they take."""
    sequence_tokens: int = 1024
    """Tokens of a sequence; compression is that at its end."""
    batch_sequences: int = 4
    """Sequences of one optimizer step, over all processes."""
    sequences_at_once: int = 1
    """Of these, how many one process computes side by side."""
    zero_out_steps: int = 0
    """Steps in which the freed channel fades out (DMC)."""
    ramp_steps: int = 200
    """Steps from no compression to the target."""
    tail_steps: int = 50
    """Steps at the target."""
    learning_rate: float = 3e-5
    """At its highest."""
    learning_rate_schedule: LearningRate = "constant"
    """`constant`, `cosine`, or `tail-cosine` (constant up to the tail)."""
    final_learning_rate: float = 0.1
    """Where a cosine ends, as a share of the highest."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises."""
    weight_decay: float = 0.0
    """Of AdamW, on matrices."""
    beta1: float = 0.9
    """Of AdamW."""
    beta2: float = 0.95
    """Of AdamW."""
    clip: float = 1.0
    """The gradient's norm is held below it."""
    seed: int = 0
    """Rules the text, its order, the noise and new weights."""
    save_steps: int = 25
    """Steps between checkpoints to go on from."""
    checkpoint_activations: bool = False
    """Keep only each layer's input for the way back: less memory, about a third more time."""
    shard: bool = False
    """Spread weights and optimizer over the processes of torchrun (FSDP2)."""
    mixed_precision: Literal["auto", "bfloat16", "none"] = "auto"
    """`bfloat16`: products in it, weights and optimizer as they are loaded, which is also faster on CPUs that have it
    (AVX512-BF16, AMX) and much slower on others; `auto` = on CUDA alone."""
    warm_start: bool = False
    """Fit the gates to the attention that tokens receive, before training (DMS adapters that read `own`)."""
    calibrate: bool = True
    """Shift the trained gates so that held-out text is compressed as asked for."""
    control: bool = False
    """Train the same without compression, to compare with."""

    def __post_init__(self) -> None:
        check_numbers(self, counts=_COUNTS, from_zero=_FROM_ZERO, above_zero=_ABOVE_ZERO)
        if self.sequence_tokens < 2:
            raise UserError(
                f"sequence_tokens {self.sequence_tokens}: nothing is predicted in so short a text: use e.g. 1024"
            )
        if self.tokens is not None and self.tokens < self.step_tokens:
            raise UserError(
                f"tokens {self.tokens:,}: one step takes {self.batch_sequences} sequences of {self.sequence_tokens:,}, "
                f"{self.step_tokens:,} in all: give it more tokens or smaller steps"
            )
        if self.batch_sequences % self.sequences_at_once:
            raise UserError(
                f"sequences_at_once {self.sequences_at_once}: steps of {self.batch_sequences} are cut in equal parts: "
                "use a divisor of it"
            )
        self._check_method()
        if self.gated and not self.control and split_per_owner(self.time)[1] == []:
            # What single owners keep is counted when the model is there.
            Retention.of_method(self.spec, self.sequence_tokens).share_for(self.compression)

    def _check_method(self) -> None:
        if not self.compression >= 1:
            raise UserError(f"compression {self.compression:g}: it is times smaller, 1 or more: ask for e.g. 4")
        if self.time is not None and not self.spec.trained:
            raise UserError(
                f"time '{self.time}': it learns nothing: use a learned method such as dms or dmc, or leave it out"
            )
        if self.trains == "adapter" and (self.time is None or not self.spec.gate_form.adapter):
            raise UserError(
                f"an adapter for {self.time or 'no method'}: it has no gates beside a frozen model: "
                "use lora or full, or time dms"
            )
        if self.control and self.trains == "adapter":
            raise UserError("control of an adapter: a frozen model is its own control: leave one of the two out")
        if self.shard and (self.trains == "lora" or (self.time is not None and self.spec.gate_form.zero_out)):
            what = "lora" if self.trains == "lora" else self.spec.name
            raise UserError(f"shard with {what}: it writes into whole weights: leave shard out")
        if self.drawn_layers is not None and (self.time is not None or self.shard):
            other = "shard" if self.shard else f"time '{self.time}'"
            raise UserError(f"drawn_layers {self.drawn_layers} with {other}: train one of the two after the other")
        if self.teacher_states is not None and (self.shard or self.distils == "none"):
            why = "spread weights are asked together" if self.shard else "nothing is distilled"
            raise UserError(f"teacher_states {self.teacher_states}: {why}: leave it out")
        if self.state_weight and (self.distils == "none" or self.teacher_states is not None):
            why = (
                "nothing is distilled"
                if self.distils == "none"
                else "teacher_states keep those of the last layer alone"
            )
            raise UserError(f"state_weight {self.state_weight:g}: {why}: leave one of the two out")
        if self.warm_start and (self.gate_source, self.reads) != ("adapter", "own"):
            raise UserError("warm_start: it fits DMS adapters that read their own decision: leave it out")
        if self.trains == "adapter" and self.source == "channel":
            raise UserError(
                "source 'channel' with an adapter: its decisions are its own: use lora or full, or leave it out"
            )
        if self.source == "adapter" and self.gated and not self.spec.gate_form.adapter:
            raise UserError(f"source 'adapter' with {self.spec.name}: it reads a freed channel: leave it out")
        if self.gate_source != "channel":
            for name in ("zero_out_steps", "channel", "find_channel"):
                if getattr(self, name) not in (0, None):  # False is 0
                    raise UserError(f"{name} {getattr(self, name)}: an adapter frees no channel: leave it out")
        if self.channel is not None and self.find_channel:
            raise UserError(f"channel {self.channel} and find_channel: give one of the two")

    @property
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
    def gate_source(self) -> Literal["channel", "adapter"] | None:
        """Where decisions come from."""
        if self.time is None:
            return None
        return self.source or self.spec.gate_form.source

    @property
    def distils(self) -> Literal["reverse", "forward", "none"]:
        """The loss: a distillation, or none."""
        if self.kl is not None:
            return self.kl
        if self.teacher:
            return "reverse"
        return self.spec.gate_form.distils if self.gated else "none"

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch_sequences * self.sequence_tokens

    @property
    def stages(self) -> Stages:
        """The steps, scaled to `tokens`. With a warm start the ramp's steps are spent at the target; so are all steps where
        nothing is compressed.
        """
        zero_out, ramp, tail = self.zero_out_steps, self.ramp_steps, self.tail_steps
        if self.tokens is not None:
            total, planned = self.tokens // self.step_tokens, max(1, zero_out + ramp + tail)
            zero_out, tail = round(total * zero_out / planned), round(total * tail / planned)
            ramp = total - zero_out - tail
        if self.warm_start:
            ramp, tail = 0, ramp + tail
        if not self.compresses:
            return Stages(compression=1.0, ramp_steps=zero_out + ramp, tail_steps=tail)
        return Stages(compression=self.compression, zero_out_steps=zero_out, ramp_steps=ramp, tail_steps=tail)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.stages.total

    def rate_factor(self, step: int) -> float:
        """What the learning rate is multiplied by at `step` (from 0)."""
        return learning_rate_factor(
            step, kind=self.learning_rate_schedule, stages=self.stages, warmup_steps=self.warmup_steps,
            final=self.final_learning_rate,
        )  # fmt: skip

    def with_values(self, **values: object) -> Self:
        """The same with some keys changed."""
        return replace(self, **values)


_ABOVE_ZERO = {"learning_rate": "3e-5", "gate_scale": "100", "ratio_weight": "1", "clip": "1"}
_FROM_ZERO = ("zero_out_steps", "ramp_steps", "tail_steps", "warmup_steps", "weight_decay", "state_weight")
_COUNTS = ("rank", "sequence_tokens", "batch_sequences", "sequences_at_once", "save_steps")
