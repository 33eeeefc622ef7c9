"""The command line: parse, call, print. What the commands do lives in the rooms below.

Results go to stdout (with --json nothing but JSON), progress and errors to stderr. Exit codes: 0 done, 1 a failure while
running, 2 bad usage or bad input, in one line.
"""

import functools
import json
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    help="Fold the KV cache of a language model: plan it, measure it, generate with it.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
)  # fmt: skip
bench = typer.Typer(help="Measure speed and memory against a peer, in one run.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a .gguf file or a hub name.")]
Time = Annotated[str | None, typer.Option(help="full | window:W+S | h2o:R+Y | tova:N, in tokens or percent.")]
Times = Annotated[list[str] | None, typer.Option("--time", help="As above; several times: a row each.")]
Bits = Annotated[str | None, typer.Option(help="model | fp8 | int8 | int4 (planned; `plan` counts them).")]
Adapter = Annotated[str | None, typer.Option(help="A trained adapter (planned).")]
Dtype = Annotated[str | None, typer.Option(help="float32 | bfloat16 | float16; the checkpoint's, on a CPU float32.")]
Device = Annotated[str | None, typer.Option(help="cpu | cuda")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Out = Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")]


def clear_errors(command: Callable) -> Callable:
    """Whatever goes wrong ends in one line on stderr and an exit code."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        warnings.showwarning = lambda message, *_: _say(f"note: {message}")
        try:
            command(*args, **kwargs)
        except ValueError as error:
            _say(f"error: {_one_line(error)}")
            raise typer.Exit(2) from error
        except (RuntimeError, OSError, MemoryError) as error:
            _say(f"failed: {_one_line(error) or type(error).__name__}")
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            _say("stopped")
            raise typer.Exit(1) from error

    return guarded


def _say(line: str) -> None:
    Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print(line)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _command_line() -> str:
    return shlex.join(["kvfold", *sys.argv[1:]])


def _print(table: Any) -> None:
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _hand_over(kind: str, result: dict[str, Any], tables: list[Callable], out: Path | None, as_json: bool) -> None:
    """Write a result where it was asked for, and print it as JSON or as tables."""
    from kvfold.report.results import write_result

    if out is not None:
        write_result(out, kind, result, _command_line())
    if as_json:
        print(json.dumps({"kind": kind, **result}))
        return
    for table in tables:
        _print(table(result))


def _load(source: str, time: str | None, bits: str | None, adapter: str | None, dtype: str | None, device: str | None):
    from kvfold.models.load import load, load_tokenizer

    with Console(stderr=True).status(f"loading {source}"):
        return load(source, time=time, bits=bits, adapter=adapter, dtype=dtype, device=device), load_tokenizer(source)


def _name(source: str) -> str:
    """What a model is called in results: the last part of its path or hub name."""
    return Path(source).name.removesuffix(".gguf") if Path(source).exists() else source


@app.command()
@clear_errors
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a config.json, a bundled or a hub name.")],
    layers: Annotated[str | None, typer.Option(help="cla2 | cla2-keep-ends | trailing:N | yoco | 0_0_2_2...")] = None,
    heads: Annotated[int | None, typer.Option(help="KV heads")] = None,
    time: Annotated[str | None, typer.Option(help="full | window:W+S | h2o:R+Y | tova:N | dmc[:W] | dms[:W]")] = None,
    bits: Bits = None,
    memory: Annotated[str | None, typer.Option(help="For the cache alone, e.g. 80GB or 16GiB.")] = None,
    context: Annotated[str, typer.Option(help="Tokens a row, e.g. 4096 or 32k.")] = "4k",
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    as_json: Json = False,
) -> None:
    """What the cache of a model costs, and what each axis saves, alone and together. Needs no weights."""
    from kvfold.plan_rows import plan_rows
    from kvfold.report.tables import plan_table
    from kvfold.sizes import parse_count, parse_size

    rows = plan_rows(
        model, context_tokens=parse_count(context), rows=batch, memory_bytes=None if memory is None else parse_size(memory),
        time=time, bits=bits, layers=layers, heads=heads,
    )  # fmt: skip
    shown = [
        {
            "name": row.name, "bytes_per_token": row.bytes_per_token, "bytes": row.context_bytes, "max_rows": row.max_rows,
            "max_context_tokens": row.max_context_tokens, "compression": row.compression,
            "layers": row.layout.layers_text(), "time": row.layout.time_text(), "bits": row.layout.bits_text(),
        }
        for row in rows
    ]  # fmt: skip
    _hand_over("plan", {"model": {"name": model}, "context": context, "batch": batch, "rows": shown}, [plan_table], None, as_json)


@app.command("eval")
@clear_errors
def evaluate(
    model: Model,
    text: Annotated[list[str] | None, typer.Option(help="Text files: .txt, .jsonl, .jsonl.gz. Default: the one kvfold ships.")] = None,
    time: Times = None,
    windows: Annotated[int, typer.Option(help="Windows of each text.")] = 32,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    batch: Annotated[int, typer.Option(help="Windows read side by side.")] = 32,
    chunk: Annotated[int | None, typer.Option(help="Tokens a call, for methods that don't depend on it.")] = None,
    passkey: Annotated[bool, typer.Option(help="Also hide five-digit keys in filler text and ask for them.")] = False,
    passkey_tries: Annotated[int, typer.Option(help="Keys at each depth.")] = 4,
    fresh: Annotated[bool, typer.Option(help="Measure again what was measured before.")] = False,
    out: Out = None,
    bits: Bits = None,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Perplexity of text read through the cache, under any methods, beside the unfolded model. Goes on where it stopped."""
    from kvfold.eval.passkey import measure_passkey
    from kvfold.eval.perplexity import measure_quality
    from kvfold.eval.progress import progress_bars
    from kvfold.eval.protocol import Protocol
    from kvfold.report.tables import passkey_table, quality_table

    sample = Path(__file__).with_name("sample") / "persuasion.txt"

    protocol = Protocol(windows=windows, context_tokens=context, batch=batch, call_tokens=chunk)
    weights, tokenizer = _load(model, None, bits, adapter, dtype, device)
    with progress_bars() as report:
        result = measure_quality(
            weights, tokenizer, text or [sample], time or [], name=_name(model), protocol=protocol,
            cells=None if fresh else _cells(), report=report,
        )  # fmt: skip
        if passkey:
            methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
            result["passkey"] = measure_passkey(
                weights, tokenizer, methods, name=_name(model), lengths=(context,), tries=passkey_tries,
                cells=None if fresh else _cells(), report=report,
            )  # fmt: skip
    _hand_over("quality", result, [quality_table, *([passkey_table] if passkey else [])], out, as_json)


def _cells() -> Path:
    """Where finished measurements wait to be used again."""
    import os

    return Path(os.environ.get("KVFOLD_CACHE") or Path.home() / ".cache" / "kvfold") / "cells"


@app.command()
@clear_errors
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to go on from; - reads stdin.")] = "-",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    time: Time = None,
    bits: Bits = None,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Go on from a text with a folded cache, and say what the cache held."""
    from transformers import TextStreamer, set_seed

    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise ValueError("an empty prompt: give some text to go on from")
    weights, tokenizer = _load(model, time, bits, adapter, dtype, device)
    inputs = tokenizer(text, return_tensors="pt").to(weights.device)
    length, most = inputs["input_ids"].shape[1], weights.config.max_position_embeddings
    if length + max_new_tokens > most:
        raise ValueError(
            f"{length} tokens of prompt and {max_new_tokens} new ones: the model was made for {most}: shorten one of the two"
        )
    set_seed(seed)
    chosen = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    cache = weights.new_cache(rows=1)
    streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=False)
    ids = weights.generate(**inputs, **chosen, max_new_tokens=max_new_tokens, past_key_values=cache, streamer=streamer)
    held = {
        "seen_tokens": int(cache.seen_tokens[0]), "kept_tokens": cache.kept_tokens[:, 0].tolist(),
        "allocated_bytes": cache.allocated_bytes, "full_bytes": cache.full_bytes, "method": cache.layout.time_text(),
    }  # fmt: skip
    if as_json:
        print(json.dumps({"text": tokenizer.decode(ids[0], skip_special_tokens=True), **held}))
    else:
        mean = cache.kept_tokens[cache.kept_tokens >= 0].float().mean().item()
        _say(
            f"{held['method']}: {held['seen_tokens']} tokens seen, {mean:.0f} kept a head, "
            f"{cache.allocated_bytes / 1e6:.1f} MB held where the whole cache takes {cache.full_bytes / 1e6:.1f} MB"
        )


@app.command()
@clear_errors
def report(
    results: Annotated[Path, typer.Argument(help="A folder of result files, or one.")] = Path("results"),
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
) -> None:
    """One self-contained page of pictures and tables from result files."""
    from kvfold.report.page import write_page

    print(write_page(results, out))


@bench.command("decode")
@clear_errors
def bench_decoding(
    model: Model,
    time: Times = None,
    batch: Annotated[int | None, typer.Option(help="Rows. Default: three points, 1 x 64, 16 x (32 + 64), 8 x 1,024.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt, with --batch.")] = 32,
    new: Annotated[int, typer.Option(help="Tokens generated, with --batch.")] = 64,
    peers: Annotated[str, typer.Option(help="transformers | none")] = "transformers",
    repeats: Annotated[int, typer.Option(help="Rounds; both sides take turns.")] = 5,
    out: Out = None,
    bits: Bits = None,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Tokens/s, step time, bytes and peak memory of `generate`, with and without left padding, both sides in one run."""
    from kvfold.bench.decode import POINTS, Point, bench_decode
    from kvfold.bench.peers import load_theirs
    from kvfold.eval.progress import progress_bars
    from kvfold.report.tables import decode_table

    if peers not in ("transformers", "none"):
        raise ValueError(f"peers '{peers}': kvfold is measured beside transformers or alone: write 'transformers' or 'none'")
    points = POINTS if batch is None else (Point(name=f"{batch} x ({prompt} + {new})", batch=batch, prompt_tokens=prompt, new_tokens=new),)
    ours, _ = _load(model, None, bits, adapter, dtype, device)
    theirs = None if peers == "none" else load_theirs(model, dtype=ours.dtype, device=ours.device)
    with progress_bars() as report:
        result = bench_decode(
            ours, theirs, name=_name(model), methods=time or ["full"], points=points, repeats=repeats, report=report
        )
    _hand_over("decode", result, [decode_table], out, as_json)


@app.command()
@clear_errors
def demo(out: Annotated[Path, typer.Option(help="Where results and page go.")] = Path("demo-out")) -> None:
    """Everything on a small real model, in a few minutes: tables here, result files and a page with pictures in the folder."""
    from kvfold.demo import run_demo
    from kvfold.eval.progress import progress_bars
    from kvfold.report import tables

    shown = {"quality": [tables.quality_table, tables.passkey_table], "decode": [tables.decode_table]}
    with progress_bars() as report:
        page = run_demo(
            out, _command_line(), _say, report, lambda kind, result: [_print(table(result)) for table in shown.get(kind, [])]
        )
    print(f"the page: {page}")
