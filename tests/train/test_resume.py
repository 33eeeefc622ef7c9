"""A run that is stopped, at any step and in any way, goes on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvfold.models.adapters import read_adapter
from kvfold.train.loop import load_checkpoint
from kvfold.train.run_folder import drop_old, is_whole, newest_whole, read_curve, seal, step_of
from kvfold.train.student import make_student, trained_weights
from tiny_model import tiny_model

DMS = {"time": "dms:4", "compression": 3.0}
DMC = {"time": "dmc:3", "compression": 2.0, "trains": "full", "zero_out_steps": 3, "ramp_steps": 4, "tail_steps": 3}
LORA = {"time": "dmc:3", "compression": 2.0, "trains": "lora", "rank": 2, "zero_out_steps": 2, "kl": "reverse"}
DRAWN = {"trains": "full", "kl": "forward", "drawn_layers": "cla2"}
AVERAGED = {"trains": "full", "kl": "forward", "weight_average": 0.5}


class Stop(Exception):
    """A run ends here."""


@pytest.fixture
def save_steps():
    return 2


def stop_after(step):
    def on_step(point):
        if point["step"] == step:
            raise Stop

    return on_step


def figures(folder):
    """The curve without wall-clock time."""
    return [{name: value for name, value in point.items() if name != "seconds"} for point in read_curve(folder.curve)]


def weights(run):
    return {name: weight.detach().clone() for name, weight in run.model.named_parameters()}


@pytest.mark.parametrize(
    ("given", "stops"),
    [(DMS, (3, 8)), (DMC, (2, 3, 6)), (LORA, (5,)), (DRAWN, (3,)), (AVERAGED, (3, 8))],
    ids=["dms", "dmc", "lora", "drawn", "averaged"],
)
def test_an_interrupted_run_is_the_run(retrofit, given, stops):
    whole = retrofit("whole", **given)
    whole.run()
    for step in stops:
        with pytest.raises(Stop):
            retrofit("cut", on_step=stop_after(step), **given).run()
    cut = retrofit("cut", **given)
    cut.run()
    assert figures(cut.folder) == figures(whole.folder)
    assert [point["step"] for point in figures(cut.folder)] == list(range(1, cut.settings.stages.total + 1))
    expected = weights(whole)
    for name, weight in weights(cut).items():
        assert torch.equal(weight, expected[name]), name


def test_a_run_that_ended_before_its_result_was_written_trains_no_more(retrofit, monkeypatch):
    def fail(*args, **kwargs):
        raise Stop

    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr("kvfold.train.retrofit.write_card", fail)
        retrofit("out", **DMS).run()
    steps = []
    facts = retrofit("out", on_step=steps.append, **DMS).run()
    assert steps == [] and facts["tokens"] == 10 * 128
    assert not list((retrofit("out", **DMS).folder.training).glob("checkpoint-*"))


@pytest.mark.parametrize("given", [DMS, LORA], ids=["dms", "lora"])
def test_a_snapshot_is_the_newest_checkpoint_and_the_run_goes_on(retrofit, tmp_path, given):
    whole = retrofit("whole", **given)
    whole.run()
    with pytest.raises(Stop):
        retrofit("cut", on_step=stop_after(5), **given).run()
    facts = replace(retrofit("cut", **given), snapshot=tmp_path / "shot").run()
    assert facts["tokens"] == 4 * 128 and facts["planned_tokens"] == whole.settings.stages.total * 128
    card = (tmp_path / "shot" / "README.md").read_text()
    assert f"512 of {facts['planned_tokens']:,} planned" in card
    model = tiny_model()
    make_student(model, whole.settings)
    load_checkpoint(tmp_path / "cut" / "training" / "checkpoint-4", model)
    saved = trained_weights(model)
    _, shot = read_adapter(tmp_path / "shot")
    same = {name.removesuffix(".default.weight"): weight for name, weight in saved.items()}
    assert shot.keys() == same.keys()
    assert all(torch.equal(shot[name], weight) for name, weight in same.items() if not name.endswith("bias"))
    cut = retrofit("cut", **given)
    cut.run()
    assert figures(cut.folder) == figures(whole.folder)


def test_a_setting_that_is_newer_than_a_run_had_its_default(retrofit):
    with pytest.raises(Stop):
        retrofit("out", on_step=stop_after(3), **DMS).run()
    run = retrofit("out", **DMS)
    noted = run.folder.read("run")
    del noted["settings"]["fsdp"], noted["settings"]["compression"]
    run.folder.write("run", noted)
    with pytest.raises(ValueError, match=r"a run lies there with compression 4\.0, not 3\.0"):
        run.folder.check(run.source, run.settings)
    noted["settings"]["compression"] = 3.0
    run.folder.write("run", noted)
    run.folder.check(run.source, run.settings)


def test_other_settings_are_refused(retrofit):
    with pytest.raises(Stop):
        retrofit("out", on_step=stop_after(3), **DMS).run()
    with pytest.raises(ValueError, match=r"a run lies there with compression 3\.0, not 2\.0: give the same settings"):
        retrofit("out", **(DMS | {"compression": 2.0})).run()
    with pytest.raises(ValueError, match=r"a run lies there with SOURCE 'tiny', not 'other'"):
        replace(retrofit("out", **DMS), source="other").run()
    run = retrofit("out", **DMS)
    with pytest.raises(ValueError, match=r"a run lies there with dtype 'float32', not 'bfloat16'"):
        run.folder.check(run.source, run.settings, "bfloat16")
    run.folder.write("text", {"sha256": "of another text"})
    with pytest.raises(ValueError, match="begun on another text"):
        run.run()


def test_what_bears_on_time_and_memory_alone_may_change(retrofit, tmp_path):
    """The curve goes on as if nothing had happened, but for rounding."""
    expected, found = [], []
    retrofit("whole", on_step=expected.append, **DMS).run()
    with pytest.raises(Stop):
        retrofit("out", on_step=stop_after(3), **DMS).run()
    changed = {"micro_batch_size": 2, "save_steps": 5, "gradient_checkpointing": True}
    changed["teacher_states"] = str(tmp_path / "states")
    retrofit("out", on_step=found.append, **(DMS | changed)).run()
    assert [point["step"] for point in found] == list(range(found[0]["step"], 11))
    for one, other in zip(expected[-len(found) :], found, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_folder_with_something_else_is_refused(retrofit, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "novel.txt").write_text("a")
    with pytest.raises(ValueError, match="the folder holds something else"):
        retrofit("out", **DMS).run()
    (tmp_path / "file").write_text("a")
    with pytest.raises(ValueError, match="a file is in the way"):
        retrofit("file", **DMS).run()


def test_two_processes_do_not_train_in_one_folder(retrofit, tmp_path):
    run = retrofit("out", **DMS)
    with run.folder.locked():
        with pytest.raises(
            ValueError, match="out: another process trains in this folder: wait until it ends"
        ) as refused:
            run.run()
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
    run.run()
    assert (tmp_path / "out" / "adapter.json").is_file()


def test_a_lock_ends_with_its_process(retrofit, tmp_path):
    run = retrofit("out", **DMS)
    code = "import fcntl, os, sys, time; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX); print(flush=True); time.sleep(99)"
    (tmp_path / "out").mkdir()
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        with pytest.raises(ValueError, match="another process trains in this folder"):
            run.run()
        child.kill()
    run.run()


def test_what_a_writer_that_died_left_is_cleared_away(retrofit, tmp_path):
    left = tmp_path / "out" / "training" / ".partial-99"
    with pytest.raises(Stop):
        retrofit("out", on_step=stop_after(3), **DMS).run()
    left.mkdir()
    retrofit("out", **DMS).run()
    assert not left.exists()


def checkpoint(folder: Path, step: int) -> Path:
    staged = folder / f".partial-{step}"
    staged.mkdir()
    (staged / "weights").write_bytes(b"x" * 1000)
    seal(staged, folder / f"checkpoint-{step}")
    return folder / f"checkpoint-{step}"


def test_only_whole_checkpoints_are_taken(tmp_path):
    first, second = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert newest_whole(tmp_path) == second and step_of(second) == 10
    (second / "weights").write_bytes(b"x" * 999)
    assert newest_whole(tmp_path) == first
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-11" / "weights").write_bytes(b"x" * 1000)
    assert newest_whole(tmp_path) == first and not is_whole(tmp_path / "checkpoint-11")
    (first / "whole.json").write_text("{")
    assert newest_whole(tmp_path) is None and newest_whole(tmp_path / "nowhere") is None
    assert checkpoint(tmp_path, 11) == newest_whole(tmp_path)


def test_old_checkpoints_go_and_torn_ones_too(tmp_path):
    kept = [checkpoint(tmp_path, step) for step in (8, 100, 20)]
    (tmp_path / "checkpoint-300").mkdir()
    drop_old(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-100", "checkpoint-20"]
    assert is_whole(kept[1]) and is_whole(kept[2])


KILLED = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from byte_tokenizer import byte_tokenizer
from tiny_model import tiny_model
from kvfold.train.retrofit import Retrofit
from kvfold.train.run_folder import RunFolder
from kvfold.train.settings import RetrofitSettings
settings = RetrofitSettings(
    time="dms:4", compression=3.0, data=(sys.argv[1],), seq_len=32, global_batch_size=4, learning_rate=1e-3,
    ramp_steps=6, tail_steps=100000, save_steps=1, calibrate=False,
)
about = {"command": "", "version": "", "git_commit": None, "hardware": ""}
Retrofit(
    model=tiny_model(), tokenizer=byte_tokenizer(), source="tiny", name="tiny", settings=settings, about=about,
    folder=RunFolder(out=Path(sys.argv[2])),
).run()
"""


def test_kill_9_leaves_a_whole_checkpoint(retrofit, text, tmp_path):
    """Killed while it writes a checkpoint after each step: what is found is whole, and the run goes on from it."""
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "tests" / "data"), str(root / "tests" / "eval")]
    child = subprocess.Popen([sys.executable, "-c", KILLED, text, str(tmp_path / "out"), *paths])
    endless = {**DMS, "tail_steps": 100000, "save_steps": 1, "micro_batch_size": 1}
    folder = retrofit("out", **endless).folder
    deadline = time.monotonic() + 150
    while folder.done_steps < 3 and time.monotonic() < deadline:
        assert child.poll() is None
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    done = folder.done_steps
    assert done >= 3 and is_whole(folder.checkpoint)
    with pytest.raises(Stop):
        retrofit("out", on_step=stop_after(done + 3), **endless).run()
    with pytest.raises(Stop):
        retrofit("never-killed", on_step=stop_after(done + 3), **endless).run()
    assert json.dumps(figures(folder)) == json.dumps(figures(retrofit("never-killed", **endless).folder))
