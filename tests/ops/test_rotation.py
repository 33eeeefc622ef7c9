"""Rotary positions against transformers' own and against turning pairs by an angle."""

import cmath

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvfold.ops import native
from kvfold.ops import rotation as rotation_module
from kvfold.ops.rotation import Rotation, rotate


def angles(positions, width, base=100.0):
    """[..., T, width / 2]: the angle of each pair at each position."""
    return positions.double()[..., None] * base ** (-torch.arange(0, width, 2).double() / width)


def rotation(positions, width):
    turn = torch.cat((angles(positions, width),) * 2, dim=-1).float()
    return Rotation(cos_BTR=turn.cos(), sin_BTR=turn.sin())


@pytest.mark.parametrize("rows", [1, 3])
def test_equals_transformers(rows):
    x = torch.randn(3, 7, 4, 8)
    by_position = rotation(torch.stack([torch.arange(7) + 5 * row for row in range(rows)]), 8)
    theirs, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), by_position.cos_BTR, by_position.sin_BTR)
    torch.testing.assert_close(rotate(by_position, x), theirs.transpose(1, 2), atol=0, rtol=0)


@pytest.mark.parametrize("width", [2, 4, 8])
def test_turns_pairs_and_passes_the_rest(width):
    x, positions = torch.randn(1, 5, 2, 8), torch.tensor([[0, 1, 2, 40, 41]])
    out = rotation(positions, width).apply(x)
    turn = angles(positions, width)
    for t in range(5):
        for h in range(2):
            for i in range(width // 2):
                pair = complex(x[0, t, h, i], x[0, t, h, i + width // 2]) * cmath.exp(1j * float(turn[0, t, i]))
                assert float(out[0, t, h, i]) == pytest.approx(pair.real, abs=1e-5)
                assert float(out[0, t, h, i + width // 2]) == pytest.approx(pair.imag, abs=1e-5)
    assert torch.equal(out[..., width:], x[..., width:])


def test_a_layer_without_rotation_passes_everything():
    x = torch.randn(1, 5, 2, 8)
    assert rotate(None, x) is x


def test_products_depend_on_the_distance_alone():
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    products = []
    for shift in (0, 3, 50):
        q_turned = rotation(torch.tensor([[7 + shift]]), 8).apply(q)
        products.append(float((q_turned * rotation(torch.tensor([[2 + shift]]), 8).apply(k)).sum()))
    assert products == pytest.approx([products[0]] * 3, abs=1e-4)


@pytest.mark.parametrize("isa", [one for one in native.instruction_sets() if one != "generic"])
@pytest.mark.parametrize(("heads", "dims", "width"), [(1, 2, 2), (3, 64, 64), (9, 80, 20), (2, 46, 46), (1, 33, 6)])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_decoding_step_in_c_equals_torch(isa, heads, dims, width, rows, monkeypatch):
    monkeypatch.setenv("KVFOLD_ISA", isa)
    native.linear_library.cache_clear()
    calls, plain = [], rotation_module.few_rows
    monkeypatch.setattr(rotation_module, "few_rows", lambda *asked: calls.append(plain(*asked)) or calls[-1])
    try:
        wide = torch.randn(rows, 1, (heads + 2) * dims)[..., dims : (heads + 1) * dims].view(rows, 1, heads, dims)
        for angles_of in (rows, 1):
            turn = rotation(torch.randint(0, 5000, (angles_of, 1)), width)
            expected = turn.apply(
                wide.double().float().requires_grad_()
            ).detach()  # torch's, since gradients are wanted
            with torch.no_grad():
                torch.testing.assert_close(turn.apply(wide), expected, atol=1e-6, rtol=1e-6)
                calls.clear()
                turn.apply(wide)
                turn.apply(wide.double())
                apart = wide.transpose(2, 3).contiguous().transpose(2, 3)
                torch.testing.assert_close(turn.apply(apart), expected, atol=1e-6, rtol=1e-6)
            assert calls[0] is not None and calls[1] is None, "doubles are torch's"
    finally:
        native.linear_library.cache_clear()
