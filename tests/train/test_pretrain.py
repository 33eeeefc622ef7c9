"""A model from scratch: what it reaches is what is measured of it, and a run that stops goes on as if it had not."""

import math
from pathlib import Path

import pytest
import torch

import kvfold
from byte_tokenizer import byte_tokenizer
from kvfold.layout.planner import plan, token_bytes
from kvfold.train import objectives
from kvfold.train.data import packed
from kvfold.train.design_space import PretrainSettings, recipes
from kvfold.train.loop import DivergedError
from kvfold.train.pretrain import Pretrain, copy_result, sweep
from kvfold.train.run_folder import RunFolder, read_curve

SMALL = {
    "num_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
    "vocabulary": 300, "layers": "cla2", "tokens": 1280, "seq_len": 32, "global_batch_size": 4,
    "micro_batch_size": 2, "learning_rate": 3e-3, "init_std": 0.1, "save_steps": 3, "validate_steps": 4,
    "validation_tokens": 200,
}  # fmt: skip
MINI = {
    "seq_len": 32, "global_batch_size": 2, "micro_batch_size": 2, "tokens": 20 * 64, "validation_tokens": 64,
    "save_steps": 20,
}  # fmt: skip
FAST = ("mini-h256-gqa4-cla2", "mini-h128-mqa-cla2-dense-back")
MINIS = [name for name in recipes() if name.startswith("mini-")]
ABOUT = {"command": "kvfold train", "version": "0", "git_commit": None, "hardware": "a machine"}


class Stop(Exception):
    """A run ends here."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pretrain(tmp_path, text, tokenizer):
    """`pretrain("out", layers="cla3", ...)`: a run of ten steps of a tiny model, ready to `run()`."""

    def make(out: str, *, on_step=lambda point: None, base=SMALL, **given) -> Pretrain:
        settings = PretrainSettings(**{**base, "data": (text,), "tokenizer": tokenizer, **given})
        folder = RunFolder(out=tmp_path / out)
        return Pretrain(
            recipe="small", settings=settings, folder=folder, text=folder.training, device=torch.device("cpu"),
            about=ABOUT, on_step=on_step,
        )  # fmt: skip

    return make


def figures(run):
    return [{key: value for key, value in one.items() if key != "seconds"} for one in read_curve(run.folder.curve)]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in MINIS])
def test_a_miniature_trains_saves_loads_and_generates(pretrain, tmp_path, name):
    settings = recipes()[name].settings
    run = pretrain("out", base=settings.model_dump(), **MINI)
    facts = run.run()
    points = read_curve(run.folder.curve)
    assert len(points) == 20 and points[-1]["loss"] < points[0]["loss"]
    model, tokenizer = kvfold.load(tmp_path / "out"), kvfold.load_tokenizer(tmp_path / "out")
    assert model.config.layout == settings.layout
    cache, ids = model.new_cache(rows=1), torch.tensor([tokenizer("Once upon a").input_ids])
    out = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.shape == (1, ids.shape[1] + 4)
    # The planner's bytes and the allocator's; this model's numbers have four bytes, the table's two.
    assert cache.allocated_bytes == plan(model).bytes(cache.seen_tokens.tolist())
    assert token_bytes(model.config.layout, 2) == facts["kv_bytes_per_token"] == settings.kv_bytes_per_token


def test_what_is_reported_is_what_the_model_does(pretrain, tmp_path):
    run = pretrain("out")
    facts = run.run()
    model = kvfold.load(tmp_path / "out")
    held_out = packed(run.text / "valid.bin").long()
    with torch.no_grad():
        loss = model(held_out, labels=held_out).loss.item()
    assert facts["validation_loss"] == pytest.approx(loss, rel=1e-4)
    assert facts["validation_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert facts["parameters"] == run.settings.num_parameters and facts["tokens"] == 1280
    measured = [point["step"] for point in figures(run) if "validation_loss" in point]
    assert measured == [4, 8, 10]
    assert f"held-out perplexity | {facts['validation_perplexity']:.2f}" in (tmp_path / "out/README.md").read_text()


def test_a_seed_rules_weights_and_order_but_not_the_text(pretrain):
    runs = [pretrain(out, seed=seed) for out, seed in (("a", 0), ("b", 0), ("c", 1))]
    for run in runs:
        run.run()
    assert figures(runs[0]) == figures(runs[1]) != figures(runs[2])
    texts = [[packed(run.text / f"{part}.bin") for part in ("train", "valid")] for run in runs]
    assert all(torch.equal(texts[0][part].long(), texts[2][part].long()) for part in (0, 1))


def test_accumulation_and_activation_checkpoints_change_nothing(pretrain):
    runs = [pretrain("a"), pretrain("b", micro_batch_size=4), pretrain("c", gradient_checkpointing=True)]
    losses = []
    for run in runs:
        run.run()
        losses.append([point["loss"] for point in figures(run)])
    assert losses[0] == pytest.approx(losses[1], rel=2e-5) and losses[0] == pytest.approx(losses[2], rel=2e-5)


def test_an_interrupted_run_is_the_run(pretrain):
    whole = pretrain("whole")
    whole.run()
    for step in (2, 5, 10):

        def stop(point, step=step):
            if point["step"] == step:
                raise Stop

        with pytest.raises(Stop):
            pretrain("cut", on_step=stop).run()
    cut = pretrain("cut")
    facts = cut.run()
    assert figures(cut) == figures(whole)
    assert facts["validation_loss"] == whole.folder.read("done")["validation_loss"]
    weights = [(run.folder.out / "model.safetensors").read_bytes() for run in (cut, whole)]
    assert weights[0] == weights[1]


def test_what_can_be_resumed_is_never_given_up(pretrain, text):
    """A run that can't have its text any more, and one that never could."""

    def stop(point):
        if point["step"] == 5:
            raise Stop

    with pytest.raises(Stop):
        pretrain("cut", on_step=stop).run()
    cut = pretrain("cut")
    (cut.text / "train.json").unlink()
    words = Path(text).read_text()
    Path(text).unlink()
    for run in (cut, pretrain("new")):
        with pytest.raises(ValueError, match="there is no such file"):
            run.run()
    assert cut.folder.done_steps == 3 and not pretrain("new").folder.out.exists()
    Path(text).write_text(words)
    cut.run()
    assert [point["step"] for point in figures(cut)] == list(range(1, 11))


def test_a_tokenizer_is_trained_and_goes_with_the_model(pretrain, tmp_path):
    for out in ("out", "again"):
        pretrain(out, tokenizer=None, validation_tokens=64, tokens=256).run()
    tokenizer = kvfold.load_tokenizer(tmp_path / "out")
    assert 257 < len(tokenizer) <= 300
    words = "abc défg\n\n  hij 水"
    assert tokenizer.decode(tokenizer(words).input_ids) == words
    found = [(tmp_path / out / "tokenizer.json").read_bytes() for out in ("out", "again")]
    assert found[0] == found[1]


def test_text_of_ones_own_is_held_out(pretrain, tmp_path):
    (tmp_path / "valid.txt").write_text("zebra " * 100)
    run = pretrain("out", valid=(str(tmp_path / "valid.txt"),))
    run.run()
    held_out = packed(run.text / "valid.bin")
    assert kvfold.load_tokenizer(run.folder.out).decode(held_out[0].long()).startswith("zebra zebra")
    assert held_out.shape == (6, 32)


@pytest.fixture
def swept(tmp_path):
    """`swept({1e-3: 30.0, ...})`: a sweep whose runs reach these perplexities; None = it diverges."""

    def run(reached: dict):
        trained = []

        def train_one(settings, folder):
            trained.append(settings.learning_rate)
            found = reached[settings.learning_rate]
            if found is None:
                raise DivergedError("step 3: the loss is nan: it is so")
            folder.write("done", {"validation_perplexity": found})
            (folder.out / "config.json").write_text("{}")
            return {"validation_perplexity": found}

        said = []
        settings = PretrainSettings(**{**SMALL, "learning_rate": 1e-3})
        rows, best = sweep(settings, 1.5, tmp_path / "out", train_one, say=said.append)
        return rows, best.name, trained, said

    return run


def test_a_sweep_goes_on_until_it_improves_no_more(swept):
    reached = {1e-3: 30.0, 1.5e-3: 28.0, 2.25e-3: 27.0, 3.375e-3: 27.5, 5.0625e-3: 1.0}
    rows, best, trained, _ = swept(reached)
    assert best == "lr-0.00225" and trained == list(reached)[:4]
    assert [row["note"] for row in rows] == ["", "", "best", ""]
    assert swept(reached)[2] == []  # what is done is not done again


def test_a_sweep_survives_a_rate_that_diverges(swept):
    rows, best, _, said = swept({1e-3: 30.0, 1.5e-3: 28.0, 2.25e-3: None})
    assert best == "lr-0.0015" and rows[-1]["note"] == "diverged"
    assert said[-1] == "learning rate 0.00225: step 3: the loss is nan: it is so"
    assert swept({1e-3: 30.0, 1.5e-3: 28.0})[2] == []


def test_a_sweep_that_begins_too_high_says_so(swept):
    with pytest.raises(RuntimeError, match="first run came to nothing: step 3: .*: begin at a lower learning rate"):
        swept({1e-3: None})


@pytest.mark.parametrize(
    "given", [{"final_learning_rate": 5.0}, {"max_grad_norm": 0.0}, {"init_std": 0.0}, {"beta2": 1.0}]
)
def test_a_number_that_cannot_be(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        PretrainSettings(**{**SMALL, **given})


def test_a_loss_that_is_no_number_ends_the_run(pretrain, monkeypatch):
    given = objectives.next_token_logits
    monkeypatch.setattr(objectives, "next_token_logits", lambda model, hidden: given(model, hidden) * float("nan"))
    with pytest.raises(DivergedError, match="step 1: the loss is nan: the last good checkpoint"):
        pretrain("out").run()


def test_the_best_is_copied(tmp_path):
    (tmp_path / "best").mkdir()
    for name in ("README.md", "config.json", "model.safetensors"):
        (tmp_path / "best" / name).write_text(name)
    copy_result(tmp_path / "best", tmp_path / "out", card="its own")
    found = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert found == {"README.md": "its own", "config.json": "config.json", "model.safetensors": "model.safetensors"}
