"""The command line: parse, call, print. What the commands do lives in the rooms below; what they share is in console.py."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvfold import console
from kvfold.cli_calibrate import add_calibrate
from kvfold.cli_convert import add_convert
from kvfold.cli_eval import add_eval
from kvfold.cli_measure import add_bench_train, add_inspect
from kvfold.cli_model import (
    METHODS,
    Adapter,
    Bits,
    Device,
    Dtype,
    Gates,
    Json,
    Model,
    Out,
    Time,
    Times,
    load_model,
    model_name,
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


bench = typer.Typer(help="Measure speed and memory beside transformers, in one run.", no_args_is_help=True)
app.add_typer(bench, name="bench")
add_eval(app)
add_serve(app)
add_convert(app)
add_train(app)
add_retrofit(app)
add_calibrate(app)
add_bench_train(bench)
add_bench_serve(bench)
add_inspect(app)


@app.command(
    epilog="Example: `kvfold plan llama-3.1-8b --layers cla2 --time h2o:512+512 --memory 16GB --context 32k --batch 4`"
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
        str | None, typer.Option(help="What the cache may take, e.g. 80GB or 16GiB: adds what fits.")
    ] = None,
    context: Annotated[str, typer.Option(help="Tokens of a row, e.g. 4096 or 32k.")] = "4k",
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    as_json: Json = False,
) -> None:
    """What the cache of a model costs, and what each axis saves, alone and together. Needs no weights."""
    from kvfold.layout.plan_rows import plan_rows
    from kvfold.layout.units import parse_count, parse_size
    from kvfold.report.tables import plan_table

    tokens = parse_count(context)
    rows = plan_rows(
        model, context_tokens=tokens, rows=batch, memory_bytes=None if memory is None else parse_size(memory),
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
    heading = f"{model}: {batch:,} row{'s' * (batch > 1)} of {tokens:,} tokens" + (f" in {memory}" if memory else "")
    if compression is None and any(spec.trained for row in rows for spec in row.layout.time):
        heading += "; where gates decide, the most it may hold: --compression says what they reach"
    hand_over("plan", result, [lambda _: heading, plan_table], out=None, as_json=as_json)


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


def _padded(text: str) -> tuple[bool, ...]:
    """Whether rows are padded, for each measurement of a point."""
    known = {"both": (False, True), "none": (False,), "left": (True,)}
    if text not in known:
        raise UserError(f"padding '{text}': rows are padded at the left or not: write {', '.join(known)}")
    return known[text]


@bench.command(
    "decode", epilog="Example: `kvfold bench decode my-model --batch 8 --prompt 256 --time full --time h2o:64+64`"
)
@clear_errors
def bench_decoding(
    model: Model,
    time: Times = None,
    batch: Annotated[
        int | None, typer.Option(help="Rows of one point. Default: the points 1 x 64, 16 x (32 + 64), 8 x 1,024.")
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt, with `--batch`.")] = 32,
    new: Annotated[int, typer.Option(help="Tokens generated, with `--batch`.")] = 64,
    text: Annotated[
        Path | None, typer.Option(help="A file that the prompts are taken from. Default: random tokens.")
    ] = None,
    padding: Annotated[str, typer.Option(help="both | none | left")] = "both",
    peers: Annotated[str, typer.Option(help="transformers | none")] = "transformers",
    repeats: Annotated[int, typer.Option(help="Rounds; both sides take turns.")] = 5,
    out: Out = None,
    bits: Bits = None,
    adapter: Adapter = None,
    gates: Gates = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Tokens/s, step time, bytes and peak memory of `generate`, with and without left padding, both sides in one run."""
    from kvfold.bench.decode import POINTS, Point, bench_decode, text_prompts
    from kvfold.bench.peers import load_theirs
    from kvfold.data.texts import read_text_file
    from kvfold.report.tables import decode_table

    check_out(out)
    if peers not in ("transformers", "none"):
        raise UserError(
            f"peers '{peers}': kvfold is measured beside transformers or alone: write 'transformers' or 'none'"
        )
    padded, said = _padded(padding), None if text is None else read_text_file(text)
    points = (
        POINTS
        if batch is None
        else (Point(name=f"{batch} x ({prompt} + {new})", batch=batch, prompt_tokens=prompt, new_tokens=new),)
    )
    ours, tokenizer = load_model(model, None, bits, adapter, dtype, device, gates, time or ())
    theirs = None if peers == "none" else load_theirs(model, dtype=ours.dtype, device=ours.device)
    with progress() as report:
        result = bench_decode(
            ours, theirs, name=model_name(model), methods=time or ["full"], points=points, padded=padded, repeats=repeats,
            prompts=None if said is None else text_prompts(said, tokenizer), report=report,
        )  # fmt: skip
    hand_over("decode", result, [decode_table], out=out, as_json=as_json)


@app.command()
@clear_errors
def demo(
    out: Annotated[Path, typer.Option(help="The folder for result files and the page.")] = Path("demo-out"),
) -> None:
    """Everything on a small real model, in minutes: tables here, result files and a page with pictures in a folder."""
    from kvfold.demo import run_demo
    from kvfold.report import tables

    check_out(out / "index.html")
    quiet_transformers()
    shown = {"quality": [tables.quality_table, tables.passkey_table], "decode": [tables.decode_table]}
    with progress() as report:
        page = run_demo(
            out,
            command_line(),
            say,
            report,
            lambda kind, result: show(*(table(result) for table in shown.get(kind, []))),
        )
    typer.echo(f"the page: {page}")
