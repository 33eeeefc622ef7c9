"""`kvfold inspect`: what heads keep of one text. It is read in bench/document.py."""

from typing import Annotated

from typer import Option

from kvfold.cli.console import progress
from kvfold.cli.options import Loading, Model, Output, Text, Times, model_name
from kvfold.data.texts import SAMPLE, read_text_file
from kvfold.errors import UserError


def inspect(
    model: Model,
    text: Text = None,
    time: Times = None,
    tokens: Annotated[int, Option(help="Tokens read, from the text's beginning.")] = 1024,
    head: Annotated[
        list[str] | None,
        Option(help="LAYER.HEAD whose tokens are told one by one; several times. Default: three, by what they keep."),
    ] = None,
    *,
    loading: Loading,
    output: Output,
) -> None:
    """What every layer and head keeps of one text, and which of its tokens; `kvfold report` draws it.

    Example: `kvfold inspect my-model --adapter my-adapter --text notes.txt --out results/notes-inside.json`
    """
    from kvfold.bench.document import check_heads, read_document
    from kvfold.data.windows import text_beginning
    from kvfold.report.sheets import document_table

    heads = [_head(one) for one in head or []]
    file = read_text_file(text or SAMPLE)
    weights, tokenizer = loading.load(model, times=time)
    check_heads(weights.config.layout, heads)
    ids, pieces = text_beginning(file, tokenizer, tokens=tokens)
    with progress() as report:
        result = read_document(
            weights, ids, pieces, time or [weights.config.layout.time_text()], name=model_name(model), text=file.name,
            heads=heads, report=report,
        )  # fmt: skip
    output.hand_over("document", result, document_table)


def _head(text: str) -> tuple[int, int]:
    layer, dot, head = text.partition(".")
    if not (dot and layer.isdecimal() and head.isdecimal()):
        raise UserError(
            f"--head '{text}': it is a layer and one of its KV heads, counted from 0: write e.g. --head 3.1"
        )
    return int(layer), int(head)
