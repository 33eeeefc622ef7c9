import torch

from kvfold.eval import reading
from kvfold.eval.reading import score


def test_scores_in_slices_are_scores_of_the_whole(model, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(13, 32, generator=draw) for _ in range(2))
    targets = torch.randint(0, 259, (13,), generator=draw)
    with torch.no_grad():
        p, r = (model.lm_head(x).log_softmax(-1) for x in (ours, theirs))
        whole = score(model, ours, targets, (model, theirs))
        monkeypatch.setattr(reading, "_SLICE_BYTES", 4 * 259 * 5)
        sliced = score(model, ours, targets, (model, theirs))
    torch.testing.assert_close(whole.loss, -p[torch.arange(13), targets])
    torch.testing.assert_close(whole.kl, (r.exp() * (r - p)).sum(-1))
    torch.testing.assert_close(whole.agrees, (p.argmax(-1) == r.argmax(-1)).float())
    for name in ("loss", "kl", "agrees"):
        torch.testing.assert_close(getattr(sliced, name), getattr(whole, name))


def test_without_a_reference_there_is_nothing_to_compare(model):
    with torch.no_grad():
        scores = score(model, torch.zeros(2, 32), torch.tensor([1, 2]))
    assert scores.kl is None
    assert scores.agrees is None
