"""How a key or a value is written in a page: the model's dtype, fp8, int8 or int4, and back.

Keys kept in int4 lie in other channels than the model's (`turned`), since a few of theirs are much larger than the rest.
int8 and int4 have one fp16 scale for each slot and group of 32 channels (the last group may be shorter), so that slots can be
overwritten one by one. In int4, the largest channel of a group takes the least code, -8, and gives the scale its sign, so that
all sixteen codes are used. int4 holds code + 8 in a nibble: within a group of r channels, byte j has channel
j in its low nibble and channel j + ceil(r / 2) in its high one. A page's storage is told by its dtype.
Letters: D head dim, S scale groups, W bytes of an int4 vector.
"""

import functools

import torch
from torch import Tensor

GROUP_CHANNELS = 32
"""Channels that share one scale."""
_CODES = {"int8": (-127, 127), "int4": (-8, 7)}
"""The least and the largest code."""
_LARGEST_SCALE = torch.finfo(torch.float16).max
_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}


def storage_dtype(storage: str, model_dtype: torch.dtype) -> torch.dtype:
    """The dtype of pages with this storage."""
    return model_dtype if storage == "model" else _DTYPES[storage]


def storage_of(dtype: torch.dtype) -> str:
    """The storage of pages with this dtype: 'model' for every float that is not fp8."""
    return next((storage for storage, known in _DTYPES.items() if known == dtype), "model")


def scale_groups(head_dim: int) -> int:
    """Scales of one int8 or int4 vector."""
    return -(-head_dim // GROUP_CHANNELS)


def page_width(storage: str, head_dim: int) -> int:
    """Elements of one vector in a page: two int4 channels share a byte."""
    return -(-head_dim // 2) if storage == "int4" else head_dim


def page_arrays(name: str, storage: str, head_dim: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What a slot holds of a vector under fp8, int8 or int4, by array: its shape and dtype."""
    codes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {name: ((page_width(storage, head_dim),), _DTYPES[storage])}
    if storage == "fp8":
        return codes
    return codes | {f"{name}_scale": ((scale_groups(head_dim),), torch.float16)}


def indexable(pages: Tensor) -> Tensor:
    """Pages in a dtype that can be indexed: torch moves fp8 about only as bytes."""
    return pages.view(torch.uint8) if pages.dtype == torch.float8_e4m3fn else pages


def quantise(x: Tensor, storage: str) -> tuple[Tensor, Tensor | None]:
    """Codes [..., page_width] and, for int8 and int4, scales fp16 [..., S] of vectors x [..., D].

    'model' gives x itself. fp8 saturates at 448. NaN stays NaN: as a code in fp8, as the group's scale in int8 and int4.
    """
    if storage == "model":
        return x, None
    if storage == "fp8":
        largest = torch.finfo(torch.float8_e4m3fn).max
        return x.float().clamp(-largest, largest).to(torch.float8_e4m3fn), None
    least, largest = _CODES[storage]
    grouped = _in_groups(x.float())
    high, low = grouped.amax(dim=-1), grouped.amin(dim=-1)
    scales = (torch.where(high >= -low, high, low) / least).clamp(-_LARGEST_SCALE, _LARGEST_SCALE).half()
    if storage == "int8":
        scales = scales.abs()
    # A scale of zero stands for zeros: all were 0, or too small for fp16.
    codes = (grouped / scales.float().unsqueeze(-1)).round().clamp(least, largest)
    codes = codes.masked_fill((scales == 0).unsqueeze(-1), 0).nan_to_num(0).to(torch.int8)
    codes = codes.flatten(-2)[..., : x.shape[-1]]
    return (codes if storage == "int8" else _packed(codes)), scales


def dequantise(codes: Tensor, scales: Tensor | None, storage: str, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Vectors [..., D] in `dtype` from what `quantise` gave; code times scale is worked out in fp32."""
    if storage in ("model", "fp8"):
        return codes.to(dtype)
    if storage == "int4":
        codes = _unpacked(codes, head_dim)
    scaled = _in_groups(codes.float()) * scales.float().unsqueeze(-1)
    return scaled.flatten(-2)[..., :head_dim].to(dtype)


def turned(x: Tensor, storage: str) -> Tensor:
    """Keys [..., D], or the queries that meet them, in the channels in which keys lie under this storage, in fp32; turned twice
    they are as they were. Products of queries and keys don't change.

    Under int4 each channel becomes a sum of all of them with signs: what stood out in one is spread over all, and a group's
    scale is not wasted on it. Other storages leave keys alone.
    Source: QuaRot (arXiv 2404.00456) section 4. Differs: on 4-bit keys alone, after rotary positions, with the signs of the
    plain Hadamard matrix; in a head dim that is no power of two, block by block.
    """
    if storage != "int4":
        return x
    matrix = _hadamard(x.shape[-1] & -x.shape[-1], x.device)
    return (x.float().unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)


@functools.cache
def _hadamard(size: int, device: torch.device) -> Tensor:
    """The Hadamard matrix of a power of two, symmetric and its own inverse."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return (matrix / size**0.5).to(device)


def _in_groups(x: Tensor) -> Tensor:
    """[..., S, 32], the last group filled up with zeros."""
    missing = -x.shape[-1] % GROUP_CHANNELS
    return torch.nn.functional.pad(x, (0, missing)).unflatten(-1, (-1, GROUP_CHANNELS))


def _packed(codes: Tensor) -> Tensor:
    """Bytes [..., W] of int4 codes [..., D]."""
    nibbles = (codes + 8).to(torch.uint8)
    low, high = _halves(nibbles.shape[-1], codes.device)
    # An odd group has no channel for its last high nibble: that one stays 0.
    beyond = torch.nn.functional.pad(nibbles, (0, 1))
    return nibbles[..., low] | (beyond[..., high] << 4)


def _unpacked(packed: Tensor, head_dim: int) -> Tensor:
    """int4 codes [..., D] of bytes [..., W]."""
    low, high = _halves(head_dim, packed.device)
    codes = packed.new_empty((*packed.shape[:-1], head_dim + 1), dtype=torch.int8)
    codes[..., low] = (packed & 15).to(torch.int8) - 8
    codes[..., high] = (packed >> 4).to(torch.int8) - 8
    return codes[..., :head_dim]


def _halves(head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Channel in the low and in the high nibble of each byte; `head_dim` where there is none."""
    low: list[int] = []
    high: list[int] = []
    for first in range(0, head_dim, GROUP_CHANNELS):
        channels = min(GROUP_CHANNELS, head_dim - first)
        half = -(-channels // 2)
        low += range(first, first + half)
        high += [*range(first + half, first + channels), *([head_dim] if channels % 2 else [])]
    return torch.tensor(low, device=device), torch.tensor(high, device=device)
