"""Where training text comes from: text and jsonl files, parquet files, and data sets named on the hub.

Local text is cut into pieces and shuffled by a seed over all files, so that a run which needs little of it still sees some
of everything: all of it at once where memory has room, else as it is read. How pieces become tokens stands in data.py.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvfold.data.texts import TextStream
from kvfold.errors import UserError, one_line

_TEXT_ENDINGS = (".txt", ".md", ".json", ".jsonl", ".gz")
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
    files = [_File(source, piece_characters) for source in local]
    pieces, held = [], 0
    for piece in itertools.chain.from_iterable(files):
        pieces.append(piece)
        held += len(piece)
        if held > buffer_characters:
            pieces.clear()
            files = [_File(source, piece_characters) for source in local]
            yield from _shuffled_on_the_way(files, random.Random(seed), buffer_characters)
            break
    else:
        random.Random(seed).shuffle(pieces)
        yield from pieces
    for source in sources:
        if source not in local:
            for text in _hub_texts(source, seed):
                yield from _pieces(text, piece_characters)


class _File:
    """One file's pieces, each at most about `most` characters."""

    def __init__(self, source: str, most: int):
        self._source, self._most, self._stream = source, most, TextStream(Path(source), most)

    @property
    def share(self) -> float:
        """Of the file, what was read."""
        return self._stream.share

    def __iter__(self) -> Iterator[str]:
        found = False
        for text in self._stream:
            found = True
            yield from _pieces(text, self._most)
        if not found:
            raise UserError(f"{self._source}: there is no text in it: give a file with text")


def _shuffled_on_the_way(files: Sequence[_File], drawn: random.Random, most: int) -> Iterator[str]:
    """Read all files side by side, each share by share, and draw from the last `most` characters read. A file that was read
    to its end gives the rest at once: what is small is read in one go, and mixed with the beginning of what is not.
    """
    running = [(file, iter(file)) for file in files]
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
    return path.exists() or path.suffix in (*_TEXT_ENDINGS, ".parquet") or source.startswith((".", "/", "~"))


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
    while len(text) - start > most:
        cut = text.rfind("\n", start + most // 2, start + most) + 1
        stop = cut if cut > 0 else start + most
        if text[start:stop].strip():
            yield text[start:stop].strip("\n")
        start = stop
    if text[start:].strip():
        yield text[start:].strip("\n")
