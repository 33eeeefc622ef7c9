import pytest
import torch
import torch.nn.functional as F

from kvfold.train import objectives
from kvfold.train.objectives import distillation, divergence, fired_shares, ratio_loss, summed_in_slices


@pytest.fixture
def small_slices(monkeypatch):
    monkeypatch.setattr(objectives, "_SLICE_BYTES", 3 * 4 * 11)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def plain_kl(p_logits, q_logits):
    """KL(p || q) of one position by the definition."""
    p, q = p_logits.softmax(0), q_logits.softmax(0)
    return sum(p[v] * (p[v] / q[v]).log() for v in range(len(p)))


@pytest.mark.parametrize("kind", ["reverse", "forward"])
def test_distillation_is_the_definition_and_so_is_its_gradient(small_slices, kind):
    student, teacher = drawn(10, 11), drawn(10, 11, seed=1).detach()
    real = torch.tensor([True] * 4 + [False] + [True] * 4 + [False])
    ours = distillation(student, teacher, real, kind)
    pairs = [(s, t) if kind == "reverse" else (t, s) for s, t in zip(student, teacher, strict=True)]
    theirs = sum(plain_kl(*pair) for pair, counts in zip(pairs, real, strict=True) if counts) / 8
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)
    (found,), (expected,) = torch.autograd.grad(ours, student), torch.autograd.grad(theirs, student)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert (found[~real] == 0).all()


def test_distillation_from_oneself_is_nothing():
    logits = drawn(5, 11).detach()
    assert distillation(logits, logits, torch.ones(5, dtype=torch.bool)) == 0


def test_positions_that_do_not_count_may_hold_anything():
    student, teacher = drawn(4, 11).detach(), drawn(4, 11, seed=1).detach()
    real = torch.tensor([True, True, False, True])
    other = teacher.clone()
    other[2] = 50.0
    assert distillation(student, teacher, real) == distillation(student, other, real)
    assert distillation(student, teacher, torch.zeros(4, dtype=torch.bool)) == 0


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("trained_states", [False, True])
def test_slices_give_the_gradients_of_the_whole(trained_head, trained_states):
    states, head, teacher = drawn(10, 6), drawn(11, 6, seed=1), drawn(10, 11, seed=2).detach()
    states.requires_grad_(trained_states)
    head.requires_grad_(trained_head)
    ours = 3 * summed_in_slices(
        lambda part, piece: divergence(F.linear(piece, head), teacher[part], "reverse").sum(),
        states,
        [head],
        slice_rows=4,
    )
    theirs = 3 * divergence(F.linear(states, head), teacher, "reverse").sum()
    torch.testing.assert_close(ours, theirs.float())
    trained = [one for one in (states, head) if one.requires_grad]
    if trained:
        pairs = zip(torch.autograd.grad(ours, trained), torch.autograd.grad(theirs, trained), strict=True)
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    else:
        assert not ours.requires_grad


@pytest.mark.parametrize("padded", [False, True])
def test_the_ratio_loss_is_per_sequence_and_one_sided(padded):
    decisions = [(drawn(3, heads, 7, seed=heads).detach() > 0).float() for heads in (1, 2)]
    real = torch.ones(3, 7, dtype=torch.bool)
    real[1, :4] = not padded
    target, expected = 0.5, 0.0
    for row in range(3):
        fired = [
            float(one[row, head, token])
            for one in decisions for head in range(one.shape[1]) for token in range(7) if real[row, token]
        ]  # fmt: skip
        expected += max(0.0, target - sum(fired) / len(fired)) / 3
    given = [decisions[0], None, decisions[1]]
    torch.testing.assert_close(
        ratio_loss(fired_shares(given, real if padded else None), target).item(), expected, rtol=1e-5, atol=1e-7
    )
    assert ratio_loss(fired_shares(given), 0.0) == 0


def test_the_ratio_loss_presses_only_sequences_that_compress_too_little():
    soft = torch.tensor([[[0.2, 0.4]], [[0.9, 0.8]]], requires_grad=True)
    hard = (soft.detach() > 0.5) + (soft - soft.detach())
    ratio_loss(fired_shares([hard]), 0.6).backward()
    assert (soft.grad[0] < 0).all() and (soft.grad[1] == 0).all()
