"""The key of a sample's noise: the same however the samples of a step are spread over processes and accumulation steps."""

_BITS = 2**64
_ODD = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)
"""Odd 64-bit numbers without structure; they keep seed, step and index apart."""


def noise_key(seed: int, step: int, index: int) -> int:
    """A signed 64-bit number, a pure function of the seed, the optimizer step and the sample's place in the global batch.

    Differs: the official code of DMC and DMS seeds a generator in each process, so its result depends on their number.
    """
    mixed = 0
    for value, odd in zip((seed, step, index), _ODD, strict=True):
        mixed = _scattered((mixed ^ (value + 1)) * odd % _BITS)
    return mixed - _BITS if mixed >= _BITS // 2 else mixed


def _scattered(value: int) -> int:
    """Each bit of the input moves about half the bits of the output."""
    for shift, odd in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = ((value ^ value >> shift) * odd) % _BITS
    return value ^ value >> 31
