"""Writing a model's folder so that a reader finds it whole or not at all: weights, config, generation config, tokenizer."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel

from kvfold.errors import UserError
from kvfold.models.load import load_tokenizer, quiet
from kvfold.models.source import Source

_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("chat_template*", "*.model", "*.tiktoken"),
)
"""What tokenizers are made of, as patterns of file names."""


def check_folder(out: Path) -> None:
    """Refuse a place where no new folder can be, before any work is done."""
    if out.parts[:1] == ("~",):
        raise UserError(f"{out}: no home folder is known: write the whole path")
    if out.is_file() or any(parent.is_file() for parent in out.parents):
        raise UserError(f"{out}: a file is in the way: name a folder that is not there yet")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: the folder is not empty: name a new one, or empty it")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well, and is removed when it doesn't."""
    check_folder(out)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_model(model: PreTrainedModel, out: Path, found: Source) -> None:
    """Save a model with the tokenizer of its source, where that has one."""
    with whole_folder(out) as folder, quiet():
        model.save_pretrained(folder)
        copy_tokenizer(found, folder)


def copy_tokenizer(found: Source, folder: Path) -> None:
    """The tokenizer's files as they lie in a local folder; from a hub or a GGUF file, as transformers writes them."""
    source = Path(found.name)
    if source.is_dir() and found.gguf is None:
        names = {path for pattern in _TOKENIZER_FILES for path in source.glob(pattern) if path.is_file()}
        for path in sorted(names):
            shutil.copyfile(path, folder / path.name)
        return
    try:
        tokenizer = load_tokenizer(str(found))
    except ValueError:
        # A model without a tokenizer is none the worse for it.
        return
    tokenizer.save_pretrained(folder)
