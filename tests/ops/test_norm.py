"""The RMS norm of a decoding step is torch's, on every instruction set and without C."""

import pytest
import torch
import torch.nn.functional as F

from kvfold.ops import native
from kvfold.ops.linear import rms_norm


@pytest.fixture(params=[*(isa for isa in native.instruction_sets() if isa != "generic"), "no C"], autouse=True)
def form(request, monkeypatch):
    monkeypatch.setenv(*(("KVFOLD_NATIVE", "0") if request.param == "no C" else ("KVFOLD_ISA", request.param)))
    native.linear_library.cache_clear()
    yield request.param
    native.linear_library.cache_clear()


@pytest.mark.parametrize("width", [1, 15, 16, 64, 100, 576])
def test_equals_torch(width):
    weight = torch.randn(width)
    for x in (torch.randn(3, 1, width), torch.randn(width, 5).t(), torch.randn(0, width), torch.zeros(1, width)):
        with torch.no_grad():
            ours = rms_norm(x, weight, 1e-5)
        torch.testing.assert_close(ours, F.rms_norm(x, (width,), weight, 1e-5))
        assert ours.shape == x.shape


def test_the_rest_goes_to_torch(form, monkeypatch):
    weight, x = torch.randn(32), torch.randn(4, 32)
    with torch.no_grad():
        few = rms_norm(x, weight, 1e-5)
    monkeypatch.setattr(F, "rms_norm", lambda x, *_: x)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, 1e-5), few) == (form != "no C")
        for other in (x.double(), x.bfloat16(), torch.randn(193, 32)):
            assert rms_norm(other, weight, 1e-5) is other
    assert rms_norm(x, weight, 1e-5) is x  # gradients are wanted
