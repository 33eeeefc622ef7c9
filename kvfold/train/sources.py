"""Where training text comes from: text and jsonl files, parquet files, and data sets named on the hub.

Local text is cut into pieces and shuffled by a seed over all files, so that a run which needs little of it still sees some
of everything. How pieces become tokens stands in data.py.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvfold.data.texts import read_text_file

_TEXT_ENDINGS = (".txt", ".md", ".json", ".jsonl", ".gz")
_HUB_BUFFER = 10_000
"""Documents of a hub data set among which the next is drawn."""


def training_texts(sources: Sequence[str], *, seed: int, piece_characters: int) -> Iterator[str]:
    """Pieces of all sources in an order that the seed rules: those of files first, then those of hub data sets.

    A name with a known ending or a file's path is a local file; anything else is a hub name, or `name:split`. Raises
    `ValueError`, in one line, for whatever can't be read.
    """
    local = [source for source in sources if _is_local(source)]
    pieces = [piece for source in local for text in _local_texts(source) for piece in _pieces(text, piece_characters)]
    random.Random(seed).shuffle(pieces)
    yield from pieces
    for source in sources:
        if source not in local:
            for text in _hub_texts(source, seed):
                yield from _pieces(text, piece_characters)


def _is_local(source: str) -> bool:
    path = Path(source)
    return path.exists() or path.suffix in (*_TEXT_ENDINGS, ".parquet") or source.startswith((".", "/", "~"))


def _local_texts(source: str) -> Sequence[str]:
    return _parquet_texts(Path(source)) if source.endswith(".parquet") else read_text_file(source).documents


def _parquet_texts(path: Path) -> list[str]:
    """The `text` column."""
    if not path.exists():
        raise ValueError(f"{path}: there is no such file: correct the path")
    from pyarrow import ArrowInvalid, parquet

    try:
        found = parquet.read_schema(path).names
        if "text" not in found:
            raise ValueError(f"{path}: no column 'text' among {', '.join(found)}: rename the one that holds the text")
        column = parquet.read_table(path, columns=["text"])["text"]
    except (OSError, ArrowInvalid) as error:
        raise ValueError(f"{path}: it can't be read ({' '.join(str(error).split())}): fetch it again") from error
    return [text for text in column.to_pylist() if text and text.strip()]


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
