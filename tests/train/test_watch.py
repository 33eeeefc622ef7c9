"""How far training is said to be, where there is no terminal."""

from kvfold.eval import progress


def test_the_pace_is_that_of_the_steps(monkeypatch):
    """What came before the first step took its own time; the steps of an earlier start took none of this one's."""
    now, lines = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.watched_steps(64, 32, lines.append) as on_step:
        now[0] += 600.0
        for step in range(33, 65):
            now[0] += 50.0
            on_step({"step": step, "loss": 0.5, "seconds": 50.0})
    assert lines[0] == "step 33 of 64, 26 min left; loss 0.500"
    assert lines[1] == "step 35 of 64, 25 min left; loss 0.500" and len(lines) == 16
    on_step(
        {
            "step": 64,
            "loss": 0.5,
            "seconds": 50.0,
            "compression": 3.9,
            "target_compression": 4,
            "validation_perplexity": 9,
        }
    )
    assert lines[-1] == "step 64 of 64, 0 min left; loss 0.500, compression 3.90 of 4.00, held-out perplexity 9.00"
