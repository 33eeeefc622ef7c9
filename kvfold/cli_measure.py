"""`kvfold inspect` and `kvfold bench train`: parse, call, print. What they do lives in the room `bench`."""

from typing import Annotated

import typer

from kvfold.cli_model import (
    SAMPLE,
    Adapter,
    Bits,
    Device,
    Dtype,
    Gates,
    Json,
    Model,
    Out,
    Times,
    load_model,
    model_name,
)
from kvfold.console import check_out, check_packages, clear_errors, hand_over, progress
from kvfold.errors import UserError


def add_bench_train(bench: typer.Typer) -> None:
    """Put the command among the others."""
    bench.command("train", epilog="Example: `kvfold bench train my-model --time dms:128 --time dmc --sequence 1024`")(
        bench_training
    )


@clear_errors
def bench_training(
    model: Model,
    time: Annotated[
        list[str] | None, typer.Option("--time", help="dmc[:W] | dms[:W]; several times: a row each. Default: both.")
    ] = None,
    sequence: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 1024,
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = 1,
    repeats: Annotated[int, typer.Option(help="Rounds; both sides take turns.")] = 3,
    train: Annotated[str, typer.Option(help="What learns: full | lora | adapter (DMS).")] = "full",
    out: Out = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights. Default: float32.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """What one step of a retrofit costs, against the same loss with gates off; both sides in one run, of random tokens."""
    check_out(out)
    check_packages("accelerate", "peft")
    from kvfold.bench.train import METHODS, StepPoint, bench_train
    from kvfold.ops.denormals import flush_denormals
    from kvfold.report.tables import step_table

    point = StepPoint(sequence_tokens=sequence, batch_sequences=batch, trains=train)
    flush_denormals()
    methods = time or (METHODS if train != "adapter" else METHODS[:1])
    weights, _ = load_model(model, None, None, None, dtype or "float32", device)
    with progress() as report:
        result = bench_train(
            weights, name=model_name(model), methods=methods, point=point, repeats=repeats, report=report
        )
    hand_over("step", result, [step_table], out=out, as_json=as_json)


def add_inspect(app: typer.Typer) -> None:
    """Put the command among the others."""
    app.command(
        "inspect",
        epilog="Example: `kvfold inspect my-model --adapter my-adapter --text notes.txt --out results/notes-inside.json`",
    )(inspect)


@clear_errors
def inspect(
    model: Model,
    text: Annotated[str | None, typer.Option(help="A text, .jsonl or .gz file. Default: a novel.")] = None,
    time: Times = None,
    tokens: Annotated[int, typer.Option(help="Tokens read, from the text's beginning.")] = 1024,
    head: Annotated[
        list[str] | None,
        typer.Option(
            help="LAYER.HEAD whose tokens are told one by one; several times. Default: three, by what they keep."
        ),
    ] = None,
    out: Out = None,
    bits: Bits = None,
    adapter: Adapter = None,
    gates: Gates = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """What every layer and head keeps of one text, and which of its tokens; `kvfold report` draws it."""
    from kvfold.bench.document import check_heads, read_document
    from kvfold.data.texts import read_text_file
    from kvfold.data.windows import text_beginning
    from kvfold.report.tables import document_table

    check_out(out)
    heads = [_head(one) for one in head or []]
    file = read_text_file(text or SAMPLE)
    weights, tokenizer = load_model(model, None, bits, adapter, dtype, device, gates, time or ())
    check_heads(weights.config.layout, heads)
    ids, pieces = text_beginning(file, tokenizer, tokens=tokens)
    with progress() as report:
        result = read_document(
            weights, ids, pieces, time or [weights.config.layout.time_text()], name=model_name(model), text=file.name,
            heads=heads, report=report,
        )  # fmt: skip
    hand_over("document", result, [document_table], out=out, as_json=as_json)


def _head(text: str) -> tuple[int, int]:
    layer, dot, head = text.partition(".")
    if not (dot and layer.isdecimal() and head.isdecimal()):
        raise UserError(
            f"--head '{text}': it is a layer and one of its KV heads, counted from 0: write e.g. --head 3.1"
        )
    return int(layer), int(head)
