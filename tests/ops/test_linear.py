"""A linear layer, packed or not, is `nn.Linear`: same numbers, same shapes, same gradients, whatever happens to its weights."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from kvfold.ops import native
from kvfold.ops.linear import PackableLinear, PackedWeights, fp32_rows, project

SHAPES = [(1,), (2,), (3,), (8,), (63,), (192,), (193,), (3, 5), (2, 4, 2), (8, 1), (0,)]
TOLERANCE = {
    torch.float32: {},
    torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2},
    torch.float16: {"atol": 2e-3, "rtol": 2e-3},
}
needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch has no MKL: nothing is packed")


def packed_layers(*outputs, inputs=72, bias=False, dtype=torch.float32):
    layers = [PackableLinear(inputs, size, bias=bias).to(dtype) for size in outputs]
    if not all(PackedWeights.helps(layer.weight) for layer in layers):
        pytest.skip(f"this CPU has no quicker form for {dtype}")
    together = PackedWeights(layers)
    for layer in layers:
        layer.packed = together
    return layers


def plain(x, layers):
    return [F.linear(x, layer.weight, layer.bias) for layer in layers]


def spoiled(layer):
    """From here on the product can't come from the layer's weights unnoticed."""
    copy = layer.packed
    if copy.panels_NCW is not None:
        copy.panels_NCW.mul_(2)
    else:
        copy._onednn = torch.ops.mkldnn._reorder_linear_weight(2 * torch.cat([one.weight for one in copy._layers]), 16)


@pytest.fixture(params=[*(isa for isa in native.instruction_sets() if isa != "generic"), "no C"])
def form(request, monkeypatch):
    """The products of each instruction set, and those of a machine without a compiler."""
    monkeypatch.setenv(*(("KVFOLD_NATIVE", "0") if request.param == "no C" else ("KVFOLD_ISA", request.param)))
    native.linear_library.cache_clear()
    yield request.param
    native.linear_library.cache_clear()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 19, 192])
@pytest.mark.parametrize("outputs", [(64,), (100, 331), (96, 144)], ids=str)
def test_every_form_equals_linear(form, rows, outputs):
    layers = packed_layers(*outputs, inputs=71)
    assert (layers[0].packed.panels_NCW is None) == (form == "no C")
    x = torch.randn(rows, 71)
    with torch.no_grad():
        for ours, theirs in zip(project(x, *layers), plain(x, layers), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("outputs", [(65,), (100,), (70, 66), (576,), (960, 192, 64), (100, 331)], ids=str)
def test_equals_linear(shape, bias, dtype, outputs):
    layers = packed_layers(*outputs, bias=bias, dtype=dtype)
    x = torch.randn(*shape, 72, dtype=dtype)
    with torch.no_grad():
        for ours, theirs in zip(project(x, *layers), plain(x, layers), strict=True):
            torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype])
            assert ours.shape == theirs.shape
        for layer, theirs in zip(layers, plain(x, layers), strict=True):
            torch.testing.assert_close(layer(x), theirs, **TOLERANCE[dtype])


@needs_mkl
@pytest.mark.parametrize("outputs", [80, 160])
def test_the_copy_is_used_for_few_rows_only(outputs):
    (layer,) = packed_layers(outputs)
    spoiled(layer)
    with torch.no_grad():
        for rows in (1, 2, 3, 192, 193):
            x = torch.randn(rows, 72)
            doubled = torch.allclose(layer(x), 2 * F.linear(x, layer.weight), atol=1e-5)
            assert doubled == (rows in fp32_rows())


@needs_mkl
def test_strided_input():
    (layer,) = packed_layers(160)
    x = torch.randn(72, 16).t()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight))
        x = torch.randn(16, 3, 72)[:, 1]
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight))


@needs_mkl
def test_gradients_go_to_the_weights():
    layers = packed_layers(160, 96)
    spoiled(layers[0])
    x = torch.randn(8, 72, requires_grad=True)
    first, second = project(x, *layers)
    (first.sum() + second.sum()).backward()
    assert x.grad is not None and all(layer.weight.grad is not None for layer in layers)
    torch.testing.assert_close(first, F.linear(x, layers[0].weight))


def written(layer):
    with torch.no_grad():
        layer.weight[3] = 0.5


def replaced(layer):
    layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight))


def behind_the_back(layer):
    layer.weight.data += 0.25


def given_other_memory(layer):
    layer.weight.data = torch.randn_like(layer.weight)


def loaded(layer):
    layer.load_state_dict({"weight": torch.randn_like(layer.weight)})


@needs_mkl
@pytest.mark.parametrize("outputs", [(72, 70), (160, 96)], ids=str)
@pytest.mark.parametrize("edit", [written, replaced, behind_the_back, given_other_memory, loaded])
def test_an_edit_is_seen(edit, outputs):
    layers, x = packed_layers(*outputs), torch.randn(8, 72)
    with torch.no_grad():
        project(x, *layers)
        before = layers[1].packed
        edit(layers[1])
        for ours, theirs in zip(project(x, *layers), plain(x, layers), strict=True):
            torch.testing.assert_close(ours, theirs)
        assert layers[1].packed is before, "the copy is made anew in place"
        spoiled(layers[0])
        assert not torch.allclose(project(x, *layers)[0], plain(x, layers)[0]), "and is used again"


@needs_mkl
def test_another_dtype_and_back():
    (layer,) = packed_layers(160)
    x = torch.randn(8, 72)
    with torch.no_grad():
        layer(x)
        layer.to(torch.float64)
        torch.testing.assert_close(layer(x.double()), F.linear(x.double(), layer.weight))
        layer.to(torch.float32)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight))


@needs_mkl
def test_hooks_run():
    layers, x, seen = packed_layers(160, 96), torch.randn(8, 72), []
    layers[1].register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        project(x, *layers)
    assert len(seen) == 1


@needs_mkl
def test_inference_mode_and_autocast():
    layers, x = packed_layers(160, 96), torch.randn(8, 72)
    with torch.inference_mode():
        for ours, theirs in zip(project(x, *layers), plain(x, layers), strict=True):
            torch.testing.assert_close(ours, theirs)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert project(x, *layers)[0].dtype == torch.bfloat16


@needs_mkl
def test_copies_and_pickles_leave_it_behind():
    (layer,) = packed_layers(160)
    assert list(layer.state_dict()) == ["weight"]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.packed is None
        x = torch.randn(8, 72)
        with torch.no_grad():
            torch.testing.assert_close(other(x), layer(x))


@needs_mkl
def test_what_is_not_packed():
    assert not PackedWeights.helps(torch.empty(63, 72))
    assert not PackedWeights.helps(torch.empty(128, 128, dtype=torch.float64))
    assert not PackedWeights.helps(torch.empty(128, 128, device="meta"))
