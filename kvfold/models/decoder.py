"""The decoder as a Hugging Face model: embedding, layers, head, and the choice of the view through which a call attends.

The parts of a layer live in blocks.py, what `generate` needs beyond a plain forward in generation.py.
Letters: B rows, T tokens of this call, C model width, V vocabulary.
"""

import warnings
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from kvfold.cache.hf import FoldCache
from kvfold.cache.views import TrainingView
from kvfold.errors import UserError
from kvfold.layout.planner import PAGE_SLOTS
from kvfold.models.adapters import gates_for_cache
from kvfold.models.blocks import FoldLayer, FoldRMSNorm
from kvfold.models.config import FoldConfig
from kvfold.models.gates import (
    PLAIN,
    CallOptions,
    FoldCausalLMOutput,
    FoldOutput,
    GateCall,
    GatedModel,
    GateNorm,
    GateProjection,
    GateRecord,
    GateSet,
    GateTable,
    gate_table,
    joined,
)
from kvfold.models.generation import FoldGeneration, check_cache
from kvfold.models.rope import Rope
from kvfold.ops.linear import PackableLinear
from kvfold.ops.rotation import Rotation


class FoldPreTrainedModel(PreTrainedModel):
    """What the bare decoder and the language model share: loading, initial weights, and making a cache."""

    config_class = FoldConfig
    config: FoldConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["FoldLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["fold_norm", "fold_proj"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FoldRMSNorm | GateNorm):
            (init.zeros_ if module.offset else init.ones_)(module.weight)
        if isinstance(module, GateProjection):
            init.zeros_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
            if module.heads is not None:
                init.copy_(module.heads, module.heads.new_tensor(module.first_numbers).expand_as(module.heads))

    def new_cache(
        self, rows: int, *, time: str | None = None, bits: str | None = None, gates: str | GateSet | None = None,
        memory_bytes: int | None = None, page_slots: int = PAGE_SLOTS,
    ) -> FoldCache:  # fmt: skip
        """An empty cache for `rows` texts, a transformers `Cache`. With `memory_bytes` it reserves that much at once and never
        takes more; without, it grows.

        `time` and `bits` hold for this cache alone, in place of the config's. `gates`: what decides under a learned method:
        None = the model's own, an adapter's folder or name, a `GateSet`, or `channel` = the published freed channel.
        Raises `UserError` for a learned method without gates.
        """
        layout = self.config.layout.folded(time, bits)
        gate_set = None if gates is None else gates_for_cache(self, gates, layout)
        for method in layout.time:
            method.gates_among(self.config.gate_config if gate_set is None else gate_set.config)
        return FoldCache(
            layout, dtype=self.dtype, device=self.device, rows=rows, memory_bytes=memory_bytes, page_slots=page_slots,
            base_layout=self.config.base_layout, gates=gate_set,
        )  # fmt: skip


class FoldModel(FoldPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: FoldConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(FoldLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = FoldRMSNorm(config.hidden_size, config)
        self.gradient_checkpointing = False
        self._rope, self._layers = Rope(config), config.layout.layers
        self._warned: set[str] = set()
        scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self.attention_options = {"scale": scale, "softcap": config.attention_softcap}
        """As views take them."""
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: FoldCache | None = None, inputs_embeds: Tensor | None = None, use_cache: bool | None = None,
        output_hidden_states: bool | None = None, noise_key: Tensor | None = None, output_decisions: bool = False,
        options: CallOptions | None = None,
    ) -> FoldOutput:  # fmt: skip
        """The residual stream after the last norm, [B, T, C]. `attention_mask` is [B, columns], 0 at padding; its last T columns
        are this call's. `position_ids` rules rotary positions only: order and windows follow the real tokens.
        `noise_key`, int64 [B]: in training, decisions get noise that depends on it alone. `output_decisions`: return what
        the gates decided. `options`: whatever else this call asks for.
        """
        hidden, options = self._embedded(input_ids, inputs_embeds), options or PLAIN
        rows, tokens = hidden.shape[:2]
        real = None if attention_mask is None else _real_tokens(attention_mask, rows, tokens)
        cache = past_key_values
        fits = isinstance(cache, FoldCache) and cache.layout.layers is self._layers
        if not fits or self.training or options.sharing:
            cache = self._cache_of(past_key_values, use_cache, rows, options)
        # A wrong number of rows is the cache's to refuse.
        begun = cache is not None and cache.columns > 0 and len(cache.rows) == rows
        rotations = self._rotations(position_ids, real, cache.seen_tokens if begun else None, hidden)
        run_options = {"noise_key": noise_key, "records": output_decisions, "keep": output_hidden_states}
        if cache is None or tokens == 1:
            return self._run(hidden, real, rotations, cache, options, **run_options)
        parts = []
        for start, end in cache.pieces(real, num_rows=rows, num_tokens=tokens):
            piece_rotations = [rotation and rotation.part(start, end) for rotation in rotations]
            piece = None if real is None else real[:, start:end]
            parts.append(self._run(hidden[:, start:end], piece, piece_rotations, cache, options, **run_options))
        return joined(parts)

    def _run(
        self, hidden: Tensor, real: Tensor | None, rotations: list[Rotation | None], cache: FoldCache | None,
        options: CallOptions, *, noise_key: Tensor | None, records: bool, keep: bool | None,
    ) -> FoldOutput:  # fmt: skip
        """All layers over one piece of a call: through the cache, or without one through the training view."""
        if cache is None:
            layout, gate_set = self.config.layout, None
            if options.sharing is not None:
                layout = layout.with_owners([one.owner for one in options.sharing.layers])
            table = gate_table(self.config.gate_config, layout, freed_owners=self.config.freed_owners)
            call: Any = nullcontext(TrainingView(layout, real_BT=real, **self.attention_options))
        else:
            layout, table, gate_set = cache.layout, cache.gate_table or self._gate_table(cache), cache.gates
            call = cache.call(real, num_rows=hidden.shape[0], num_tokens=hidden.shape[1], **self.attention_options)
        record, states = GateRecord() if records else None, []
        gates = None if table.is_empty else GateCall(table, self.training, options, noise_key, record, gate_set)
        keep = self.config.output_hidden_states if keep is None else keep
        # Pages are written in place, so no gradient could pass through them.
        with torch.set_grad_enabled(cache is None and torch.is_grad_enabled()), call as view:
            for layer, rotation in zip(self.layers, rotations, strict=True):
                if keep:
                    states.append(hidden)
                hidden = layer(hidden, view, rotation, gates)
            hidden = self.norm(hidden)
        kept = (*states, hidden) if keep else None
        decided = {} if record is None else record.fields(layout.owners)
        return FoldOutput(last_hidden_state=hidden, past_key_values=cache, hidden_states=kept, **decided)

    def _gate_table(self, cache: FoldCache) -> GateTable:
        """Worked out once for a cache, at its first call."""
        config = self.config.gate_config if cache.gates is None else cache.gates.config
        cache.gate_table = gate_table(config, cache.layout, freed_owners=self.config.freed_owners)
        return cache.gate_table

    def opened(self, ids_BT: Tensor) -> tuple[Tensor, list[Rotation | None]]:
        """Of texts without padding: the residual stream before the first layer, and each layer's rotation, for those who run the
        layers one by one through a view of their own.
        """
        hidden = self._embedded(ids_BT, None)
        return hidden, self._rotations(None, None, None, hidden)

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("input_ids and inputs_embeds: a call takes one of the two: give the other up")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if hidden.ndim != 3 or not hidden.shape[1]:
            raise UserError(f"input {tuple(hidden.shape[:-1])}: it is [rows, tokens] with 1 token or more: feed some")
        multiplier = self.config.embedding_multiplier
        # Rounded to the dtype first, as the families that have one were trained.
        return hidden if multiplier == 1.0 else hidden * torch.tensor(multiplier, dtype=hidden.dtype).item()

    def _rotations(
        self, position_ids: Tensor | None, real_BT: Tensor | None, seen: Tensor | None, hidden: Tensor
    ) -> list[Rotation | None]:
        """Positions are the real tokens seen before, unless they were given."""
        if position_ids is None:
            order = torch.arange(hidden.shape[1], device=hidden.device)
            order = order if real_BT is None else (real_BT.long().cumsum(dim=1) - 1).clamp(min=0)
            position_ids = order if seen is None else order + seen[:, None]
        return self._rope.rotations(torch.atleast_2d(position_ids), hidden.dtype, continued=seen is not None)

    def _check_layout(self) -> None:
        """Who owns can't change under the weights, what is kept can."""
        layout, built = self.config.layout, tuple(sorted({layer.owner for layer in self._layers}))
        if layout.owners != built:
            raise UserError(
                f"the layout was changed to owners {layout.owners}, the weights have owners {built}: "
                "a model's layers are fixed once it is built: use `kvfold convert`"
            )

    def _cache_of(
        self, given: FoldCache | None, use_cache: bool | None, rows: int, options: CallOptions
    ) -> FoldCache | None:
        """The cache of this call: the one given, a fresh one where one is to come back, or None for the training view."""
        if self.config.layout.layers is not self._layers:
            self._check_layout()
        if given is not None:
            return self._checked(given, options)
        if options.sharing is not None:
            return None
        self._warn_of_steps()
        wanted = self.config.use_cache if use_cache is None else use_cache
        return self.new_cache(rows=rows) if wanted and not self.training and not torch.is_grad_enabled() else None

    def _checked(self, given: Any, options: CallOptions) -> FoldCache:
        """What was given is a cache of this model, and of use in this call."""
        if options.sharing is not None:
            raise UserError("past_key_values while layers share for a while: convert the model, or leave the cache out")
        check_cache(given)
        if given.layout.layers != self.config.layout.layers:
            raise UserError(
                "past_key_values was made for a model of other layers or heads: make one with new_cache of the model that uses it"
            )
        if self.training and torch.is_grad_enabled():
            raise UserError(
                "past_key_values in training: no gradient passes through a cache: leave it out or call eval()"
            )
        return given

    def _warn_of_steps(self) -> None:
        """Once for training, once for inference: without a cache, methods that evict between calls evict nothing."""
        steps = sorted({method.title for method in self.config.layout.time if not method.chunk_invariant})
        if steps and self.training not in self._warned:
            self._warned.add(self.training)
            rule = "it is off in training" if self.training else "a call without a cache reads its own tokens whole"
            warnings.warn(f"{' and '.join(steps)} evicts tokens between calls: {rule}", stacklevel=3)


class FoldForCausalLM(FoldPreTrainedModel, FoldGeneration, GatedModel, GenerationMixin):
    """The decoder with its language model head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: FoldConfig):
        super().__init__(config)
        self.model = FoldModel(config)
        self.lm_head = PackableLinear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: FoldCache | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int | Tensor = 0, output_hidden_states: bool | None = None,
        noise_key: Tensor | None = None, output_decisions: bool = False, options: CallOptions | None = None, **kwargs,
    ) -> FoldCausalLMOutput:  # fmt: skip
        """Logits [B, T or fewer, V], and with `labels` the loss. `logits_to_keep`: the last so many (0 = all), or the indices
        of the tokens wanted. What `kwargs` holds goes to the loss function, as in transformers. The rest as in `FoldModel`.
        """
        if kwargs.pop("output_attentions", None):
            raise UserError("output_attentions: attention weights are not kept: leave it out")
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, output_hidden_states=output_hidden_states,
            noise_key=noise_key, output_decisions=output_decisions, options=options, return_dict=True,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # Behind a cache only the head would still learn: no gradient at all is the honest answer.
        with torch.set_grad_enabled(torch.is_grad_enabled() and outputs.past_key_values is None):
            logits = self.lm_head(outputs.last_hidden_state[:, kept])
            scale, softcap = self.config.logit_scale, self.config.final_logit_softcap
            logits = logits if scale == 1.0 else logits * scale
            logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return FoldCausalLMOutput(loss=loss, logits=logits, **{name: outputs.get(name) for name in _PASSED_ON})


_PASSED_ON = ("past_key_values", "hidden_states", "decisions", "gate_probs")
"""What the language model returns as its decoder gave it."""


def _real_tokens(attention_mask: Tensor, rows: int, tokens: int) -> Tensor | None:
    """The call's own columns of the mask, bool [B, T]; None where nothing is padding."""
    shape = tuple(getattr(attention_mask, "shape", ()))
    if len(shape) != 2 or shape[0] != rows or shape[1] < tokens:
        raise UserError(
            f"attention_mask of shape {shape} for {rows} rows of {tokens} tokens: it is [rows, columns], 1 where real: give that"
        )
    real = attention_mask[:, -tokens:].bool()
    return None if real.all() else real
