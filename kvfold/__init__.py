"""kvfold: the KV cache of language models, folded along heads, layers, time and bits.

Importing kvfold does nothing: names resolve when they are first used, and only then torch or transformers are loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvfold.cache.allocator import CacheFull
    from kvfold.cache.hf import FoldCache
    from kvfold.engine.engine import Engine
    from kvfold.errors import UserError
    from kvfold.layout.kvlayout import KVLayout
    from kvfold.layout.planner import Plan, plan
    from kvfold.methods.registry import parse_time
    from kvfold.models.config import FoldConfig
    from kvfold.models.decoder import FoldForCausalLM
    from kvfold.models.gates import CallOptions
    from kvfold.models.load import load, load_tokenizer

__version__ = "0.1.0"

_HOMES = {
    "CallOptions": "kvfold.models.gates",
    "CacheFull": "kvfold.cache.allocator",
    "Engine": "kvfold.engine.engine",
    "FoldCache": "kvfold.cache.hf",
    "FoldConfig": "kvfold.models.config",
    "FoldForCausalLM": "kvfold.models.decoder",
    "KVLayout": "kvfold.layout.kvlayout",
    "Plan": "kvfold.layout.planner",
    "UserError": "kvfold.errors",
    "load": "kvfold.models.load",
    "load_tokenizer": "kvfold.models.load",
    "parse_time": "kvfold.methods.registry",
    "plan": "kvfold.layout.planner",
}

__all__ = [*_HOMES, "register"]


def register() -> None:
    """Teach transformers' Auto classes the model type `kvfold`; `kvfold.load` needs no such call."""
    import_module("kvfold.models")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvfold' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
