"""How a kept entry is stored: in the model's dtype, or in 8 or 4 bits. K and V apart."""

from dataclasses import dataclass
from typing import Literal, Self, cast, get_args

from kvfold.errors import UserError, unknown_name

Storage = Literal["model", "fp8", "int8", "int4"]

SCALE_CHANNELS = 32
"""Channels that share one scale in int8 and int4. Scales never span tokens: slots are overwritten one by one."""
SCALE_BYTES = 2
"""A scale is fp16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BitsSpec:
    """Storage of the keys and of the values of one owner."""

    k: Storage = "model"
    """Storage of keys."""
    v: Storage = "model"
    """Storage of values."""

    def __post_init__(self) -> None:
        for storage in (self.k, self.v):
            if storage not in get_args(Storage):
                raise unknown_name("storage", storage, get_args(Storage))

    @classmethod
    def parse(cls, text: str) -> Self:
        """`int8` for both, or `int8,int4` for keys and values apart."""
        parts = [part.strip() for part in text.split(",")]
        if len(parts) > 2:
            raise UserError(f"bits '{text}': storage is named once, or for keys and values: write e.g. 'int8,int4'")
        return cls(k=cast(Storage, parts[0]), v=cast(Storage, parts[-1]))

    def format(self) -> str:
        """`int8`, or `int8,int4` where keys and values differ."""
        return self.k if self.k == self.v else f"{self.k},{self.v}"

    def slot_bytes(self, head_dim: int, model_bytes: int) -> tuple[int, int]:
        """Bytes of one key and of one value, scales included; `model_bytes` = one number in the model's dtype."""
        return storage_bytes(self.k, head_dim, model_bytes), storage_bytes(self.v, head_dim, model_bytes)


def storage_bytes(storage: Storage, head_dim: int, model_bytes: int) -> int:
    """Bytes of one vector of `head_dim` numbers: fp8 has no scales, an odd int4 vector is padded to whole bytes."""
    scales = SCALE_BYTES * -(-head_dim // SCALE_CHANNELS)
    sizes = {
        "model": head_dim * model_bytes,
        "fp8": head_dim,
        "int8": head_dim + scales,
        "int4": -(-head_dim // 2) + scales,
    }
    return sizes[storage]
