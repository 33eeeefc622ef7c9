"""Quantised vectors: against a loop over single channels, and what the format promises."""

import math

import pytest
import torch

from kvfold.methods.bits import storage_bytes
from kvfold.ops.quantised import dequantise, page_width, quantise, scale_groups, storage_dtype, storage_of, turned

DIMS = [1, 16, 31, 46, 64, 80, 96, 128, 256]
STORAGES = ["fp8", "int8", "int4"]


def by_loops(vector, storage):
    """Bytes and scales of one vector, channel by channel."""
    least, largest = {"int8": (-127, 127), "int4": (-8, 7)}[storage]
    codes, scales = [], []
    for first in range(0, len(vector), 32):
        group = [float(x) for x in vector[first : first + 32]]
        peak = torch.tensor(max(group, key=lambda x: (abs(x), x)), dtype=torch.float32)
        scale = torch.clamp(peak.abs() / largest if storage == "int8" else peak / least, -65504.0, 65504.0).half()
        scales.append(scale)
        whole = [
            0 if scale == 0 else max(least, min(largest, round(float(torch.tensor(x) / scale.float())))) for x in group
        ]
        if storage == "int8":
            codes += whole
            continue
        half = math.ceil(len(whole) / 2)
        for j in range(half):
            high = whole[j + half] + 8 if j + half < len(whole) else 0
            codes.append(whole[j] + 8 | high << 4)
    return torch.tensor(codes).to(storage_dtype(storage, torch.float32)), torch.stack(scales)


@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("size", [1e-9, 1e-3, 1.0, 300.0, 1e7])
def test_codes_and_scales_equal_a_loop_over_channels(storage, head_dim, size):
    x = torch.randn(5, head_dim, generator=torch.Generator().manual_seed(head_dim)) * size
    x[2] = 0
    codes, scales = quantise(x, storage)
    for i in range(5):
        expected_codes, expected_scales = by_loops(x[i], storage)
        assert torch.equal(scales[i], expected_scales)
        assert torch.equal(codes[i], expected_codes)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("head_dim", DIMS)
def test_bytes_are_those_that_are_planned(storage, head_dim):
    codes, scales = quantise(torch.randn(3, 2, head_dim), storage)
    assert codes.shape == (3, 2, page_width(storage, head_dim)) and codes.dtype == storage_dtype(storage, torch.half)
    assert storage_of(codes.dtype) == storage
    size = codes[0, 0].nbytes
    if scales is not None:
        assert scales.shape == (3, 2, scale_groups(head_dim)) and scales.dtype == torch.float16
        size += scales[0, 0].nbytes
    assert size == storage_bytes(storage, head_dim, 4)


@pytest.mark.parametrize(("storage", "step"), [("int8", 0.5 / 127), ("int4", 1 / 8), ("fp8", 2**-4)])
@pytest.mark.parametrize("head_dim", DIMS)
def test_what_comes_back_is_within_half_a_step_in_int4_one(storage, step, head_dim):
    x = torch.randn(4, head_dim, generator=torch.Generator().manual_seed(1))
    back = dequantise(*quantise(x, storage), storage, head_dim, torch.float32)
    amax = torch.stack([group.abs().amax(dim=-1) for group in x.split(32, dim=-1)], dim=-1)
    bound = x.abs() if storage == "fp8" else amax.repeat_interleave(32, dim=-1)[:, :head_dim]
    # Beyond half a step: an int8 or int4 scale is rounded to fp16, and the smallest fp8 numbers lie 2^-9 apart.
    assert ((back - x).abs() <= bound * (step + 2.0**-10) + (2.0**-10 if storage == "fp8" else 0)).all()


def test_int4_uses_all_its_codes():
    x = torch.cat((torch.arange(-8.0, 8), torch.arange(7.0, -9, -1)))
    assert torch.equal(dequantise(*quantise(x, "int4"), "int4", 32, torch.float32), x)
    assert torch.equal(dequantise(*quantise(-x, "int4"), "int4", 32, torch.float32), -x)


def test_ties_go_to_even():
    x = torch.tensor([127.0, 0.5, 1.5, -0.5, -2.5])
    assert quantise(x, "int8")[0].tolist() == [127, 0, 2, 0, -2]


@pytest.mark.parametrize("storage", STORAGES)
def test_nan_and_overflow(storage):
    x = torch.tensor([1.0, torch.nan, 3.0])
    assert dequantise(*quantise(x, storage), storage, 3, torch.float32)[1].isnan()
    huge = torch.tensor([3e38, -3e38, 1.0])
    back = dequantise(*quantise(huge, storage), storage, 3, torch.float32)
    assert back.isfinite().all() and min(back[0], -back[1]) > 400


def test_model_storage_keeps_the_vector():
    x = torch.randn(3, 8).bfloat16()
    codes, scales = quantise(x, "model")
    assert codes is x and scales is None
    assert torch.equal(dequantise(codes, None, "model", 8, torch.float32), x.float())


@pytest.mark.parametrize("dim", [1, 46, 64, 96, 128])
def test_turned_keys(dim):
    """Turned twice they are as before, products with queries stay, and one large channel is spread over its block."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 5, dim)
    torch.testing.assert_close(turned(turned(k, "int4"), "int4"), k)
    torch.testing.assert_close(turned(q, "int4") @ turned(k, "int4").T, q @ k.T, atol=1e-4, rtol=1e-4)
    block = dim & -dim
    one = torch.zeros(dim)
    one[0] = 8.0
    torch.testing.assert_close(turned(one, "int4")[:block], torch.full((block,), 8 / block**0.5))
    assert turned(k, "int8") is k


def test_a_channel_that_stands_out_costs_less():
    torch.manual_seed(0)
    k = torch.randn(200, 64)
    k[:, 5] += 12
    errors = []
    for turn in (lambda x: x, lambda x: turned(x, "int4")):
        codes, scales = quantise(turn(k), "int4")
        errors.append((turn(dequantise(codes, scales, "int4", 64, torch.float32)) - k).square().mean())
    assert errors[1] < 0.5 * errors[0]
