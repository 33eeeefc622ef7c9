"""Where training text comes from, the blocks of tokens that it becomes, in memory or packed on the disk, and the order in which
a run sees them.

Texts are text and jsonl files, parquet files, and data sets named on the hub. Local text is cut into pieces and shuffled by a
seed over all files, so that a run which needs little of it still sees some of everything: all of it at once where memory has
room, else as it is read. Training from scratch packs its text once a run: one that goes on, and every process, reads the same
file. What is drawn for it depends on the data alone: models of several seeds are trained and measured on the same sequences.

The order is a pure function of the seed and the sample's number, and a sample carries the key of its noise: so a run that
is interrupted goes on with the next sample, and the number of processes changes nothing.
Letters: N blocks, T tokens of a sequence.
"""

import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kvfold.data import TextStream, opening_tokens
from kvfold.errors import UserError, one_line
from kvfold.eval.progress import Report
from kvfold.record import write_whole_file
from kvfold.train.design_space import PretrainSettings

_TEXT_ENDINGS = (".txt", ".md", ".json", ".jsonl", ".gz", ".parquet")
_BUFFER_CHARACTERS = 2**28
"""Of local text in memory at most."""
_HUB_BUFFER = 10_000
"""Documents of a hub data set among which the next is drawn."""


def training_texts(
    sources: Sequence[str], *, seed: int, piece_characters: int, buffer_characters: int = _BUFFER_CHARACTERS
) -> Iterator[str]:
    """Pieces of all sources in an order that the seed rules: those of files first, then those of hub data sets.

    A name with a known ending or a file's path is a local file; anything else is a hub name, or `name:split`. Files of more
    than `buffer_characters` in all are never in memory whole. Raises `UserError`, in one line, for whatever can't be read.
    """
    local = [source for source in sources if _is_local(source)]
    files = [TextStream(Path(source), piece_characters) for source in local]
    pieces, held = [], 0
    for piece in chain.from_iterable(_file_pieces(file, piece_characters) for file in files):
        pieces.append(piece)
        held += len(piece)
        if held > buffer_characters:
            pieces.clear()
            files = [TextStream(Path(source), piece_characters) for source in local]
            yield from _shuffled_on_the_way(files, piece_characters, random.Random(seed), buffer_characters)
            break
    random.Random(seed).shuffle(pieces)
    yield from pieces
    for source in sources:
        if source not in local:
            for text in _hub_texts(source, seed):
                yield from _pieces(text, piece_characters)


def _file_pieces(file: TextStream, most: int) -> Iterator[str]:
    """One file's pieces, each at most about `most` characters."""
    is_empty = True
    for text in file:
        is_empty = False
        yield from _pieces(text, most)
    if is_empty:
        raise UserError(f"{file.path}: there is no text in it: give a file with text")


def _shuffled_on_the_way(files: Sequence[TextStream], piece: int, drawn: random.Random, most: int) -> Iterator[str]:
    """Read all files side by side, each share by share, and draw from the last `most` characters read. A file that was read
    to its end gives the rest at once: what is small is read in one go, and mixed with the beginning of what is not.
    """
    running = [(file, _file_pieces(file, piece)) for file in files]
    pieces: list[str] = []
    held = 0
    while running:
        file, left = max(running, key=lambda one: (one[0].share >= 1, -one[0].share))
        text = next(left, None)
        if text is None:
            running.remove((file, left))
            continue
        pieces.append(text)
        held += len(text)
        while held > most:
            place = drawn.randrange(len(pieces))
            pieces[place], pieces[-1] = pieces[-1], pieces[place]
            held -= len(pieces[-1])
            yield pieces.pop()
    drawn.shuffle(pieces)
    yield from pieces


def _is_local(source: str) -> bool:
    path = Path(source)
    return path.exists() or path.suffix in _TEXT_ENDINGS or source.startswith((".", "/", "~"))


def _hub_texts(source: str, seed: int) -> Iterator[str]:
    """The `text` of a data set's rows, streamed."""
    import datasets

    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # the library raises whatever its many parts raise
        raise UserError(
            f"data '{source}': neither a file nor a data set that can be had ({one_line(error)}): correct it"
        ) from error
    rows = iter(rows.shuffle(seed=seed, buffer_size=_HUB_BUFFER))
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # as above, and whatever a network does
            raise UserError(f"data '{source}': reading it came to an end ({one_line(error)}): try again") from error
        if row is None:
            return
        if not isinstance(row.get("text"), str):
            raise UserError(f"data '{source}': its rows have no text under 'text': use another data set")
        if row["text"].strip():
            yield row["text"]


def _pieces(text: str, most: int) -> Iterator[str]:
    """A text in pieces of at most about `most` characters, cut at line ends where there are any."""
    start = 0
    while start < len(text):
        stop = len(text)
        if stop - start > most:
            stop = text.rfind("\n", start + most // 2, start + most) + 1 or start + most
        if text[start:stop].strip():
            yield text[start:stop].strip("\n")
        start = stop


_PIECE_SEQUENCES = 16
"""Sequences that one piece of text fills, about."""
_CHARACTERS_A_TOKEN = 4
"""About."""
_TEXTS_AT_ONCE = 64
_SPARED_SHARE = 8
"""Where text is short, one block of so many is held out for calibration, and again for measuring."""


def _sequences(sources: Sequence[str], tokenizer: Any, seq_len: int, seed: int) -> Iterator[list[int]]:
    """The sources' tokens in sequences of one length, each opened by the bos where the tokenizer adds one. The documents follow
    each other with a blank line between, as they do in measuring.
    """
    opening = opening_tokens(tokenizer)
    body, waiting = seq_len - len(opening), []
    if body < 1:
        raise UserError(f"sequences of {seq_len} tokens: the opening token takes that many: use longer ones")
    drawn = _drawn_texts(sources, seq_len, seed)
    while texts := list(islice(drawn, _TEXTS_AT_ONCE)):
        # verbose=False: a text longer than the model's context is no mistake here.
        for ids in tokenizer([f"{text}\n\n" for text in texts], add_special_tokens=False, verbose=False).input_ids:
            waiting += ids
        stop = len(waiting) // body * body
        yield from ([*opening, *waiting[start : start + body]] for start in range(0, stop, body))
        waiting = waiting[stop:]


def _drawn_texts(sources: Sequence[str], seq_len: int, seed: int) -> Iterator[str]:
    return training_texts(sources, seed=seed, piece_characters=_PIECE_SEQUENCES * seq_len * _CHARACTERS_A_TOKEN)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingText:
    """Blocks of one draw of text, int64 [N, T] each, none in two parts."""

    train: Tensor
    """What is trained on."""
    calibration: Tensor
    """What gates are fitted and shifted by, never trained on."""
    held_out: Tensor
    """What the result is measured on."""


def draw_text(
    sources: Sequence[str], tokenizer: Any, *, tokens: int, seq_len: int, seed: int, spared: int = 16
) -> TrainingText:
    """As many sequences as `tokens` fill, less where the data is shorter, and up to `spared` more for each other part. Raises
    `UserError` where the data does not fill three sequences, one for each part.
    """
    most = -(-tokens // seq_len) + 2 * spared
    blocks = list(islice(_sequences(sources, tokenizer, seq_len, seed), most))
    if len(blocks) < 3:
        raise UserError(
            f"data of {len(blocks)} sequences of {seq_len:,} tokens: a run takes 3, two of them held out: give more text, or "
            "shorter sequences"
        )
    held = spared if len(blocks) == most else max(1, min(spared, len(blocks) // _SPARED_SHARE))
    whole = torch.tensor(blocks)
    return TrainingText(train=whole[2 * held :], calibration=whole[held : 2 * held], held_out=whole[:held])


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Some rows of one optimizer step's batch."""

    ids_BT: Tensor
    noise_key_B: Tensor
    """The key of each sample's noise, on the CPU."""
    step_positions: int
    """Positions of the whole step, over all processes, that count in a loss over tokens."""
    step_rows: int
    """Sequences of the whole step."""


class TrainingOrder:
    """The sequences of a whole run, one after the other, so many a step. Each pass over the blocks is in an order of its own."""

    def __init__(self, blocks_NT: Tensor, *, steps: int, batch: int, seed: int, ignored: Sequence[int] = ()):
        """`batch`: sequences of one optimizer step, over all processes. `ignored`: token ids whose positions don't count."""
        self._blocks_NT, self._steps, self._batch, self._seed = blocks_NT, steps, batch, seed
        self._counts_N = None
        if ignored:  # else nothing is looked at before its turn: the blocks may lie on the disk
            counted = ~torch.isin(blocks_NT[:, :-1], torch.tensor(ignored, dtype=blocks_NT.dtype))
            self._counts_N = counted.sum(dim=1)

    def batch(self, step: int, rows: Sequence[int], device: torch.device | None = None) -> Batch:
        """Rows of a step's batch, by their places in it, with their tokens on a device."""
        assert step < self._steps, "the run ends before"
        blocks_NT, counts_N, first = self._blocks_NT, self._counts_N, step * self._batch
        positions = self._batch * (blocks_NT.shape[1] - 1)
        if counts_N is not None:
            positions = int(sum(counts_N[self._block_of(first + row)] for row in range(self._batch)))
        return Batch(
            ids_BT=blocks_NT[[self._block_of(first + row) for row in rows]].to(device, torch.int64),
            noise_key_B=torch.tensor([noise_key(self._seed, step, row) for row in rows]),
            step_positions=positions, step_rows=self._batch,
        )  # fmt: skip

    def _block_of(self, sample: int) -> int:
        turn, place = divmod(sample, len(self._blocks_NT))
        return int(_order(self._seed, turn, len(self._blocks_NT))[place])


@lru_cache(maxsize=1)  # a pass at a time: of billions of tokens one is large
def _order(seed: int, turn: int, number: int) -> Tensor:
    source = torch.Generator().manual_seed(noise_key(seed, -2, turn) % 2**63)
    return torch.randperm(number, generator=source)


_BITS = 2**64
_ODD = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)
"""Odd 64-bit numbers without structure; they keep seed, step and index apart."""
_SCATTER = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
"""With these each bit moves about half the bits of the outcome."""


def noise_key(seed: int, step: int, index: int) -> int:
    """A signed 64-bit number, a pure function of the seed, the optimizer step and the sample's place in the global batch.

    Differs: the official code of DMC and DMS seeds a generator in each process, so its result depends on their number.
    """
    mixed = 0
    for value, odd in zip((seed, step, index), _ODD, strict=True):
        mixed = (mixed ^ (value + 1)) * odd % _BITS
        for shift, factor in _SCATTER:
            mixed = (mixed ^ mixed >> shift) * factor % _BITS
        mixed ^= mixed >> 31
    return mixed - _BITS if mixed >= _BITS // 2 else mixed


_END_OF_TEXT = "<|endoftext|>"
_MOST_CHARACTERS = 20_000_000
"""Of the text, so much at most decides which tokens there are."""
_TEXT_SEED = 0


def prepare_text(settings: PretrainSettings, folder: Path, *, report: Report) -> None:
    """Tokenizer and packed text in `folder`, unless they lie there. Raises `UserError` where the data is too short."""
    if (folder / "train.json").is_file():
        return
    length, tokenizer = settings.seq_len, _tokenizer(settings, report)
    train = _sequences(settings.data, tokenizer, length, _TEXT_SEED)
    held = _sequences(settings.valid, tokenizer, length, _TEXT_SEED) if settings.valid else train
    dtype = np.uint16 if settings.vocabulary <= 2**16 else np.uint32
    found = _pack(held, folder / "valid.bin", dtype, most=max(1, settings.validation_tokens // length), report=report)
    tokenizer.save_pretrained(folder / "tokenizer")
    wanted = settings.total_steps * settings.global_batch_size
    if not _pack(train, folder / "train.bin", dtype, most=wanted, report=report) or not found:
        raise UserError(
            f"data too short: {found} sequences of {length:,} tokens are held out, and none is left: "
            "give more text, shorter sequences, or fewer validation_tokens"
        )


def read_text(folder: Path) -> tuple[PreTrainedTokenizerBase, Tensor, Tensor]:
    """Tokenizer, sequences to train on, held-out sequences."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    return tokenizer, packed(folder / "train.bin"), packed(folder / "valid.bin")


def _pack(sequences: Iterator[list[int]], path: Path, dtype: type, *, most: int, report: Report) -> int:
    """Up to `most` of the sequences that are left, in `path`; `packed` reads them. Gives how many there were."""
    written = tokens = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.partial"):  # by a process that died: the folder is locked
        left.unlink()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        for ids in islice(sequences, most):
            file.write(np.asarray(ids, dtype=dtype).tobytes())
            written, tokens = written + 1, len(ids)
            report("packing text", written, most)
    report("packing text", most, most)
    partial.replace(path)
    if written:
        about = {"sequences": written, "seq_len": tokens, "bytes": dtype().itemsize}
        write_whole_file(path.with_suffix(".json"), json.dumps(about) + "\n")
    return written


def packed(path: Path) -> Tensor:
    """The sequences, [N, T], of whatever integer kind the vocabulary takes; pages are read as they are used."""
    about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    shape = about["sequences"], about["seq_len"]
    # Copy on write: torch wants memory that may be written, and nobody writes.
    return torch.from_numpy(np.memmap(path, dtype=f"uint{8 * about['bytes']}", mode="c", shape=shape))


def _tokenizer(settings: PretrainSettings, report: Report) -> PreTrainedTokenizerBase:
    """The one that is named, or a new one. Raises `UserError` where it can't be had or does not fit."""
    from kvfold.models.load import load_tokenizer

    if settings.tokenizer is None:
        report("training the tokenizer", 0, 1)
        found = _trained_tokenizer(_drawn_texts(settings.data, settings.seq_len, _TEXT_SEED), settings.vocabulary)
        report("training the tokenizer", 1, 1)
        return found
    tokenizer = load_tokenizer(settings.tokenizer)
    if len(tokenizer) > settings.vocabulary:
        raise UserError(
            f"tokenizer {Path(settings.tokenizer).name}: it has {len(tokenizer):,} tokens and the model's vocabulary "
            f"{settings.vocabulary:,}: use a vocabulary as large, or another tokenizer"
        )
    return tokenizer


def _trained_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocabulary` tokens, fewer where the text is short; no text is unknown to it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocabulary <= len(alphabet):
        raise UserError(
            f"vocabulary {vocabulary}: a tokenizer of bytes has {len(alphabet) + 1} tokens or more: ask for more, or give a "
            "tokenizer"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[_END_OF_TEXT], show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(_beginning(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def _beginning(texts: Iterable[str]) -> Iterator[str]:
    left = _MOST_CHARACTERS
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return
