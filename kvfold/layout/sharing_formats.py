"""The grammars in which other projects write down which layers share KV: read from a raw config.json.

- transformers: `kv_source_layers` (one owner per layer) and `num_kv_shared_layers` (the last N layers read the nearest
  earlier owner of their own attention type);
- LCKV: `layer_types` as one text, `0_0_2s_2s`, `s` for a sliding layer (transformers' own `layer_types` is a list);
- dolomite-engine: `sharing_pattern`, one owner per layer, never decreasing;
- Hunyuan: `use_cla` with `cla_share_factor` f: layer i owns iff i % f == 0.

A config is read as a dict and never through transformers, which refuses some of these.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from kvfold.errors import UserError
from kvfold.layout.kvlayout import KVLayout
from kvfold.layout.patterns import owner_map


def read_sharing(config: Mapping[str, Any], plain: KVLayout) -> KVLayout:
    """`plain`, the model with every layer an owner, with the sharing that its config names in any of the grammars."""
    found: dict[str, KVLayout] = {}
    for key, read in _READERS.items():
        if config.get(key):
            shared = read(config, plain)
            if shared != plain:
                found[key] = shared
    if len(set(found.values())) > 1:
        raise UserError(
            f"config.json names two owner maps that differ, in {' and '.join(found)}: keep the one that holds"
        )
    return next(iter(found.values()), plain)


def read_sliding(config: Mapping[str, Any]) -> list[bool] | None:
    """Which layers an LCKV text marks as sliding; None where the config holds no such text."""
    text = config.get("layer_types")
    return [part.endswith("s") for part in text.split("_")] if isinstance(text, str) else None


def _read_list(key: str) -> Callable[[Mapping[str, Any], KVLayout], KVLayout]:
    def read(config: Mapping[str, Any], plain: KVLayout) -> KVLayout:
        owners = config[key]
        if not isinstance(owners, list) or not all(type(owner) is int for owner in owners):
            raise UserError(f"{key} {owners!r}: it is a list of layer numbers, one per layer: correct config.json")
        return plain.with_owners(owners)

    return read


def _read_trailing(config: Mapping[str, Any], plain: KVLayout) -> KVLayout:
    return plain.with_owners(owner_map(f"trailing:{config['num_kv_shared_layers']}", *_attention_types(plain)))


def _attention_types(layout: KVLayout) -> tuple[list[tuple[Hashable, ...]], list[bool]]:
    """What transformers tells layers apart by, which is not their rotary positions; and which slide."""
    layers = layout.layers
    return [(one.window, one.num_kv_heads, one.head_dim) for one in layers], [one.window is not None for one in layers]


def _read_lckv(config: Mapping[str, Any], plain: KVLayout) -> KVLayout:
    return KVLayout.parse(config["layer_types"], plain) if isinstance(config["layer_types"], str) else plain


def _read_hunyuan(config: Mapping[str, Any], plain: KVLayout) -> KVLayout:
    factor = config.get("cla_share_factor", 1)
    if type(factor) is not int or factor < 1:
        raise UserError(f"cla_share_factor {factor!r}: it is a whole number of 1 or more: correct config.json")
    return plain.with_owners([layer - layer % factor for layer in range(plain.num_layers)])


_READERS: dict[str, Callable[[Mapping[str, Any], KVLayout], KVLayout]] = {
    "kv_source_layers": _read_list("kv_source_layers"),
    "num_kv_shared_layers": _read_trailing,
    "layer_types": _read_lckv,
    "sharing_pattern": _read_list("sharing_pattern"),
    "use_cla": _read_hunyuan,
}
