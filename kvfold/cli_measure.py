"""`kvfold inspect`, `kvfold bench train` and `kvfold bench serve`: parse, call, print. What they do lives in the room `bench`."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

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
from kvfold.console import check_out, check_packages, clear_errors, command_line, hand_over, progress
from kvfold.errors import UserError
from kvfold.layout.units import parse_size


def add_bench_train(bench: typer.Typer) -> None:
    """Put the command among the others."""
    bench.command("train", epilog="Example: `kvfold bench train my-model --time dms:128 --time dmc --sequence 1024`")(
        bench_training
    )


@clear_errors
def bench_training(
    model: Model,
    time: Annotated[
        list[str] | None,
        typer.Option("--time", help="dmc[:W][+S] | dms[:W]; several times: a row each. Default: both."),
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


def add_bench_offline(bench: typer.Typer) -> None:
    """Put the command among the others."""
    bench.command(
        "serve-offline",
        epilog="Example: `kvfold bench serve-offline my-model --time full --time h2o:64+64 --budget 4 --requests 16`",
    )(bench_serving)


@clear_errors
def bench_serving(
    model: Model,
    time: Times = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="Uncompressed requests that the KV memory holds, e.g. 4, or bytes, e.g. 200MB; several: rows each."
        ),
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests, all sent at once.")] = 16,
    prompt: Annotated[str, typer.Option(help="Tokens of a prompt: 128, or bounds to draw from: 64-512.")] = "128",
    new: Annotated[str, typer.Option(help="Tokens of an answer, likewise; all are generated.")] = "128",
    trace: Annotated[
        Path | None, typer.Option(help="JSON lines with prompt, max_tokens and at_s, in place of drawn requests.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A file that prompts are taken from. Default: a novel.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    peers: Annotated[
        list[str] | None,
        typer.Option(
            help="generate (kvfold's own) | transformers | continuous (transformers' batching) | vllm; several."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Rounds; all sides take turns.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the lengths drawn.")] = 0,
    out: Out = None,
    bits: Bits = None,
    adapter: Adapter = None,
    gates: Gates = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Requests in flight, tokens/s and waiting of many requests in one KV budget, methods beside each other and peers."""
    from kvfold.bench.serve import bench_serve, budget_bytes
    from kvfold.bench.serve_peers import check_peers, open_peers
    from kvfold.bench.serve_requests import drawn_requests, parse_lengths, trace_requests
    from kvfold.data.texts import read_text_file
    from kvfold.record import write_result
    from kvfold.report.tables import serve_table

    check_out(out), check_peers(peers or ())
    bounds = parse_lengths(prompt), parse_lengths(new)
    file = read_text_file(text or SAMPLE) if trace is None else None
    weights, tokenizer = load_model(model, None, bits, adapter, dtype, device, gates, time or ())
    wanted = drawn_requests(requests, *bounds, file, tokenizer, seed=seed) if file else trace_requests(trace, tokenizer)
    longest = max((len(one.prompt) + one.max_tokens - 1 for one in wanted), default=1)
    budgets = [_budget(one, lambda number: budget_bytes(weights, number, longest)) for one in budget or ["4"]]

    def keep(result: dict[str, Any]) -> None:
        if out is not None:
            write_result(out, "serve", result, command_line())

    with ExitStack() as stack, progress() as report:
        sides = open_peers(peers or (), weights, model, wanted, budgets[0], stack)
        result = bench_serve(
            weights, wanted, name=model_name(model), methods=time or ["full", weights.config.layout.time_text()],
            budgets=budgets, peers=sides, repeats=repeats, temperature=temperature, keep=keep, report=report,
        )  # fmt: skip
    hand_over("serve", result, [serve_table], out=out, as_json=as_json)


def _budget(text: str, of_requests: Any) -> int:
    """Bytes: a plain number counts uncompressed requests."""
    try:
        number = float(text)
    except ValueError:
        return parse_size(text)
    if not 0 < number < 1e9:
        raise UserError(f"--budget '{text}': it holds more than 0 requests: write e.g. 4, or bytes as 200MB")
    return of_requests(number)


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
