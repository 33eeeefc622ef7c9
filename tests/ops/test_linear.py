"""The linear layer for a few rows is `nn.Linear`: same numbers, same shapes, same gradients."""

import pytest
import torch
import torch.nn.functional as F

from kvfold.ops.linear import SkinnyLinear


@pytest.mark.parametrize(
    "shape", [(1,), (7,), (8,), (9,), (40,), (41,), (100,), (3, 5), (2, 4, 2), (8, 1), (0,)], ids=str
)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_linear(shape, bias):
    layer, x = SkinnyLinear(24, 17, bias=bias), torch.randn(*shape, 24)
    with torch.no_grad():
        out = layer(x)
        torch.testing.assert_close(out, F.linear(x, layer.weight, layer.bias))
    assert out.shape == (*shape, 17) and out.is_contiguous()
    trained = layer(x)
    torch.testing.assert_close(trained, F.linear(x, layer.weight, layer.bias))
    if x.numel():
        assert trained.requires_grad


def test_strided_input_and_other_dtypes():
    layer = SkinnyLinear(24, 17)
    x = torch.randn(24, 16).t()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        layer, x = layer.to(torch.bfloat16), x.to(torch.bfloat16)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
