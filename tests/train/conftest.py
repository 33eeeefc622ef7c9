import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import random
from pathlib import Path

import pytest

from byte_tokenizer import byte_tokenizer
from kvfold.train.retrofit import Retrofit
from kvfold.train.run_folder import RunFolder
from kvfold.train.settings import RetrofitSettings
from tiny_model import tiny_model

SMALL = {
    "seq_len": 32,
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "learning_rate": 1e-3,
    "calibrate": False,
}


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A file of 9,000 letters in words."""
    draw = random.Random(0)
    path = tmp_path / "letters.txt"
    path.write_text("".join(draw.choice("abcdefgh \n") for _ in range(9000)), encoding="utf-8")
    return str(path)


@pytest.fixture
def save_steps() -> int:
    """Checkpoints cost these tests more than the steps between them: one at the end, unless a file asks for more."""
    return 1000


@pytest.fixture
def settings(text, save_steps):
    """`settings(time="dms:4", ...)`: a run of ten steps on the text, unless said otherwise."""

    def make(**given) -> RetrofitSettings:
        stages = {"ramp_steps": 6, "tail_steps": 4}
        return RetrofitSettings(**(SMALL | stages | {"data": (text,), "save_steps": save_steps} | given))

    return make


@pytest.fixture
def retrofit(tmp_path, settings):
    """`retrofit("out", trains="full", ...)`: a retrofit of the tiny model, ready to `run()`."""

    def make(out: str, *, model=None, teacher=None, on_step=lambda point: None, **given) -> Retrofit:
        model = tiny_model() if model is None else model
        about = {"command": "kvfold retrofit", "version": "0", "git_commit": None, "hardware": "a machine"}
        return Retrofit(
            model=model, tokenizer=byte_tokenizer(), source="tiny", name="tiny", settings=settings(**given),
            folder=RunFolder(out=tmp_path / out), about=about, teacher=teacher, on_step=on_step,
        )  # fmt: skip

    return make


@pytest.fixture
def gone_on(retrofit):
    """`gone_on(time="dms:4", ...)`: the same run twice: undisturbed, and broken off behind a checkpoint and gone on from it."""

    def make(**given) -> tuple[Retrofit, Retrofit]:
        def stop(point):
            if point["step"] == 5:
                raise KeyboardInterrupt

        given["save_steps"] = 2
        whole = retrofit("whole", **given)
        whole.run()
        with pytest.raises(KeyboardInterrupt):
            retrofit("cut", on_step=stop, **given).run()
        rest = retrofit("cut", **given)
        assert rest.folder.done_steps == 4
        rest.run()
        return whole, rest

    return make
