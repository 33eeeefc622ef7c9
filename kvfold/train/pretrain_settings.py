"""The settings of training from scratch: a model's shape, and how it is trained. What a recipe may say, and what its bytes
and weights come to. No torch.
"""

from typing import Self

from pydantic import Field, StrictBool, model_validator

from kvfold.errors import UserError
from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.planner import token_bytes
from kvfold.train.schedules import Stages, learning_rate_factor
from kvfold.train.settings import AboveZero, Count, FromZero, Share, Texts, TrainSettings, Whole

BYTES_16_BIT = 2


class PretrainSettings(TrainSettings):
    """One model from scratch; a recipe file holds these keys. The defaults are the published recipe's.

    Source: arXiv 2405.12981, section 3.1.
    Differs: whether the head is tied to the embedding and the vocabulary's padding are not published: ours are untied, and
    the next multiple of 128.
    """

    num_layers: Count
    """Decoder layers."""
    hidden_size: Count
    """Width of the residual stream."""
    intermediate_size: Count
    """Width of the feed-forward block (SwiGLU)."""
    num_heads: Count
    """Query heads."""
    num_kv_heads: Count
    """KV heads of each layer that stores keys and values: a divisor of the query heads."""
    head_dim: Count
    """Channels of a head, an even number, since rotary positions turn them in pairs."""
    vocabulary: Count
    """Rows of the embedding; a tokenizer that is trained has as many tokens."""
    layers: str = "full"
    """Who stores keys and values: `full`, `cla2`, `cla2-keep-ends`, `0_0_2_2...` and so on."""
    kv_norm: StrictBool | None = None
    """A norm gain of their own before k and v; None = where layers are shared, as published."""
    tie_embeddings: StrictBool = False
    """The head is the embedding."""
    rope_theta: AboveZero = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: FromZero = 1e-5
    """Of the RMS norms."""
    init_std: AboveZero = 0.01275
    """Standard deviation of new weights."""
    valid: Texts = ()
    """Held-out text of the same kinds as `data`; none = the first part of the data is held out."""
    tokenizer: str | None = None
    """A folder or hub name; None = byte-level BPE trained on the data."""
    tokens: Whole
    seq_len: Count = Field(2048, validation_alias="sequence_tokens")
    global_batch_size: Count = Field(2048, validation_alias="batch_sequences")
    learning_rate: AboveZero = 3e-4
    weight_decay: FromZero = 0.1
    save_steps: Count = 500
    warmup_share: Share = 0.05
    """Share of the steps in which the learning rate rises."""
    validate_steps: Count = 500
    """Steps between measurements on held-out text; the end is always measured."""
    validation_tokens: Count = 4_000_000
    """Held-out tokens, less where the text is shorter."""

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_kv_heads {self.num_kv_heads}: each serves as many of the {self.num_heads} query heads: use a divisor"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim}: rotary positions turn channels in pairs: use an even number")
        if self.warmup_share == 1:
            raise UserError(f"warmup_share {self.warmup_share:g}: it is a share of the steps: use 0 to below 1")
        self.layout  # noqa: B018  a pattern that does not fit is refused here
        return self

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
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.tokens // self.step_tokens

    def rate_factor(self, step: int) -> float:
        """What the learning rate is multiplied by at `step` (from 0): up in a line, then down a cosine."""
        return learning_rate_factor(
            step, kind="cosine", stages=Stages(compression=1.0, ramp_steps=self.total_steps),
            warmup_steps=round(self.warmup_share * self.total_steps), final=self.final_learning_rate,
        )  # fmt: skip
