"""A kvfold checkpoint in vLLM's own Llama classes: only attention is ours. An owner stacks q, k and v as vLLM does; a reader
has a query alone and names the owner whose memory it attends to, so that vLLM gives it no memory of its own.

vLLM imports this module when it builds the model; everything that needs no vLLM is in vllm.py.
Letters: N tokens of this step (of all requests together), H query heads, K kv heads, D head dim, C model width.
"""

from typing import Any

from torch import Tensor, nn
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index

from kvfold.integrations.vllm import check, sliding_windows, stacked_names
from kvfold.models.config import FoldConfig


class FoldAttention(nn.Module):
    """Attention of one layer; q, and in an owner k and v, are this device's share of the heads."""

    def __init__(
        self,
        config: FoldConfig,
        hidden_size: int,
        num_heads: int,
        cache_config: CacheConfig | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        **_: Any,
    ):
        """vLLM's Llama layer hands over what it read of the config; what a kvfold config says in other words is ignored."""
        super().__init__()
        layer = extract_layer_index(prefix)
        entry, self.head_dim = config.layout.layers[layer], config.head_dim
        devices = get_tensor_model_parallel_world_size()
        self.num_heads, self.num_kv_heads = num_heads // devices, max(1, entry.num_kv_heads // devices)
        self.q_size, self.kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.owner = entry.owner == layer
        self._add_projections(config, hidden_size, num_heads, entry.num_kv_heads, quant_config, prefix)
        self._add_norms(config)
        self.rotary_emb = None if layer in config.nope_layers else _rope(config, layer)
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=sliding_windows(config.layout)[layer],
            kv_sharing_target_layer_name=None if self.owner else _attention_name(prefix, layer, entry.owner),
            prefix=f"{prefix}.attn",
        )

    def _add_projections(
        self, config: FoldConfig, hidden_size: int, num_heads: int, num_kv_heads: int,
        quant_config: QuantizationConfig | None, prefix: str,
    ) -> None:  # fmt: skip
        """One stack of q, k and v; q and a stack of k and v, where these have a norm of their own; or q alone."""
        self.qkv_proj = self.q_proj = self.kv_proj = None
        shared = {"bias": config.qkv_bias, "quant_config": quant_config}
        stacked = {"hidden_size": hidden_size, "head_size": self.head_dim, "total_num_kv_heads": num_kv_heads, **shared}
        if self.owner and not config.kv_norm:
            self.qkv_proj = QKVParallelLinear(total_num_heads=num_heads, prefix=f"{prefix}.qkv_proj", **stacked)
        else:
            self.q_proj = ColumnParallelLinear(
                hidden_size, num_heads * self.head_dim, prefix=f"{prefix}.q_proj", **shared
            )
        if self.owner and config.kv_norm:
            self.kv_proj = QKVParallelLinear(total_num_heads=0, prefix=f"{prefix}.kv_proj", **stacked)
        self.o_proj = RowParallelLinear(
            num_heads * self.head_dim, hidden_size, bias=config.o_bias, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )  # fmt: skip

    def _add_norms(self, config: FoldConfig) -> None:
        """Those of q and k, and of the input of k and v, where the model has them."""
        eps = config.rms_norm_eps
        self.q_norm = self.k_norm = self.kv_norm = self.query_layernorm = self.key_layernorm = None
        if config.qk_norm != "none":
            gained = config.qk_norm == "head"
            self.q_norm = RMSNorm(self.head_dim, eps=eps, has_weight=gained)
            self.k_norm = RMSNorm(self.head_dim, eps=eps, has_weight=gained) if self.owner else None
        if config.qk_norm == "rotated":
            self.query_layernorm, self.key_layernorm = RMSNorm(self.head_dim, eps=eps), RMSNorm(self.head_dim, eps=eps)
        if config.kv_norm and self.owner:
            self.kv_norm = RMSNorm(config.hidden_size, eps=eps)

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor) -> Tensor:
        """[N, C] for the layer's normed input [N, C]; `residual` [N, C] is what was normed."""
        q, k, v = self._projected(hidden_states, residual)
        q = _normed(q, self.q_norm, self.head_dim)
        k = None if k is None else _normed(k, self.k_norm, self.head_dim)
        if self.rotary_emb is not None:
            q, k = self.rotary_emb(positions, q, k)
        if self.query_layernorm is not None:
            # Since q . (w * k) = (q * w) . k, layers with gains of their own can read one cache.
            gain = self.query_layernorm.weight * self.key_layernorm.weight
            q = (q.unflatten(-1, (-1, self.head_dim)) * gain).flatten(-2)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output

    def _projected(self, normed: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """q [N, H * D], and of an owner k and v [N, K * D]."""
        if self.qkv_proj is not None:
            stack, _ = self.qkv_proj(normed)
            return stack.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, _ = self.q_proj(normed)
        if self.kv_proj is None:
            return q, None, None
        stack, _ = self.kv_proj(self.kv_norm(residual))
        return q, *stack.split([self.kv_size, self.kv_size], dim=-1)


class FoldDecoderLayer(LlamaDecoderLayer):
    """vLLM's Llama layer around our attention."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: FoldConfig | None = None):
        super().__init__(vllm_config, prefix=prefix, config=config, attn_layer_type=FoldAttention)

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """As vLLM's own, but that attention also gets the residual stream, which owners may norm apart for k and v."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states, residual=residual)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class FoldForCausalLM(LlamaForCausalLM):
    """vLLM's Llama with layers that share keys and values."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = FoldDecoderLayer):
        config = vllm_config.model_config.hf_config
        check(config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
        owners = config.layout.owners
        # What gates read decisions from says nothing where every token stays.
        unread = dict.fromkeys((".self_attn.fold_norm.", ".self_attn.fold_proj."))
        self.hf_to_vllm_mapper = self.model.hf_to_vllm_mapper = WeightsMapper(
            orig_to_new_substr=unread, orig_to_new_stacked=stacked_names(owners, () if config.kv_norm else owners)
        )


def _rope(config: FoldConfig, layer: int) -> nn.Module:
    """The layer's rotation; where attention types turn apart, that of its type."""
    parameters = config.rope_parameters
    if all(isinstance(value, dict) for value in parameters.values()):
        parameters = parameters[config.layer_types[layer]]
    return get_rope(config.head_dim, max_position=config.max_position_embeddings, rope_parameters=parameters)


def _attention_name(prefix: str, layer: int, owner: int) -> str:
    """The name under which vLLM knows the owner's attention, from that of a reader's block, `...layers.3.self_attn`."""
    before, after = prefix.split(f".layers.{layer}.")
    return f"{before}.layers.{owner}.{after}.attn"


def _normed(x: Tensor, norm: nn.Module | None, head_dim: int) -> Tensor:
    """Each head normed alone, [N, heads * D]."""
    return x if norm is None else norm(x.unflatten(-1, (-1, head_dim))).flatten(-2)
