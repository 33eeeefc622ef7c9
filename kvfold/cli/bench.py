"""`kvfold bench`: what is measured lives in bench/. `bench serve` is load on any endpoint, and with `--offline` (`serve-offline`)
on an engine of its own and its peers.
"""

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from kvfold.cli.options import (
    Device,
    Json,
    KvMemory,
    Loading,
    Model,
    Out,
    Output,
    Repeats,
    Text,
    Times,
    WeightsDtype,
    check_out,
    command_line,
    model_name,
    progress,
    show,
    show_json,
)
from kvfold.data import SAMPLE, read_text_file
from kvfold.errors import UserError, need_packages
from kvfold.layout.planner import parse_size
from kvfold.report.sheets import known_table


def prefill(
    model: Model,
    time: Times = None,
    batch: Annotated[int, Option(help="Rows.")] = 8,
    prompt: Annotated[int, Option(help="Tokens of each prompt.")] = 1024,
    call: Annotated[list[int] | None, Option(help="Tokens of one call, 0 = all; several times: rows for each.")] = None,
    text: Text = None,
    repeats: Repeats = 2,
    *,
    loading: Loading,
    output: Output,
) -> None:
    """Tokens/s of reading prompts under each method, beside what their floating-point operations allow.

    Example: `kvfold bench prefill my-model --batch 8 --prompt 4096 --time full --time window:508+4`
    """
    from kvfold.bench.reading import bench_prefill

    ours, tokenizer = loading.load(model, times=time)
    ids = _prompts(text, tokenizer, batch, prompt)
    with progress() as report:
        result = bench_prefill(
            ours, ids, name=model_name(model), methods=time or ["full"], call_tokens=call or (0,), repeats=repeats,
            report=report,
        )  # fmt: skip
    output.hand_over("prefill", result, known_table("prefill"))


def capacity(
    model: Model,
    time: Times = None,
    kv_memory: KvMemory = "256MB",
    prompt: Annotated[int, Option(help="Tokens of each row.")] = 1024,
    most: Annotated[int, Option(help="Rows at which the search ends.")] = 256,
    text: Text = None,
    *,
    loading: Loading,
    output: Output,
) -> None:
    """How many rows fit in a budget, found by reading them in until the cache is full.

    Example: `kvfold bench capacity my-model --kv-memory 256MB --prompt 1024 --time full --time h2o:128+128`
    """
    from kvfold.bench.reading import bench_capacity

    budget = parse_size(kv_memory)
    ours, tokenizer = loading.load(model, times=time)
    ids = _prompts(text, tokenizer, 8, prompt)
    with progress() as report:
        result = bench_capacity(
            ours, ids, name=model_name(model), kv_bytes=budget, methods=time or ["full"], most_rows=most, report=report
        )
    title = f"Rows of {result['context_tokens']:,} tokens in {budget / 1e6:,.0f} MB"
    output.hand_over("capacity", result, known_table("capacity", title))


def _prompts(text: Path | None, tokenizer: Any, batch: int, tokens: int) -> Any:
    """Ids [B, T]: stretches of a text one after the other, from its beginning again where it ends."""
    from kvfold.data import text_beginning

    if batch < 1 or tokens < 2:
        raise UserError(f"{batch} rows of {tokens} tokens: prompts are 1 or more of 2 tokens or more: ask for more")
    ids, _ = text_beginning(read_text_file(text or SAMPLE), tokenizer, tokens=batch * tokens)
    return ids.repeat(-(-batch * tokens // len(ids)))[: batch * tokens].view(batch, tokens)


def kernel(
    storage: Annotated[list[str] | None, Option(help="fp32 | bf16 | fp16 | fp8 | int8 | int4; several. Default: all.")] = None,
    tokens: Annotated[list[int] | None, Option(help="Mean entries of a head; several times. Default: 1024, 4096.")] = None,
    spread: Annotated[list[int] | None, Option(help="Longest head over shortest; several times. Default: 1, 100.")] = None,
    batch: Annotated[int, Option(help="Sequences.")] = 8,
    kv_heads: Annotated[int, Option(help="KV heads of a layer.")] = 3,
    group: Annotated[int, Option(help="Query heads of a KV head.")] = 3,
    head_dim: Annotated[int, Option(help="Channels of a head.")] = 64,
    repeats: Repeats = 30,
    *,
    output: Output,
) -> None:  # fmt: skip
    """Decode attention on the CPU against its bytes over the memory's bandwidth; `KVFOLD_ISA` chooses a narrower kernel.

    Example: `kvfold bench kernel --storage fp32 --storage int8 --tokens 4096`
    """
    import torch

    from kvfold.bench.kernel import KernelShape, measure_kernel
    from kvfold.ops.native import KINDS

    unknown = sorted(set(storage or ()) - set(KINDS))
    if unknown:
        raise UserError(f"storage '{unknown[0]}': pages hold one of {', '.join(KINDS)}: name one of them")
    if min([*(tokens or (1,)), *(spread or (1,)), batch, kv_heads, group, head_dim, repeats]) < 1:
        raise UserError("a size below 1: every size of a kernel's call is 1 or more: write a larger one")
    shape = KernelShape(batch=batch, kv_heads=kv_heads, group=group, head_dim=head_dim)
    rows = measure_kernel(
        shape, storages=storage or KINDS, tokens=tokens or (1024, 4096), spreads=spread or (1, 100), repeats=repeats
    )
    result = {"environment": {"device": "cpu", "threads": torch.get_num_threads()}, "rows": list(rows)}
    output.hand_over("kernel", result, known_table("kernel"))


def gpu(*, output: Output) -> None:
    """Every check and timing that needs a GPU, in under ten minutes; rows say `not measured` where there is none.

    Example: `kvfold bench gpu --out results/gpu/kernels.json`
    """
    from kvfold.bench.gpu import bench_gpu

    result = bench_gpu()
    counted = Counter(row["state"] for row in result["rows"])
    rows = [{"state": state, "rows": number} for state, number in sorted(counted.items())]
    table = known_table("gpu", f"GPU rows, {result['environment']['device']}")
    output.hand_over("gpu", result, lambda _: table({"rows": rows}))


def train(
    model: Model,
    time: Annotated[list[str] | None, Option(help="dmc[:W][+S] | dms[:W]; several times: a row each. Default: both.")] = None,
    sequence: Annotated[int, Option(help="Tokens of a sequence.")] = 1024,
    batch: Annotated[int, Option(help="Sequences of a step.")] = 1,
    repeats: Repeats = 3,
    train: Annotated[str, Option(help="What learns: full | lora | adapter (DMS).")] = "full",
    dtype: WeightsDtype = None,
    device: Device = None,
    *,
    output: Output,
) -> None:  # fmt: skip
    """What one step of a retrofit costs, against the same loss with gates off; both sides in one run, of random tokens.

    Example: `kvfold bench train my-model --time dms:128 --time dmc --sequence 1024`
    """
    need_packages("accelerate", "peft", extra="train", what="training")
    from kvfold.bench.train import METHODS, StepPoint, bench_train
    from kvfold.ops.native import flush_denormals

    point = StepPoint(sequence_tokens=sequence, batch_sequences=batch, trains=train)
    flush_denormals()
    methods = time or (METHODS if train != "adapter" else METHODS[:1])
    weights, _ = Loading(dtype=dtype or "float32", device=device).load(model)
    with progress() as report:
        result = bench_train(
            weights, name=model_name(model), methods=methods, point=point, repeats=repeats, report=report
        )
    output.hand_over("step", result, known_table("step"))


def decode(
    model: Model,
    time: Times = None,
    batch: Annotated[int | None, Option(help="Rows of one point. Default: the points 1 x 64, 16 x (32 + 64), 8 x 1,024.")] = None,
    prompt: Annotated[int, Option(help="Tokens of the prompt, with `--batch`.")] = 32,
    new: Annotated[int, Option(help="Tokens generated, with `--batch`.")] = 64,
    text: Annotated[Path | None, Option(help="A file that the prompts are taken from. Default: random tokens.")] = None,
    padding: Annotated[Literal["both", "none", "left"], Option(help="Whether rows are padded.")] = "both",
    filled: Annotated[bool, Option("--filled", help="With `--batch`: caches of random keys and values, no prompt.")] = False,
    compression: Annotated[
        list[float] | None,
        Option(help="With `--filled`: what a learned method holds; several: a row each."),
    ] = None,
    compare_bits: Annotated[list[str] | None, Option(help="With `--filled`: storages beside `--bits`; several.")] = None,
    peers: Annotated[str, Option(help="transformers | vllm | both, by a comma | none")] = "transformers",
    repeats: Repeats = 5,
    *,
    loading: Loading,
    output: Output,
) -> None:  # fmt: skip
    """Tokens/s, step time, bytes and peak memory of `generate`, with and without left padding, all sides in one run.

    Example: `kvfold bench decode my-model --batch 8 --prompt 256 --time full --time h2o:64+64`
    """
    from kvfold.bench.decode import POINTS, Point, bench_filled
    from kvfold.eval.cells import load_theirs

    named, points = _peers(peers), POINTS
    if batch is not None:
        points = (Point(name=f"{batch} x ({prompt} + {new})", batch=batch, prompt_tokens=prompt, new_tokens=new),)
    if filled and (batch is None or "vllm" in named):
        raise UserError(
            "--filled: one point is measured, beside transformers or alone: write e.g. --batch 8 --prompt 4096"
        )
    if (compression or compare_bits) and not filled:
        raise UserError("--compression and --compare-bits: caches that read a prompt hold what they hold: add --filled")
    file = None if text is None else read_text_file(text)
    ours, tokenizer = loading.load(model, times=time)
    theirs = load_theirs(model, dtype=ours.dtype, device=ours.device) if "transformers" in named else None
    with progress() as report:
        common = {"name": model_name(model), "repeats": repeats, "report": report}
        if filled:
            sides, text_T = _sides(ours, tokenizer, time, prompt, compression, compare_bits, file)
            common |= {"batch": batch, "tokens": prompt, "new_tokens": new, "text_T": text_T}
            result = bench_filled(ours, theirs, sides, **common)
        else:
            padded = {"both": (False, True), "none": (False,), "left": (True,)}[padding]
            common |= {"methods": time or ["full"], "points": points, "padded": padded}
            result = _decoded(ours, theirs, model if "vllm" in named else None, tokenizer, file, common)
    output.hand_over("decode", result, known_table("filled" if filled else "decode"))


def _peers(text: str) -> set[str]:
    """Those to be measured beside kvfold."""
    named = {part.strip() for part in text.split(",")}
    if not named <= {"transformers", "vllm", "none"} or ("none" in named and len(named) > 1):
        raise UserError(
            f"peers '{text}': kvfold is measured beside transformers, vllm, both by a comma, or alone: write "
            "'transformers' or 'none'"
        )
    return named - {"none"}


def _decoded(ours: Any, theirs: Any, vllm: str | None, tokenizer: Any, text: Any, common: Mapping[str, Any]) -> Mapping:
    """Caches that read prompts; `vllm`: the checkpoint that vLLM loads, None = it is no peer."""
    from kvfold.bench.decode import bench_decode, text_prompts

    prompts = None if text is None else text_prompts(text, tokenizer)
    with nullcontext() if vllm is None else _vllm(vllm, ours, common["points"]) as peer:
        return bench_decode(ours, theirs, prompts=prompts, vllm=peer, **common)


def _vllm(model: str, ours: Any, points: Any) -> Any:
    """vLLM on the same checkpoint, with room for the largest point."""
    import torch

    from kvfold.bench.vllm_peer import VllmPeer

    longest = max(point.prompt_tokens + point.new_tokens for point in points)
    tokens = max(point.batch * (point.prompt_tokens + point.new_tokens + 64) for point in points)
    entry = sum(2 * one.num_kv_heads * one.head_dim * ours.dtype.itemsize for one in ours.config.layout.layers)
    return VllmPeer(
        model, max_rows=max(point.batch for point in points), max_tokens=longest, kv_bytes=2 * tokens * entry,
        dtype=str(ours.dtype).removeprefix("torch."), threads=torch.get_num_threads(),
    )  # fmt: skip


def _sides(
    ours: Any, tokenizer: Any, time: list[str] | None, tokens: int, compression: list[float] | None,
    compare_bits: list[str] | None, text: Any,
) -> tuple[list[Any], Any]:  # fmt: skip
    """The caches to be filled, and a text that shows what gates keep."""
    from kvfold.bench.decode import Side
    from kvfold.data import text_beginning
    from kvfold.eval.reading import method_layouts

    layouts = method_layouts(ours, time or ["full"])
    learned = [any(layout.time_of(owner).trained for owner in layout.owners) for layout in layouts]
    sides = [
        Side(layout=layout if bits is None else layout.with_bits(bits), compression=times)
        for bits in (None, *(compare_bits or ()))
        for layout, has_gates in zip(layouts, learned, strict=True)
        for times in ((compression or (None,)) if has_gates else (None,))
    ]
    if not any(learned):
        return sides, None
    return sides, text_beginning(text or read_text_file(SAMPLE), tokenizer, tokens=tokens)[0]


def serve(
    urls: Annotated[list[str], Argument(metavar="URL...", help="OpenAI endpoints, ours or others', up to /v1.")],
    clients: Annotated[int | None, Option(help="Requests open at once, each followed by the next.")] = None,
    rate: Annotated[float | None, Option(help="Requests a second, at random times (Poisson).")] = None,
    requests: Annotated[int, Option(help="Requests in all, where no trace is named.")] = 100,
    trace: Annotated[Path | None, Option(help="JSON lines with prompt, and where known max_tokens, at_s and time.")] = None,
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
) -> None:  # fmt: skip
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
        bounds = {"prompt_words": parse_lengths(prompt_words), "max_tokens": parse_lengths(max_tokens)}
        words = (text or SAMPLE).read_text(encoding="utf-8")
        asked = draw_requests(words, requests, **bounds, seed=seed, time=time)
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
        show(*("\n".join([row["url"], *summary_lines(row)]) for row in rows))


def serve_offline(
    model: Model,
    time: Times = None,
    budget: Annotated[
        list[str] | None,
        Option(help="Uncompressed requests that it holds, e.g. 4, or bytes, e.g. 200MB; several."),
    ] = None,
    requests: Annotated[int, Option(help="Requests, all sent at once.")] = 16,
    prompt: Annotated[str, Option(help="Tokens of a prompt: 128, or bounds to draw from: 64-512.")] = "128",
    new: Annotated[str, Option(help="Tokens of an answer, likewise; all are generated.")] = "128",
    trace: Annotated[Path | None, Option(help="JSON lines with prompt, max_tokens and at_s, in place of drawn requests.")] = None,
    text: Text = None,
    temperature: Annotated[float, Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    peers: Annotated[
        list[str] | None,
        Option(help="generate | transformers | continuous (transformers' batching) | vllm; several."),
    ] = None,
    repeats: Repeats = 1,
    seed: Annotated[int, Option(help="Random seed of the lengths.")] = 0,
    *,
    loading: Loading,
    output: Output,
) -> None:  # fmt: skip
    """Requests in flight, tokens/s and waiting of many requests in one KV budget, methods beside each other and peers.

    Example: `kvfold bench serve-offline my-model --time full --time h2o:64+64 --budget 4 --requests 16`
    """
    from kvfold.bench import serve as bench
    from kvfold.record import write_result

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
