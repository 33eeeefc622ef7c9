"""Packed blocks of tokens, all of one length, and the order in which a run sees them.

The order is a pure function of the seed and the sample's number, and a sample carries the key of its noise: so a run that
is interrupted goes on with the next sample, and the number of processes changes nothing.
Letters: N blocks, T tokens of a sequence.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvfold.data.windows import opening_tokens
from kvfold.errors import UserError
from kvfold.train.sources import training_texts

PIECE_SEQUENCES = 16
"""Sequences that one piece of text fills, about."""
CHARACTERS_A_TOKEN = 4
"""About."""
_TEXTS_AT_ONCE = 64
_BITS = 2**64
_ODD = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)
"""Odd 64-bit numbers without structure; they keep seed, step and index apart."""
_SPARED_SHARE = 8
"""Where text is short, one block of so many is held out for calibration, and again for measuring."""


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
    """As many sequences as `tokens` fill, less where the data is shorter, and up to `spared` more for each other part.

    The documents follow each other with a blank line between, as they do in measuring. Raises `UserError` where the data
    does not fill three sequences, one for each part.
    """
    wanted = -(-tokens // seq_len)
    piece = PIECE_SEQUENCES * seq_len * CHARACTERS_A_TOKEN
    texts = training_texts(sources, seed=seed, piece_characters=piece)
    opening = opening_tokens(tokenizer)
    body = seq_len - len(opening)
    if body < 1:
        raise UserError(f"sequences of {seq_len} tokens: the opening token takes that many: use longer ones")
    blocks, seen = [], 0
    for ids in blocks_of(texts, tokenizer, body):
        seen += len(ids)
        if len(ids) == body:
            blocks.append([*opening, *ids])
        if len(blocks) == wanted + 2 * spared:
            break
    if len(blocks) < 3:
        raise UserError(
            f"data of {seen:,} tokens: a sequence takes {seq_len:,}, and a run takes 3, two of them held out: "
            "give more text, or shorter sequences"
        )
    plenty = len(blocks) == wanted + 2 * spared
    held = spared if plenty else max(1, min(spared, len(blocks) // _SPARED_SHARE))
    whole = torch.tensor(blocks)
    return TrainingText(train=whole[2 * held :], calibration=whole[held : 2 * held], held_out=whole[:held])


def blocks_of(texts: Iterable[str], tokenizer: Any, size: int) -> Iterator[list[int]]:
    """The ids of all texts cut into lists of `size`; the last may be shorter."""
    waiting: list[int] = []
    for part in _batched(texts):
        # verbose=False: a text longer than the model's context is no mistake here.
        for ids in tokenizer([f"{text}\n\n" for text in part], add_special_tokens=False, verbose=False).input_ids:
            waiting += ids
        stop = len(waiting) // size * size
        yield from (waiting[start : start + size] for start in range(0, stop, size))
        waiting = waiting[stop:]
    if waiting:
        yield waiting


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for text in texts:
        part.append(text)
        if len(part) == _TEXTS_AT_ONCE:
            yield part
            part = []
    if part:
        yield part


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
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64))
        self._members: tuple[int, list[int]] = (-1, [])

    def batch(self, step: int, rows: Sequence[int], device: torch.device | None = None) -> Batch:
        """Rows of a step's batch, by their places in it, with their tokens on a device."""
        assert step < self._steps, "the run ends before"
        if self._members[0] != step:
            first = step * self._batch
            self._members = step, [self._block_of(sample) for sample in range(first, first + self._batch)]
        members = self._members[1]
        positions = self._batch * (self._blocks_NT.shape[1] - 1)
        return Batch(
            ids_BT=self._blocks_NT[[members[row] for row in rows]].to(device, torch.int64),
            noise_key_B=torch.tensor([noise_key(self._seed, step, row) for row in rows]),
            step_positions=positions if self._counts_N is None else int(self._counts_N[members].sum()),
            step_rows=self._batch,
        )

    def _block_of(self, sample: int) -> int:
        number = self._blocks_NT.shape[0]
        turn, place = divmod(sample, number)
        if self._order[0] != turn:  # a pass at a time: of billions of tokens one is large
            source = torch.Generator().manual_seed(noise_key(self._seed, -2, turn) % 2**63)
            self._order = turn, torch.randperm(number, generator=source)
        return int(self._order[1][place])


def noise_key(seed: int, step: int, index: int) -> int:
    """A signed 64-bit number, a pure function of the seed, the optimizer step and the sample's place in the global batch.

    Differs: the official code of DMC and DMS seeds a generator in each process, so its result depends on their number.
    """
    mixed = 0
    for value, odd in zip((seed, step, index), _ODD, strict=True):
        mixed = _scattered((mixed ^ (value + 1)) * odd % _BITS)
    return mixed - _BITS if mixed >= _BITS // 2 else mixed


def _scattered(value: int) -> int:
    """Each bit of the input moves about half the bits of the output."""
    for shift, odd in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = ((value ^ value >> shift) * odd) % _BITS
    return value ^ value >> 31
