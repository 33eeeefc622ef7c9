import pytest
import torch
import torch.nn.functional as F

from kvfold.eval import reading
from kvfold.train.objectives import divergence, fired_shares, ratio_loss, summed_in_slices


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def plain_kl(p_logits, q_logits):
    """KL(p || q) of one position by the definition."""
    p, q = p_logits.softmax(0), q_logits.softmax(0)
    return sum(p[v] * (p[v] / q[v]).log() for v in range(len(p)))


@pytest.mark.parametrize("kind", ["reverse", "forward"])
def test_divergence_is_the_definition_and_so_is_its_gradient(kind):
    student, teacher = drawn(10, 11), drawn(10, 11, seed=1).detach()
    ours = divergence(student, teacher, kind)
    pairs = [(s, t) if kind == "reverse" else (t, s) for s, t in zip(student, teacher, strict=True)]
    theirs = torch.stack([plain_kl(*pair) for pair in pairs])
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)
    (found,), (expected,) = (torch.autograd.grad(one.mean(), student) for one in (ours, theirs))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert (divergence(teacher, teacher, kind) == 0).all()


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("trained_states", [False, True])
def test_slices_give_the_gradients_of_the_whole(trained_head, trained_states, monkeypatch):
    monkeypatch.setattr(reading, "_SLICE_BYTES", 4 * 4 * 11)
    states, head, teacher = drawn(10, 6), drawn(11, 6, seed=1), drawn(10, 11, seed=2).detach()
    states.requires_grad_(trained_states)
    head.requires_grad_(trained_head)
    ours = 3 * summed_in_slices(
        lambda part, piece: divergence(F.linear(piece, head), teacher[part], "reverse").sum(),
        states,
        [head],
        vocabulary=11,
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


def test_the_ratio_loss_is_per_sequence_and_one_sided():
    decisions = [(drawn(3, heads, 7, seed=heads).detach() > 0).float() for heads in (1, 2)]
    target, expected = 0.5, 0.0
    for row in range(3):
        fired = torch.cat([one[row].flatten() for one in decisions])
        expected += max(0.0, target - float(fired.mean())) / 3
    given = [decisions[0], None, decisions[1]]
    torch.testing.assert_close(ratio_loss(fired_shares(given), target).item(), expected, rtol=1e-5, atol=1e-7)
    assert ratio_loss(fired_shares(given), 0.0) == 0


def test_the_ratio_loss_presses_only_sequences_that_compress_too_little():
    soft = torch.tensor([[[0.2, 0.4]], [[0.9, 0.8]]], requires_grad=True)
    hard = (soft.detach() > 0.5) + (soft - soft.detach())
    ratio_loss(fired_shares([hard]), 0.6).backward()
    assert (soft.grad[0] < 0).all() and (soft.grad[1] == 0).all()
