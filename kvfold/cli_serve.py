"""`kvfold serve` and `kvfold bench serve`: parse and call. What they do lives in the rooms `serve` and `bench`; names of the
server's options are vLLM's.
"""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli_model import SAMPLE, Adapter, Device, Dtype, Json, quiet_transformers
from kvfold.console import check_out, check_packages, clear_errors, command_line, progress, say, show, show_json


def add_serve(app: typer.Typer) -> None:
    """Put the command among the others."""
    app.command("serve", epilog="Example: `kvfold serve my-model --kv-memory 4GB --method full --method h2o:256+256`")(
        serve
    )


@clear_errors
def serve(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A folder, a .gguf file or a hub name.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="The small model of the demo, with its gates.")] = False,
    method: Annotated[
        list[str] | None, typer.Option(help="Methods that requests may name; the first is the default.")
    ] = None,
    kv_memory: Annotated[str, typer.Option(help="Bytes of the cache, never exceeded.")] = "2GB",
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    api_key: Annotated[list[str] | None, typer.Option(help="Who knows one of these may ask.")] = None,
    served_model_name: Annotated[list[str] | None, typer.Option(help="What clients call the model.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of prompt and answer, at most.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at once, at most.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens of a prefill step.")] = 512,
    chat_template: Annotated[str | None, typer.Option(help="A file, or the template itself.")] = None,
    generation_config: Annotated[str, typer.Option(help="auto | vllm | a folder.")] = "auto",
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Answer OpenAI's clients from one compressed cache, with a live page at `/`."""
    check_packages("fastapi", "uvicorn", "openai", "prometheus_client", "llguidance", extra="serve", what="serving")
    from kvfold.demo import bundled_model
    from kvfold.serve.command import serve as run

    quiet_transformers()
    run(
        model, demo=bundled_model() if demo else None, host=host, port=port, api_key=api_key or (),
        served_model_name=served_model_name or (), max_model_len=max_model_len, max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens, chat_template=chat_template, generation_config=generation_config,
        dtype=dtype, device=device, kv_memory=kv_memory, method=method or (), adapter=adapter, say=say,
    )  # fmt: skip


def add_bench_serve(bench: typer.Typer) -> None:
    """Put the command among the others."""
    bench.command(
        "serve", epilog="Example: `kvfold bench serve http://127.0.0.1:8000/v1 --clients 16 --picture load.png`"
    )(bench_serving)


@clear_errors
def bench_serving(
    urls: Annotated[list[str], typer.Argument(metavar="URL...", help="OpenAI endpoints, ours or others', up to /v1.")],
    clients: Annotated[int | None, typer.Option(help="Requests open at once, each followed by the next.")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second, at random times (Poisson).")] = None,
    requests: Annotated[int, typer.Option(help="Requests in all, where no trace is named.")] = 100,
    trace: Annotated[
        Path | None, typer.Option(help="JSON lines with prompt and max_tokens, and at_s and time where they have them.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Prompts are cut from this text. Default: a novel.")] = None,
    prompt_words: Annotated[str, typer.Option(help="Words of a prompt, at least and at most.")] = "20-200",
    max_tokens: Annotated[str, typer.Option(help="Tokens of an answer, at least and at most.")] = "16-128",
    time: Annotated[str | None, typer.Option(help="A method that the server has loaded.")] = None,
    model: Annotated[str | None, typer.Option(help="What the server calls the model. Default: its first.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Sent as the bearer token.")] = None,
    seed: Annotated[int, typer.Option(help="Of prompts, lengths and times.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw how long clients waited to this PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Load on OpenAI endpoints, one after the other: first tokens, gaps, whole answers, failures."""
    for path in (out, picture):
        check_out(path)
    check_packages(
        "httpx", *(("matplotlib",) if picture else ()), extra="plot" if picture else "serve", what="bench serve"
    )
    from kvfold.bench.serve_http import Load, bench_serve, draw_requests, lengths, read_trace, summary_lines
    from kvfold.data.whole_file import write_whole_file
    from kvfold.report.pictures.load import save_load_png

    load = Load(rate=rate, clients=clients if rate or trace or clients else 8, seed=seed)
    if trace is not None:
        asked = read_trace(trace)
    else:
        words = (text or SAMPLE).read_text(encoding="utf-8")
        asked = draw_requests(
            words, requests, prompt_words=lengths(prompt_words), max_tokens=lengths(max_tokens), seed=seed, time=time
        )
    rows = []
    for url in urls:
        with progress() as report:
            rows.append(bench_serve(url, asked, load, model=model, api_key=api_key, report=partial(report, url)))
    if out is not None:
        write_whole_file(out, json.dumps({"command": command_line(), "rows": rows}, indent=1) + "\n")
    if picture is not None:
        save_load_png(rows, picture)
    if as_json:
        show_json({"rows": rows})
    else:
        for row in rows:
            show("\n".join([row["url"], *summary_lines(row)]))
