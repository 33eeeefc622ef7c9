"""Where training text comes from: text and jsonl files, parquet files, and data sets named on the hub.

Local text is cut into pieces and shuffled by a seed over all files, so that a run which needs little of it still sees some
of everything: all of it at once where memory has room, else as it is read. How pieces become tokens stands in data.py.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvfold.data.streams import stream_texts

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
    than `buffer_characters` in all are never in memory whole. Raises `ValueError`, in one line, for whatever can't be read.
    """
    local = [source for source in sources if _is_local(source)]
    pieces, held = [], 0
    for piece in (piece for source in local for piece in _file_pieces(source, piece_characters)):
        pieces.append(piece)
        held += len(piece)
        if held > buffer_characters:
            pieces.clear()
            yield from _shuffled_on_the_way(local, random.Random(seed), piece_characters, buffer_characters)
            break
    else:
        random.Random(seed).shuffle(pieces)
        yield from pieces
    for source in sources:
        if source not in local:
            for text in _hub_texts(source, seed):
                yield from _pieces(text, piece_characters)


def _shuffled_on_the_way(sources: Sequence[str], drawn: random.Random, piece: int, most: int) -> Iterator[str]:
    """Read all files side by side, each as fast as its size asks, and draw from the last `most` characters read."""
    size = {source: max(1, Path(source).stat().st_size) for source in sources}
    read, running = dict.fromkeys(size, 0), {source: _file_pieces(source, piece) for source in size}
    pieces: list[str] = []
    held = 0
    while running:
        source = min(running, key=lambda one: read[one] / size[one])
        text = next(running[source], None)
        if text is None:
            del running[source]
            continue
        pieces.append(text)
        read[source] += len(text)
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


def _file_pieces(source: str, most: int) -> Iterator[str]:
    found = False
    for text in stream_texts(Path(source), most):
        found = True
        yield from _pieces(text, most)
    if not found:
        raise ValueError(f"{source}: there is no text in it: give a file with text")


def _hub_texts(source: str, seed: int) -> Iterator[str]:
    """The `text` of a data set's rows, streamed."""
    import datasets

    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # the library raises whatever its many parts raise
        told = " ".join(str(error).split())
        raise ValueError(
            f"data '{source}': neither a file nor a data set that can be had ({told}): correct it"
        ) from error
    for row in rows.shuffle(seed=seed, buffer_size=_HUB_BUFFER):
        if not isinstance(row.get("text"), str):
            raise ValueError(f"data '{source}': its rows have no text under 'text': use another data set")
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
