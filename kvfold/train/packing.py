"""Text as tokens on the disk, packed before training begins: sequences of one length, read where they lie.

Packed once a run: one that goes on, and every process, reads the same file. Which text is drawn depends on the data alone,
not on the seed of a run: models of several seeds are measured on the same held-out text and trained on the same sequences.
Letters: N sequences, T tokens.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfold.data.whole_file import write_whole_file
from kvfold.data.windows import opening_tokens
from kvfold.eval.progress import Report
from kvfold.train.data import CHARACTERS_A_TOKEN, PIECE_SEQUENCES, blocks_of
from kvfold.train.sources import training_texts

_TEXT_SEED = 0
_SMALL_IDS = 2**16
"""Vocabularies up to this fit two bytes a token."""


def drawn_texts(sources: Sequence[str], sequence_tokens: int) -> Iterator[str]:
    """Pieces of the sources in an order that is the same for every run."""
    piece = PIECE_SEQUENCES * sequence_tokens * CHARACTERS_A_TOKEN
    return training_texts(sources, seed=_TEXT_SEED, piece_characters=piece)


def sequences_of(texts: Iterator[str], tokenizer: Any, sequence_tokens: int) -> Iterator[list[int]]:
    """The texts' tokens in sequences of one length, each opened by the bos where the tokenizer adds one."""
    opening = opening_tokens(tokenizer)
    body = sequence_tokens - len(opening)
    return ([*opening, *ids] for ids in blocks_of(texts, tokenizer, body) if len(ids) == body)


def pack(sequences: Iterator[list[int]], path: Path, *, most: int, vocabulary: int, report: Report) -> int:
    """Up to `most` of the sequences that are left, in `path`; `packed` reads them. Gives how many there were."""
    kind, written, tokens = _kind(vocabulary), 0, 0
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        for ids in islice(sequences, most):
            file.write(np.asarray(ids, dtype=kind).tobytes())
            written, tokens = written + 1, len(ids)
            report("packing text", written, most)
    report("packing text", most, most)
    partial.replace(path)
    if written:
        about = {"sequences": written, "sequence_tokens": tokens, "bytes": kind().itemsize}
        write_whole_file(_about(path), json.dumps(about) + "\n")
    return written


def is_packed(path: Path) -> bool:
    """Whether there are sequences for `packed` to read."""
    return _about(path).is_file()


def packed(path: Path) -> Tensor:
    """The sequences, [N, T], of whatever integer kind the vocabulary takes; pages are read as they are used."""
    about = json.loads(_about(path).read_text(encoding="utf-8"))
    shape = about["sequences"], about["sequence_tokens"]
    # Copy on write: torch wants memory that may be written, and nobody writes.
    return torch.from_numpy(np.memmap(path, dtype=f"uint{8 * about['bytes']}", mode="c", shape=shape))


def _about(path: Path) -> Path:
    return path.with_suffix(".json")


def _kind(vocabulary: int) -> type:
    return np.uint16 if vocabulary <= _SMALL_IDS else np.uint32
