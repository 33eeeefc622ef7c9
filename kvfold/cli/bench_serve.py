"""`kvfold bench serve`: load on any endpoint, or with `--offline` (`serve-offline`) on an engine of its own and its peers."""

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from kvfold.cli.console import command_line, progress, show, show_json
from kvfold.cli.options import (
    Json,
    Loading,
    Model,
    Out,
    Output,
    Repeats,
    Text,
    Times,
    check_out,
    model_name,
)
from kvfold.data import SAMPLE, read_text_file
from kvfold.errors import UserError, need_packages
from kvfold.layout.planner import parse_size


def serve(
    urls: Annotated[list[str], Argument(metavar="URL...", help="OpenAI endpoints, ours or others', up to /v1.")],
    clients: Annotated[int | None, Option(help="Requests open at once, each followed by the next.")] = None,
    rate: Annotated[float | None, Option(help="Requests a second, at random times (Poisson).")] = None,
    requests: Annotated[int, Option(help="Requests in all, where no trace is named.")] = 100,
    trace: Annotated[
        Path | None, Option(help="JSON lines with prompt and max_tokens, and at_s and time where they have them.")
    ] = None,
    text: Text = None,
    prompt_words: Annotated[str, Option(help="Words of a prompt, at least and at most.")] = "20-200",
    max_tokens: Annotated[str, Option(help="Tokens of an answer, at least and at most.")] = "16-128",
    time: Annotated[str | None, Option(help="A method that the server has loaded.")] = None,
    model: Annotated[str | None, Option(help="What the server calls the model. Default: its first.")] = None,
    api_key: Annotated[str | None, Option(help="Sent as the bearer token.")] = None,
    seed: Annotated[int, Option(help="Random seed of prompts, lengths and times.")] = 0,
    out: Out = None,
    picture: Annotated[Path | None, Option(help="Draw how long clients waited to this PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Load on OpenAI endpoints, one after the other: first tokens, gaps, whole answers, failures.

    Example: `kvfold bench serve http://127.0.0.1:8000/v1 --clients 16 --picture load.png`
    """
    for path in (out, picture):
        check_out(path)
    need_packages("httpx", extra="serve", what="bench serve")
    if picture is not None:
        need_packages("matplotlib", extra="report", what="--picture")
    from kvfold.bench.serve import parse_lengths, read_trace
    from kvfold.bench.serve_http import Load, bench_serve, draw_requests, summary_lines
    from kvfold.record import write_whole_file
    from kvfold.report.pictures import save_waits

    load = Load(rate=rate, clients=clients if rate or trace or clients else 8, seed=seed)
    if trace is not None:
        asked = read_trace(trace)
    else:
        words = (text or SAMPLE).read_text(encoding="utf-8")
        asked = draw_requests(
            words,
            requests,
            prompt_words=parse_lengths(prompt_words),
            max_tokens=parse_lengths(max_tokens),
            seed=seed,
            time=time,
        )
    rows = []
    for url in urls:
        with progress() as report:
            rows.append(bench_serve(url, asked, load, model=model, api_key=api_key, report=partial(report, url)))
    if out is not None:
        write_whole_file(out, json.dumps({"command": command_line(), "rows": rows}, indent=1) + "\n")
    if picture is not None:
        save_waits(rows, picture)
    if as_json:
        show_json({"rows": rows})
    else:
        for row in rows:
            show("\n".join([row["url"], *summary_lines(row)]))


def serve_offline(
    model: Model,
    time: Times = None,
    budget: Annotated[
        list[str] | None,
        Option(
            help="Uncompressed requests that the KV memory holds, e.g. 4, or bytes, e.g. 200MB; several: rows each."
        ),
    ] = None,
    requests: Annotated[int, Option(help="Requests, all sent at once.")] = 16,
    prompt: Annotated[str, Option(help="Tokens of a prompt: 128, or bounds to draw from: 64-512.")] = "128",
    new: Annotated[str, Option(help="Tokens of an answer, likewise; all are generated.")] = "128",
    trace: Annotated[
        Path | None, Option(help="JSON lines with prompt, max_tokens and at_s, in place of drawn requests.")
    ] = None,
    text: Text = None,
    temperature: Annotated[float, Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    peers: Annotated[
        list[str] | None,
        Option(help="generate (kvfold's own) | transformers | continuous (transformers' batching) | vllm; several."),
    ] = None,
    repeats: Repeats = 1,
    seed: Annotated[int, Option(help="Random seed of the lengths.")] = 0,
    *,
    loading: Loading,
    output: Output,
) -> None:
    """Requests in flight, tokens/s and waiting of many requests in one KV budget, methods beside each other and peers.

    Example: `kvfold bench serve-offline my-model --time full --time h2o:64+64 --budget 4 --requests 16`
    """
    from kvfold.bench import serve as bench
    from kvfold.record import write_result
    from kvfold.report.sheets import known_table

    bench.check_peers(peers or ())
    bounds = bench.parse_lengths(prompt), bench.parse_lengths(new)
    file, traced = (read_text_file(text or SAMPLE), []) if trace is None else (None, bench.read_trace(trace))
    weights, tokenizer = loading.load(model, times=time)
    drawn = bench.drawn_requests(requests, *bounds, file, tokenizer, seed=seed) if file else []
    wanted = drawn or bench.tokenised(traced, tokenizer)
    longest = max((len(one.prompt) + one.max_tokens - 1 for one in wanted), default=1)
    budgets = [_budget(one, lambda number: bench.budget_bytes(weights, number, longest)) for one in budget or ["4"]]

    def keep(result: dict[str, Any]) -> None:
        if output.out is not None:
            write_result(output.out, "serve", result, command_line())

    with ExitStack() as stack, progress() as report:
        sides = bench.open_peers(peers or (), weights, model, wanted, budgets[0], stack)
        result = bench.bench_serve(
            weights, wanted, name=model_name(model), methods=time or ["full", weights.config.layout.time_text()],
            budgets=budgets, peers=sides, repeats=repeats, temperature=temperature, keep=keep, report=report,
        )  # fmt: skip
    output.hand_over("serve", result, known_table("serve"))


def _budget(text: str, of_requests: Any) -> int:
    """Bytes: a plain number counts uncompressed requests."""
    try:
        number = float(text)
    except ValueError:
        return parse_size(text)
    if not 0 < number < 1e9:
        raise UserError(f"--budget '{text}': it holds more than 0 requests: write e.g. 4, or bytes as 200MB")
    return of_requests(number)
