"""A tiny Llama checkpoint with a tokenizer, and `kvfold(...)`: a command line in this process, in an empty folder."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging
from typer.testing import CliRunner

from kvfold.cli import app
from kvfold.eval import passkey
from kvfold.ops.native import library

SAMPLE = Path(__file__).parents[2] / "kvfold" / "assets" / "sample" / "persuasion.txt"
VOCAB_SIZE, CONTEXT = 768, 256


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of stderr, where the command refused its input and printed nothing else."""
        assert (self.code, self.out) == (2, "") and self.err.count("\n") == 1 and self.err.endswith("\n"), self
        return self.err.rstrip("\n")


@pytest.fixture(scope="session")
def trained_checkpoint(tmp_path_factory) -> Path:
    """A folder as transformers writes it: two layers, four query heads on two KV heads of 8, 256 positions."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    words = Tokenizer(BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False)
    # The passkey's own sentences too, so that a prompt with one is short.
    sentences = "".join((passkey._OPENING, *passkey._FILLER, passkey._NEEDLE, passkey._QUESTION))
    words.train_from_iterator([SAMPLE.read_text(encoding="ascii")[:60_000], *[sentences] * 50], trainer)
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=CONTEXT).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": CONTEXT}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, **shape, **heads))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def folder(trained_checkpoint, tmp_path, monkeypatch) -> Path:
    """Every test stands in a folder of its own: `tiny` is the checkpoint, `text.txt` a page of the sample."""
    # Before KVFOLD_CACHE leads to an empty folder, in which the C file would be compiled once more.
    library()
    (tmp_path / "tiny").symlink_to(trained_checkpoint)
    (tmp_path / "text.txt").write_text(SAMPLE.read_text(encoding="ascii")[:3000])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    verbosity = logging.get_verbosity()
    yield tmp_path
    logging.set_verbosity(verbosity)


@pytest.fixture
def kvfold(capfd) -> Callable[..., Outcome]:
    """`kvfold("plan tiny --batch 4")`; whatever reaches the process's own stdout and stderr fails the test."""

    def run(line: str, *more: str, stdin: str | bytes = "") -> Outcome:
        result = CliRunner().invoke(app, [*shlex.split(line), *more], input=stdin, catch_exceptions=False)
        assert capfd.readouterr() == ("", "")
        return Outcome(code=result.exit_code, out=result.stdout, err=result.stderr)

    return run
