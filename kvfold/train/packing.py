"""A tokenizer, and text as tokens on the disk, packed before training from scratch begins: sequences of one length, read where
they lie.

Packed once a run: one that goes on, and every process, reads the same file. Which text is drawn depends on the data alone,
not on the seed of a run: models of several seeds are measured on the same held-out text and trained on the same sequences.
Letters: N sequences, T tokens.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kvfold.data.whole_file import write_whole_file
from kvfold.data.windows import opening_tokens
from kvfold.errors import UserError
from kvfold.eval.progress import Report
from kvfold.train.data import CHARACTERS_A_TOKEN, PIECE_SEQUENCES, blocks_of, training_texts
from kvfold.train.pretrain_settings import PretrainSettings

END_OF_TEXT = "<|endoftext|>"
_MOST_CHARACTERS = 20_000_000
"""Of the text, so much at most decides which tokens there are."""
_TEXT_SEED = 0
_SMALL_IDS = 2**16
"""Vocabularies up to this fit two bytes a token."""


def drawn_texts(sources: Sequence[str], seq_len: int) -> Iterator[str]:
    """Pieces of the sources in an order that is the same for every run."""
    piece = PIECE_SEQUENCES * seq_len * CHARACTERS_A_TOKEN
    return training_texts(sources, seed=_TEXT_SEED, piece_characters=piece)


def sequences_of(texts: Iterator[str], tokenizer: Any, seq_len: int) -> Iterator[list[int]]:
    """The texts' tokens in sequences of one length, each opened by the bos where the tokenizer adds one."""
    opening = opening_tokens(tokenizer)
    body = seq_len - len(opening)
    return ([*opening, *ids] for ids in blocks_of(texts, tokenizer, body) if len(ids) == body)


def pack(sequences: Iterator[list[int]], path: Path, *, most: int, vocabulary: int, report: Report) -> int:
    """Up to `most` of the sequences that are left, in `path`; `packed` reads them. Gives how many there were."""
    kind, written, tokens = _kind(vocabulary), 0, 0
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.partial"):  # by a process that died: the folder is locked
        left.unlink()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        for ids in islice(sequences, most):
            file.write(np.asarray(ids, dtype=kind).tobytes())
            written, tokens = written + 1, len(ids)
            report("packing text", written, most)
    report("packing text", most, most)
    partial.replace(path)
    if written:
        about = {"sequences": written, "seq_len": tokens, "bytes": kind().itemsize}
        write_whole_file(_about(path), json.dumps(about) + "\n")
    return written


def is_packed(path: Path) -> bool:
    """Whether there are sequences for `packed` to read."""
    return _about(path).is_file()


def packed(path: Path) -> Tensor:
    """The sequences, [N, T], of whatever integer kind the vocabulary takes; pages are read as they are used."""
    about = json.loads(_about(path).read_text(encoding="utf-8"))
    shape = about["sequences"], about["seq_len"]
    # Copy on write: torch wants memory that may be written, and nobody writes.
    return torch.from_numpy(np.memmap(path, dtype=f"uint{8 * about['bytes']}", mode="c", shape=shape))


def _about(path: Path) -> Path:
    return path.with_suffix(".json")


def _kind(vocabulary: int) -> type:
    return np.uint16 if vocabulary <= _SMALL_IDS else np.uint32


def prepare_text(settings: PretrainSettings, folder: Path, *, report: Report) -> None:
    """Tokenizer and packed text in `folder`, unless they lie there. Raises `UserError` where the data is too short."""
    if is_packed(folder / "train.bin"):
        return
    length, options = settings.seq_len, {"vocabulary": settings.vocabulary, "report": report}
    tokenizer = _tokenizer(settings, report)
    train = sequences_of(drawn_texts(settings.data, length), tokenizer, length)
    held = sequences_of(drawn_texts(settings.valid, length), tokenizer, length) if settings.valid else train
    found = pack(held, folder / "valid.bin", most=max(1, settings.validation_tokens // length), **options)
    tokenizer.save_pretrained(folder / "tokenizer")
    wanted = settings.total_steps * settings.global_batch_size
    if not pack(train, folder / "train.bin", most=wanted, **options) or not found:
        raise UserError(
            f"data too short: {found} sequences of {length:,} tokens are held out, and none is left: "
            "give more text, shorter sequences, or fewer validation_tokens"
        )


def _tokenizer(settings: PretrainSettings, report: Report) -> PreTrainedTokenizerBase:
    if settings.tokenizer is not None:
        return given_tokenizer(settings.tokenizer, settings.vocabulary)
    report("training the tokenizer", 0, 1)
    texts = drawn_texts(settings.data, settings.seq_len)
    found = train_tokenizer(texts, settings.vocabulary)
    report("training the tokenizer", 1, 1)
    return found


def read_text(folder: Path) -> tuple[PreTrainedTokenizerBase, Tensor, Tensor]:
    """Tokenizer, sequences to train on, held-out sequences."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    return tokenizer, packed(folder / "train.bin"), packed(folder / "valid.bin")


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocabulary` tokens, fewer where the text is short; no text is unknown to it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    least = len(pre_tokenizers.ByteLevel.alphabet()) + 1
    if vocabulary < least:
        raise UserError(
            f"vocabulary {vocabulary}: a tokenizer of bytes has {least} tokens or more: ask for more, or give a tokenizer"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(_some(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def given_tokenizer(source: str, vocabulary: int) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or on the hub. Raises `UserError` where it can't be had or does not fit."""
    from kvfold.models.load import load_tokenizer

    tokenizer = load_tokenizer(source)
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"tokenizer {Path(source).name}: it has {len(tokenizer):,} tokens and the model's vocabulary {vocabulary:,}: "
            "use a vocabulary as large, or another tokenizer"
        )
    return tokenizer


def _some(texts: Iterable[str]) -> Iterator[str]:
    left = _MOST_CHARACTERS
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return
