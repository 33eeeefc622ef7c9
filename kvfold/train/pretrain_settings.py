"""The settings of training from scratch: a model's shape, and how it is trained. What a recipe may say, and what its bytes
and weights come to. No torch.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

from kvfold.errors import UserError
from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import token_bytes
from kvfold.train.numbers import check_numbers
from kvfold.train.schedules import Stages, learning_rate_factor

BYTES_16_BIT = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainSettings:
    """One model from scratch; a recipe file holds these keys. The defaults are the published recipe's.

    Source: arXiv 2405.12981, section 3.1.
    Differs: whether the head is tied to the embedding and the vocabulary's padding are not published: ours are untied, and
    the next multiple of 128.
    """

    num_layers: int
    """Decoder layers."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the feed-forward block (SwiGLU)."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """KV heads of each layer that stores keys and values: a divisor of the query heads."""
    head_dim: int
    """Channels of a head, an even number, since rotary positions turn them in pairs."""
    vocabulary: int
    """Rows of the embedding; a tokenizer that is trained has as many tokens."""
    layers: str = "full"
    """Who stores keys and values: `full`, `cla2`, `cla2-keep-ends`, `0_0_2_2...` and so on."""
    kv_norm: bool | None = None
    """A norm gain of their own before k and v; None = where layers are shared, as published."""
    tie_embeddings: bool = False
    """The head is the embedding."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Of the RMS norms."""
    init_std: float = 0.01275
    """Standard deviation of new weights."""
    data: tuple[str, ...] = ()
    """Text files, parquet files, or hub names."""
    valid: tuple[str, ...] = ()
    """Held-out text of the same kinds; none = the first part of the data is held out."""
    tokenizer: str | None = None
    """A folder or hub name; None = byte-level BPE trained on the data."""
    tokens: int
    """Tokens trained on."""
    sequence_tokens: int = 2048
    """Tokens of a sequence."""
    batch_sequences: int = 2048
    """Sequences of one optimizer step, over all processes."""
    sequences_at_once: int = 1
    """Of these, how many one process computes at once."""
    learning_rate: float = 3e-4
    """At its highest."""
    final_learning_rate: float = 0.1
    """Where the cosine ends, as a share of the highest."""
    warmup_share: float = 0.05
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.1
    """Of AdamW, on matrices."""
    beta1: float = 0.9
    """Of AdamW."""
    beta2: float = 0.95
    """Of AdamW."""
    clip: float = 1.0
    """The gradient's norm is held below it."""
    seed: int = 0
    """Rules new weights and the order of sequences; which text is drawn is the same for every seed."""
    save_steps: int = 500
    """Steps between checkpoints to go on from."""
    validate_steps: int = 500
    """Steps between measurements on held-out text; the end is always measured."""
    validation_tokens: int = 4_000_000
    """Held-out tokens, less where the text is shorter."""
    checkpoint_activations: bool = False
    """Keep only each layer's input for the way back: less memory, about a third more time."""
    shard: bool = False
    """Spread weights and optimizer over the processes of torchrun (FSDP2)."""
    mixed_precision: Literal["auto", "bfloat16", "none"] = "auto"
    """`bfloat16`: products in it, weights and optimizer as they are loaded, which is also faster on CPUs that have it
    (AVX512-BF16, AMX) and much slower on others; `auto` = on CUDA alone."""

    def __post_init__(self) -> None:
        check_numbers(self, counts=_COUNTS, from_zero=("weight_decay", "norm_eps"), above_zero=_ABOVE_ZERO)
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_kv_heads {self.num_kv_heads}: each serves as many of the {self.num_heads} query heads: use a divisor"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim}: rotary positions turn channels in pairs: use an even number")
        if self.sequence_tokens < 2:
            raise UserError("sequence_tokens 1: a sequence has a token to read and one to predict: use 2 or more")
        if self.tokens < self.step_tokens:
            raise UserError(
                f"tokens {self.tokens:,}: one step takes {self.batch_sequences} sequences of {self.sequence_tokens:,}, "
                f"{self.step_tokens:,} in all: give it more tokens or smaller steps"
            )
        if not 0 <= self.warmup_share < 1:
            raise UserError(f"warmup_share {self.warmup_share:g}: it is a share of the steps: use 0 to below 1")
        if self.batch_sequences % self.sequences_at_once:
            raise UserError(
                f"sequences_at_once {self.sequences_at_once}: steps of {self.batch_sequences} are cut in equal parts: "
                "use a divisor of it"
            )
        self.layout  # noqa: B018  a pattern that does not fit is refused here

    def with_rate(self, learning_rate: float) -> Self:
        """The same at another learning rate."""
        return replace(self, learning_rate=learning_rate)

    @property
    def layout(self) -> KVLayout:
        """Who keeps what."""
        return KVLayout.parse(self.layers, KVLayout.plain(self.num_layers, self.num_kv_heads, self.head_dim))

    @property
    def has_kv_norm(self) -> bool:
        """Whether owners norm the input of k and v with a gain of their own."""
        return len(self.layout.owners) < self.num_layers if self.kv_norm is None else self.kv_norm

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token at 16 bit."""
        return token_bytes(self.layout, BYTES_16_BIT)

    @property
    def num_parameters(self) -> int:
        """Weights of the model."""
        width, q_width = self.hidden_size, self.num_heads * self.head_dim
        kv_width, owners = self.num_kv_heads * self.head_dim, len(self.layout.owners)
        layer = 2 * width * q_width + 3 * width * self.intermediate_size + 2 * width
        owner = 2 * width * kv_width + (width if self.has_kv_norm else 0)
        embeddings = self.vocabulary * width * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + owners * owner + embeddings + width

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch_sequences * self.sequence_tokens

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.tokens // self.step_tokens

    def rate_factor(self, step: int) -> float:
        """What the learning rate is multiplied by at `step` (from 0): up in a line, then down a cosine."""
        return learning_rate_factor(
            step, kind="cosine", stages=Stages(compression=1.0, ramp_steps=self.total_steps),
            warmup_steps=round(self.warmup_share * self.total_steps), final=self.final_learning_rate,
        )  # fmt: skip


_ABOVE_ZERO = {"learning_rate": "3e-4", "clip": "1", "init_std": "0.01275", "rope_theta": "10000"}
_COUNTS = (
    "num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocabulary",
    "sequence_tokens", "batch_sequences", "sequences_at_once", "save_steps", "validate_steps", "validation_tokens",
)  # fmt: skip
