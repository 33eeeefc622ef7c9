"""The command line: parse, call, print. What the commands do lives in the rooms below; what they share is in console.py."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kvfold import console
from kvfold.cli_bench import add_bench
from kvfold.cli_calibrate import add_calibrate
from kvfold.cli_convert import add_convert
from kvfold.cli_eval import add_eval
from kvfold.cli_measure import add_bench_offline, add_bench_train, add_inspect
from kvfold.cli_model import (
    METHODS,
    Adapter,
    Bits,
    Device,
    Dtype,
    Gates,
    Json,
    Model,
    Time,
    load_model,
    quiet_transformers,
)
from kvfold.cli_pretrain import add_train
from kvfold.cli_serve import add_bench_serve, add_serve
from kvfold.cli_train import add_retrofit
from kvfold.console import check_out, clear_errors, command_line, hand_over, progress, say, show, show_json
from kvfold.errors import UserError

app = typer.Typer(
    epilog="Begin with `kvfold plan llama-3.1-8b --time h2o:512+512`, which needs no weights, or with `kvfold demo`.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
)  # fmt: skip


@app.callback()
def kvfold(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from, before its line.")] = False,
) -> None:
    """Make the KV cache of a language model small: plan it, train for it, measure it, generate with it."""
    console.debug.set(debug)


class BenchGroup(TyperGroup):
    """`bench serve --offline` measures a model in process, `bench serve` any endpoint: two commands of one name."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Gives name, command and what is left of the words."""
        if args[0] == "serve" and "--offline" in args:
            args = ["serve-offline", *(word for word in args[1:] if word != "--offline")]
        return super().resolve_command(ctx, args)


bench = typer.Typer(
    cls=BenchGroup, help="Measure speed and memory beside transformers, in one run.", no_args_is_help=True
)
app.add_typer(bench, name="bench")
add_eval(app)
add_serve(app)
add_convert(app)
add_train(app)
add_retrofit(app)
add_calibrate(app)
add_bench(bench)
add_bench_train(bench)
add_bench_serve(bench)
add_bench_offline(bench)
add_inspect(app)


@app.command(
    epilog="Example: `kvfold plan llama-3.1-8b --layers cla2 --time h2o:512+512 --memory 24GB --context 32k --batch 4`"
)
@clear_errors
def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a config.json, a bundled name or a hub name.")
    ],
    layers: Annotated[
        str | None, typer.Option(help="Which layers share: cla2 | cla2-keep-ends | trailing:N | yoco | 0_0_2_2...")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="KV heads of a layer.")] = None,
    time: Annotated[str | None, typer.Option(help=f"{METHODS} (the most they may hold).")] = None,
    compression: Annotated[
        float | None, typer.Option(help="What the gates of dmc or dms reach, delay included. Default: they never fire.")
    ] = None,
    bits: Annotated[
        str | None, typer.Option(help="model | fp8 | int8 | int4; keys and values apart: int8,int4.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="The device's, e.g. 80GB or 16GiB: adds what fits beside the weights."),
    ] = None,
    kv_memory: Annotated[str | None, typer.Option(help="What the cache alone may take: adds what fits.")] = None,
    context: Annotated[str, typer.Option(help="Tokens of a row, e.g. 4096 or 32k.")] = "4k",
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    as_json: Json = False,
) -> None:
    """What the cache of a model costs, and what each axis saves, alone and together. Needs no weights."""
    from kvfold.layout.plan_rows import plan_rows
    from kvfold.layout.units import parse_count
    from kvfold.report.tables import plan_table

    tokens = parse_count(context)
    memory_bytes, fits_in = _memory_of_cache(model, memory, kv_memory)
    rows = plan_rows(
        model, context_tokens=tokens, rows=batch, memory_bytes=memory_bytes,
        time=time, bits=bits, layers=layers, heads=heads, compression=compression,
    )  # fmt: skip
    shown = [
        {
            "name": row.name, "bytes_per_token": row.bytes_per_token, "bytes": row.context_bytes, "max_rows": row.max_rows,
            "max_context_tokens": row.max_context_tokens, "compression": row.compression,
            "layers": row.layout.layers_text(), "time": row.layout.time_text(), "bits": row.layout.bits_text(),
        }
        for row in rows
    ]  # fmt: skip
    result = {"model": {"name": model}, "context_tokens": tokens, "batch": batch, "rows": shown}
    if compression is not None:
        result["learned_compression"] = compression
    heading = f"{model}: {batch:,} row{'s' * (batch > 1)} of {tokens:,} tokens{fits_in}"
    if compression is None and any(spec.trained for row in rows for spec in row.layout.time):
        heading += "; where gates decide, the most it may hold: --compression says what they reach"
    hand_over("plan", result, [lambda _: heading, plan_table], out=None, as_json=as_json)


def _memory_of_cache(model: str, memory: str | None, kv_memory: str | None) -> tuple[int | None, str]:
    """Bytes that the cache may take, and how a heading says so. Of a device's memory the weights are subtracted."""
    from kvfold.layout.units import parse_size
    from kvfold.layout.weight_size import weight_bytes
    from kvfold.report.numbers import size

    if memory is not None and kv_memory is not None:
        raise UserError("--memory and --kv-memory: one is the device's, the other the cache's alone: give one of them")
    if kv_memory is not None:
        return parse_size(kv_memory), f" in {kv_memory} of cache"
    if memory is None:
        return None, ""
    whole, weights = parse_size(memory), weight_bytes(model)
    if weights is None:
        raise UserError(f"--memory {memory}: {model}'s config does not tell what its weights weigh: give --kv-memory")
    if weights >= whole:
        raise UserError(f"--memory {memory}: the weights of {model} take {size(weights)}: name a larger device")
    return whole - weights, f" in {memory} less {size(weights)} of weights"


@app.command(epilog="Example: `kvfold generate my-model 'Once upon a time' --time tova:256`")
@clear_errors
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from; - reads stdin.")] = "-",
    source: Annotated[
        Path | None, typer.Option("--input", help="Requests as JSON lines, OpenAI's field names: all run at once.")
    ] = None,
    target: Annotated[
        Path | None, typer.Option("--output", help="Their answers, line by line; resumed where it stopped.")
    ] = None,
    kv_memory: Annotated[str, typer.Option(help="Bytes of the cache, with --input.")] = "2GB",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write, at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token, more is more daring.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws, where there is a temperature.")] = 0,
    time: Time = None,
    bits: Bits = None,
    adapter: Adapter = None,
    gates: Gates = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Go on from a text with a folded cache, and say what the cache held."""
    from transformers import TextStreamer, set_seed

    from kvfold.report.numbers import count, size

    if (source is None) != (target is None):
        raise UserError("--input and --output: a file of requests needs a file for its answers: give both")
    if source is not None and target is not None:
        loaded = load_model(model, time, bits, adapter, dtype, device, gates)
        defaults = {"max_tokens": max_new_tokens, "temperature": temperature}
        _answer_file(loaded, source, target, kv_memory=kv_memory, defaults=defaults, seed=seed, as_json=as_json)
        return
    text = _piped() if prompt == "-" else prompt
    if not text:
        raise UserError("an empty prompt: give some text to go on from")
    weights, tokenizer = load_model(model, time, bits, adapter, dtype, device, gates)
    inputs = tokenizer(text, return_tensors="pt").to(weights.device)
    length, most = inputs["input_ids"].shape[1], weights.config.max_position_embeddings
    if length + max_new_tokens > most:
        raise UserError(
            f"{length} tokens of prompt and {max_new_tokens} new ones: the model was made for {most}: shorten one of the two"
        )
    set_seed(seed)
    chosen = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = None if as_json else TextStreamer(tokenizer, skip_special_tokens=True)
    cache = weights.new_cache(rows=1)
    ids = weights.generate(**inputs, **chosen, max_new_tokens=max_new_tokens, past_key_values=cache, streamer=streamer)
    method, seen, kept = cache.layout.time_text(), int(cache.seen_tokens[0]), cache.kept_tokens[:, 0]
    if as_json:
        written = tokenizer.decode(ids[0], skip_special_tokens=True)
        held = {"allocated_bytes": cache.allocated_bytes, "full_bytes": cache.full_bytes}
        show_json({"text": written, "method": method, "seen_tokens": seen, "kept_tokens": kept.tolist(), **held})
    else:
        held = f"{size(cache.allocated_bytes)} held where a full cache takes {size(cache.full_bytes)}"
        say(
            f"{method}: {count(seen)} tokens seen, {count(round(kept[kept >= 0].float().mean().item()))} kept a head, {held}"
        )


def _answer_file(
    loaded: tuple, source: Path, target: Path, *, kv_memory: str, defaults: dict[str, Any], seed: int, as_json: bool
) -> None:
    """All requests of a file on one engine, with a bar."""
    from kvfold.engine.engine import Engine
    from kvfold.engine.offline import answer_file

    weights, tokenizer = loaded
    if defaults["temperature"]:
        defaults = defaults | {"seed": seed}
    with Engine(weights, tokenizer, kv_memory=kv_memory) as engine, progress() as bar:
        counts = answer_file(
            engine, source, target, defaults=defaults,
            report=lambda facts: bar("answering", facts["done"], facts["total"]),
        )  # fmt: skip
        stats = engine.stats()
    if as_json:
        show_json(counts | {"output": str(target), "stats": stats})
    else:
        say(
            f"{target}: {counts['answered']} answered, {counts['errors']} with an error, {counts['skipped']} were there"
        )


def _piped() -> str:
    """What another program writes to ours."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt on stdin: it can't be read as text ({error}): send it as utf-8") from error


@app.command()
@clear_errors
def report(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="A folder of result files, or one.")] = Path(
        "results"
    ),
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """One self-contained page of pictures and tables, from the files that eval, bench and demo write."""
    from kvfold.report.page import write_page

    check_out(out)
    typer.echo(write_page(results, out))


@app.command()
@clear_errors
def demo(
    out: Annotated[Path, typer.Option(help="The folder for result files and the page.")] = Path("demo-out"),
) -> None:
    """Everything on a small real model, in minutes: tables here, result files and a page with pictures in a folder."""
    from kvfold.demo import run_demo
    from kvfold.report import tables

    def tables_of(kind: str, result: dict) -> None:
        found = {"quality": [tables.quality_table], "decode": [tables.decode_table]}.get(kind, [])
        show(*(table(result) for table in found), *([tables.passkey_table(result)] if "passkey" in result else []))

    check_out(out / "index.html")
    quiet_transformers(bars=False)
    with progress() as report:
        page = run_demo(out, command_line(), say, report, tables_of)
    say("next: `make serve` (or `kvfold serve --demo`): chat with this model, and watch what each head keeps")
    typer.echo(f"the page: {page}")
