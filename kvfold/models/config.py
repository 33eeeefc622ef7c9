"""FoldConfig: what config.json says of a kvfold model. Llama's attributes, the switches by which other families differ
from Llama, and the layout. How a family's own config maps to it stands in families.py.
"""

from functools import lru_cache
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from kvfold.errors import UserError
from kvfold.layout.hf_config import rope_kinds
from kvfold.layout.kvlayout import KVLayout
from kvfold.methods.gates import GateConfig

FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"
"""The attention types, in transformers' words."""


class FoldConfig(PreTrainedConfig):
    """A decoder's shape, its family's switches, and who keeps which keys and values.

    `layout` and `base_layout` are `KVLayout`s here and plain JSON in the file: both setters take either. A fresh config
    has the plain layout that its other attributes describe.
    """

    model_type = "kvfold"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    family: str = "llama"
    """transformers' model_type of the architecture that the switches below describe."""
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    """KV heads of the architecture; what each layer really has stands in the layout."""
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    """Rotary positions in transformers' words; one dict, or one for each attention type."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = "none"
    """RMS norm of q and k: `none`; before rotary positions `head` (each head alone) or `full` (all heads together); behind them
    `rotated` (each head alone; every layer, readers too, has a gain of its own for the keys it reads).
    """
    norm_placement: str = "pre"
    """Where a block is normed: `pre` its input, `post` its output, `sandwich` both."""
    norm_offset: bool = False
    """A norm's gain is 1 + weight."""
    kv_norm: bool = False
    """Owners norm the input of k and v with a gain of their own (cross-layer attention trained from scratch)."""
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_scale: float | None = None
    """Factor of q.k; None = 1 / sqrt(head_dim)."""
    attention_softcap: float | None = None
    logit_scale: float = 1.0
    final_logit_softcap: float | None = None
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    """Attention type of each layer; None = full everywhere, or with a window sliding everywhere."""
    nope_layers: list[int] | None = None
    """Layers without rotary positions."""
    gates: dict[str, Any] | None = None
    """Where the decisions of a learned method come from (a `GateConfig` as plain values); None = the model has no gates."""
    kept_ratios: dict[str, Any] | None = None
    """What the gates keep of text, per KV stream, as calibration measured it (read by `engine.budget.SequenceCost`, beside
    the method's `time`); None = not measured."""
    trained_tokens: int | None = None
    """Tokens that the weights were trained or fitted on since they left their own family's checkpoint; None = none noted."""
    channel_freed: bool = False
    """The decision channel was written out of the weights: it carries decisions only, and stays zeroed."""
    freed_layers: list[int] | None = None
    """Owners in whose groups it was; None = in all of full attention."""

    def __post_init__(self, **kwargs):
        layout, base_layout = kwargs.pop("layout", None), kwargs.pop("base_layout", None)
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.nope_layers = self.nope_layers or []
        if self.layer_types is None and self.sliding_window is not None:
            self.layer_types = [SLIDING_ATTENTION] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        self.layout = self._plain_layout() if layout is None else layout
        self.base_layout = base_layout

    @property
    def layout(self) -> KVLayout:
        """Who keeps what."""
        return self._layout

    @layout.setter
    def layout(self, layout: KVLayout | dict) -> None:
        self._layout = self._checked(layout)

    @property
    def gate_config(self) -> GateConfig | None:
        """`gates` as they are checked and used."""
        return None if self.gates is None else _parsed(tuple(self.gates.items()))

    @property
    def freed_owners(self) -> tuple[int, ...]:
        """Owners in whose groups the decision channel carries decisions only."""
        if not self.channel_freed:
            return ()
        full = (owner for owner in self._layout.owners if self._layout.layers[owner].window is None)
        return tuple(full if self.freed_layers is None else self.freed_layers)

    @property
    def base_layout(self) -> KVLayout:
        """The layout before conversion; of a model that was never converted, its own with nothing evicted."""
        return self._layout.base() if self._base_layout is None else self._base_layout

    @base_layout.setter
    def base_layout(self, layout: KVLayout | dict | None) -> None:
        self._base_layout = None if layout is None else self._checked(layout)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the layouts as JSON, under their own names only."""
        output = super().to_dict()
        del output["_layout"], output["_base_layout"]
        output["layout"] = self._layout.to_json()
        for name in ("gates", "kept_ratios", "trained_tokens", "freed_layers"):
            if output[name] is None:
                del output[name]
        if self._base_layout is not None:
            output["base_layout"] = self._base_layout.to_json()
        return output

    def convert_rope_params_to_dict(self, **kwargs) -> dict[str, Any]:
        """transformers' own step, which on some versions mistakes a dict per attention type for a single one."""
        nested = self.rope_parameters and all(isinstance(value, dict) for value in self.rope_parameters.values())
        return kwargs if nested else super().convert_rope_params_to_dict(**kwargs)

    def _plain_layout(self) -> KVLayout:
        kinds = self.layer_types or [FULL_ATTENTION] * self.num_hidden_layers
        windows = [self.sliding_window if kind == SLIDING_ATTENTION else None for kind in kinds]
        return KVLayout.plain(self.num_hidden_layers, self.num_key_value_heads, self.head_dim, windows)

    def _checked(self, layout: KVLayout | dict) -> KVLayout:
        layout = layout if isinstance(layout, KVLayout) else KVLayout.from_json(layout)
        if layout.num_layers != self.num_hidden_layers:
            raise UserError(
                f"a layout of {layout.num_layers} layers in a config of {self.num_hidden_layers}: "
                "the two must agree: give the layout of this model"
            )
        for index, entry in enumerate(layout.layers):
            if entry.head_dim != self.head_dim or self.num_attention_heads % entry.num_kv_heads:
                raise UserError(
                    f"layer {index} has {entry.num_kv_heads} KV heads of {entry.head_dim} channels in the layout: KV heads "
                    f"divide the {self.num_attention_heads} query heads and have {self.head_dim} channels: give its own layout"
                )
        # Layouts that were made elsewhere may not say which layers turn alike.
        windows = [entry.window for entry in layout.layers]
        return layout.with_rope(rope_kinds(self.nope_layers, self.layer_types, self.rope_parameters, windows))


@lru_cache(maxsize=64)
def _parsed(items: tuple[tuple[str, Any], ...]) -> GateConfig:
    """Checked once, not once a call."""
    return GateConfig.from_json(dict(items))
